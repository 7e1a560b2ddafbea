"""Specification of switched-off layers, stretched contexts and pictures of kernels."""

import pytest
import torch

from jetlab.config import Tasks
from jetlab.evaluate.controls import mean_outputs, parts, silenced, switched_off
from jetlab.evaluate.kernels import kernel_motion, kernels_of, tap_shares
from jetlab.evaluate.lengths import Stretched, over_lengths
from jetlab.evaluate.suite import Exam
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.tasks import TASKS

RETRIEVAL = TASKS["retrieval"](n_pairs=8, key_words=1)


@pytest.fixture(scope="module")
def hybrid():
    model, tokenizer = surgery.load("assets/teacher/0")
    torch.manual_seed(0)
    kinds = ["attention" if layer == 3 else "jetblock" for layer in range(model.config.num_hidden_layers)]
    return surgery.convert(model, kinds, BlockDims(64, 4, 8, 16)).eval(), tokenizer


def of_variant(conv_v):
    model, tokenizer = surgery.load("assets/teacher/0")
    kinds = ["jetblock"] * model.config.num_hidden_layers
    return surgery.convert(model, kinds, BlockDims(64, 4, 8, 16), conv_v=conv_v).eval(), tokenizer


def hidden(model, ids):
    with torch.no_grad():
        return model.model(input_ids=ids, use_cache=False)[0]


def test_a_silenced_layer_adds_nothing_or_what_it_is_told(hybrid):
    model, tokenizer = hybrid
    ids = torch.randint(0, len(tokenizer), (1, 12), generator=torch.Generator().manual_seed(0))
    before = hidden(model, ids)
    mean = torch.linspace(-1, 1, 64)
    for outputs, expected in ((None, torch.zeros(64)), ({2: mean, 3: mean}, mean)):
        with silenced(model, [2, 3], outputs), surgery.recorded(model) as tape:
            inside = hidden(model, ids)
        for layer in (2, 3):
            torch.testing.assert_close(tape[layer][1], expected.expand(1, 12, 64))
        assert not torch.allclose(inside, before)
    assert torch.equal(hidden(model, ids), before)


def test_an_exam_of_a_silenced_model_is_that_of_a_model_with_zero_output(hybrid):
    model, tokenizer = hybrid
    exam = Exam([RETRIEVAL], tokenizer, "test", 2, 0, n_questions=3)
    with silenced(model, [3]):
        found = exam.score(model)["retrieval"].loss
    weight = surgery.slots(model)[3].paths["attention"].inner.o_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        expected = exam.score(model)["retrieval"].loss
        weight.copy_(kept)
    assert found == pytest.approx(expected, rel=1e-5)


def test_means_are_over_the_tokens_of_all_texts(hybrid):
    model, tokenizer = hybrid
    texts = ["<retrieval> amber fox", "<retrieval> kettle owl amber cat"]
    outputs = []
    for text in texts:
        with surgery.recorded(model) as tape, torch.no_grad():
            model.model(input_ids=torch.tensor([tokenizer(text).input_ids]), use_cache=False)
        outputs.append(tape[5][1][0])
    torch.testing.assert_close(mean_outputs(model, tokenizer, texts)[5], torch.cat(outputs).mean(0))


def test_parts_are_the_linear_layers_and_those_with_attention(hybrid):
    assert parts(hybrid[0]) == {"linear": [0, 1, 2, 4, 5, 6, 7], "attention": [3]}


def test_a_layer_that_is_not_there_is_refused(hybrid):
    with pytest.raises(ValueError, match=r"layers must be 0 … 7, got 8"), silenced(hybrid[0], [8]):
        pass


