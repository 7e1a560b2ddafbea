"""Specification of the generated samples: greedy decoding by steps, a row per model."""

import pytest
import torch

from jetlab.config import Tasks
from jetlab.evaluate.generate import greedy, samples
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.tasks import TASKS


@pytest.fixture(scope="module")
def models(tokenizer):
    teacher, hybrid = (surgery.load(ROOT / "assets/teacher/0")[0] for _ in range(2))
    torch.manual_seed(0)
    surgery.convert(hybrid, ["attention", "gated_deltanet"] * 4, BlockDims(64, 2, 16, 16))
    return {"teacher": (surgery.attach(teacher), tokenizer), "hybrid": (hybrid, tokenizer)}


@pytest.mark.parametrize("name", ["teacher", "hybrid"])
def test_steps_give_the_tokens_that_whole_passes_give(name, models, tokenizer):
    model, _ = models[name]
    given = tokenizer("<text> One evening Greta").input_ids
    ids = list(given)
    with torch.no_grad():
        for _ in range(9):
            hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
            ids.append(int(model.lm_head(hidden[0, -1]).argmax()))
    assert greedy(model, torch.tensor(given), 9) == ids[len(given) :]


def test_decoding_stops_before_the_end_token(models, tokenizer):
    model, _ = models["teacher"]
    given = torch.tensor(tokenizer("<text> One evening Greta").input_ids)
    whole = greedy(model, given, 6)
    assert greedy(model, given, 6, end=whole[3]) == whole[: whole.index(whole[3])]


def test_every_task_and_model_has_its_rows(models, sizes, tokenizer):
    study = Tasks(seq_len=64, sizes=sizes, n_contexts={"search": 1, "select": 1, "test": 1}, n_questions=2)
    rows = samples(models, study, 2, 0)
    assert len(rows) == len(TASKS) * 2 * 2
    assert [row["model"] for row in rows[:4]] == ["teacher", "hybrid", "teacher", "hybrid"]
    for row in rows:
        assert list(row) == ["task", "context_tail", "prompt", "expected", "model", "generated", "right"]
        assert row["right"] == (None if row["task"] == "text" else row["generated"] == row["expected"])
    assert all(row["right"] for row in rows if row["model"] == "teacher" and row["task"] in ("retrieval", "facts"))


def test_a_model_without_slots_is_refused_with_the_way_out(tokenizer):
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    with pytest.raises(ValueError, match="no slots"):
        greedy(model, torch.tensor([3]), 1)