@pytest.mark.parametrize("place", ["before", "behind"])
def test_stretching_adds_text_and_leaves_the_questions(place):
    plain = RETRIEVAL.examples("test", 3, 0)
    longer = Stretched(RETRIEVAL, 200, place).examples("test", 3, 0)
    for a, b in zip(plain, longer, strict=True):
        assert b.questions == a.questions
        assert b.context.endswith(a.context) if place == "before" else b.context.startswith(a.context)
        assert len(b.context) == len(a.context) + 200 + len("<text> ")
    assert len({b.context[-150:] if place == "behind" else b.context[:150] for b in longer}) == 3
    assert Stretched(RETRIEVAL, 0, place).examples("test", 3, 0) == plain
    assert Stretched(RETRIEVAL, 200, place).examples("test", 1, 0, start=2) == longer[2:]
    assert Stretched(RETRIEVAL, 5, place).chance == RETRIEVAL.chance


def test_a_place_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="place must be one of before, behind, got 'between'"):
        Stretched(RETRIEVAL, 5, "between")


def test_kernels_are_those_that_the_convolution_uses(hybrid):
    model, tokenizer = hybrid
    tokens, made = kernels_of(model, tokenizer, "<retrieval> amber fox")
    assert tokens == ["<retrieval>", "amber", "fox"]
    assert set(made) == {0, 1, 2, 4, 5, 6, 7} and made[0].shape == (3, 64, 4)
    shares = tap_shares(made[0])
    torch.testing.assert_close(shares.sum(-1), torch.ones(3))
    assert tap_shares(torch.tensor([[[0.0, -3.0], [1.0, 1.0]]])).tolist() == [[0.25, 0.75]]
    static, none = (kernels_of(*of_variant(conv_v), "<retrieval> amber fox")[1][0] for conv_v in ("static", "none"))
    assert torch.equal(static[0], static[2]) and static.shape == (3, 64, 4)
    assert torch.equal(none, torch.ones(3, 64, 1))
    motion = kernel_motion(model, tokenizer, "<retrieval> amber fox")
    assert motion[3]["motion"] is None and motion[0]["motion"] == 0.0  # an untrained generator makes one kernel for all


SMALL = Tasks(
    seq_len=64,
    sizes={
        "knowledge": {"n_options": 4},
        "math": {"n_names": 6},
        "retrieval": {"n_pairs": 6, "key_words": 1},
        "code": {"n_variables": 4, "writes_per_variable": 2},
        "recency": {"n_pairs": 4, "n_distractors": 4},
        "patterns": {"n_records": 4},
        "chain": {"n_names": 4, "n_changes": 1},
    },
    n_contexts={"search": 2, "select": 2, "test": 2},
    n_questions=2,
)


def test_switching_off_the_only_attention_costs_the_teacher_what_it_knows(hybrid):
    teacher, tokenizer = surgery.load("assets/teacher/0")
    surgery.attach(teacher)
    found = switched_off(teacher, tokenizer, SMALL, 0)
    assert set(found) == {("attention", "zero"), ("attention", "mean")}  # it has no linear layer
    assert max(found["attention", way]["retrieval"].value for way in ("zero", "mean")) < 0.5
    assert set(switched_off(*hybrid, SMALL, 0)) == {(p, w) for p in ("linear", "attention") for w in ("zero", "mean")}


def test_without_filler_the_scores_are_those_of_the_plain_exam(hybrid):
    teacher, tokenizer = surgery.load("assets/teacher/0")
    surgery.attach(teacher)
    found = over_lengths({"teacher": teacher}, tokenizer, SMALL, [0, 40], 2, 0)
    assert set(found) == {("teacher", place, n) for place in ("before", "behind") for n in (0, 40)}
    task = TASKS["retrieval"](n_pairs=6, key_words=1)
    plain = Exam([task], tokenizer, "test", 2, 0, n_questions=2).score(teacher)["retrieval"]
    for place in ("before", "behind"):
        assert found["teacher", place, 0]["retrieval"].loss == pytest.approx(plain.loss)
        assert found["teacher", place, 40]["retrieval"].loss != pytest.approx(plain.loss, rel=1e-6)
