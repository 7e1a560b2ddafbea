"""Specification of the search for a hybrid's attention layers: nothing pretrained moves, and the tables are what they say."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM, Qwen2Config, Qwen2ForCausalLM

from jetlab.config import Tasks, Training
from jetlab.data.packing import Mixture
from jetlab.evaluate.suite import exam
from jetlab.search.hybrid import HybridSupernet, evaluate, placement_law, search_attention, train
from jetlab.search.selectors import objective, select
from jetlab.tasks import SCORED, build_tasks
from jetlab.train import loop

IDS = torch.arange(2, 42)[None] * 7 % 400


@pytest.fixture(autouse=True)
def _checkpoints_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "resolve", lambda path: tmp_path / path)


def nemotron_h(vocab_size, pattern="M-M*-M-"):
    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=vocab_size, hidden_size=32, hybrid_override_pattern=pattern, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, intermediate_size=48, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=8,
        chunk_size=8, initializer_range=0.2,
    )  # fmt: skip
    return NemotronHForCausalLM(config).eval()


@pytest.fixture
def model(tokenizer):
    return nemotron_h(len(tokenizer))


@pytest.fixture
def study(sizes):
    n_contexts = {"search": 2, "select": 1, "test": 3}
    return Tasks.from_params(seq_len=40, sizes=sizes, n_contexts=n_contexts, n_questions=2)


@pytest.fixture
def training():
    return Training.from_params(
        n_local=2, n_steps=4, learning_rate=3e-3, warmup=1, feature_weight=1.0, logit_weight=1.0,
        rows={"retrieval": 1, "math": 1}, weights={}, growth=0.4,
    )  # fmt: skip


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def test_at_its_own_placement_the_model_is_the_pretrained_one_bit_for_bit(model):
    before, kinds = logits(model), list(model.config.layers_block_type)
    supernet = HybridSupernet(model, 0)
    assert (supernet.own, supernet.n_layers) == ((2,), 4)
    assert torch.equal(logits(model), before) and model.config.layers_block_type == kinds
    supernet.activate((0, 3))
    supernet.activate(supernet.own)
    assert torch.equal(logits(model), before) and model.config.layers_block_type == kinds


def test_every_placement_is_another_model(model):
    supernet = HybridSupernet(model, 0)
    found = []
    for full in [(), *((i,) for i in range(4)), (0, 3), (0, 1, 2, 3)]:
        supernet.activate(full)
        found.append(logits(model))
    assert not any(torch.allclose(a, b) for a, b in combinations(found, 2))


def test_a_placement_is_an_ordinary_nemotron_h(model, tmp_path):
    supernet = HybridSupernet(model, 0)
    supernet.activate((0, 3))
    assert model.config.hybrid_override_pattern == "*-MM-*-"
    model.save_pretrained(tmp_path)
    again = NemotronHForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_the_state_of_a_placement_carries_over(model):
    supernet = HybridSupernet(model, 0)
    supernet.activate((0, 3))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached, anew = (model.generate(IDS[:, :9], use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, anew)


def test_new_blocks_start_by_the_seed_and_read_through_the_own_norm(model, tokenizer):
    with torch.no_grad():
        model.model.layers[0].norm.weight.uniform_(0.5, 1.5)
    twin = nemotron_h(len(tokenizer))
    twin.load_state_dict(model.state_dict())
    first, second = HybridSupernet(model, 3), HybridSupernet(twin, 3)
    for (name, a), (_, b) in zip(first.blocks.named_parameters(), second.blocks.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    own, new = (first.blocks[0][kind].norm for kind in ("linear_attention", "full_attention"))
    assert torch.equal(own.weight, new.weight) and own.weight is not new.weight


def test_only_new_mixers_train(model, tokenizer, study, training):
    supernet = HybridSupernet(model, 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    new = {name: p.clone() for name, p in supernet.blocks.named_parameters() if p.requires_grad}
    assert new and all(".mixer." in name for name in new)
    norms = {name: p.clone() for name, p in supernet.blocks.named_parameters() if name.endswith("n.norm.weight")}
    mixture = Mixture(build_tasks(study.sizes), training.rows, tokenizer, study.seq_len, 0)
    history = train(supernet, mixture, training, placement_law("fixed_k", supernet, 0))
    assert [row["phase"] for row in history] == ["local", "end to end"]
    after = dict(supernet.blocks.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert norms and all(torch.equal(after[name], p) for name, p in norms.items())
    assert not any(torch.equal(after[name], p) for name, p in new.items())


def test_layer_local_steps_bring_new_mixers_nearer_to_the_own_ones(model, tokenizer, study, training):
    supernet = HybridSupernet(model, 0)
    mixture = Mixture(build_tasks(study.sizes), training.rows, tokenizer, study.seq_len, 0)
    longer = training.model_copy(update={"n_local": 60, "n_steps": 1, "learning_rate": 1e-2})
    history = train(supernet, mixture, longer, placement_law("fixed_k", supernet, 0))
    local = [row["loss"] for row in history if row["phase"] == "local"]
    assert local[-1] < 0.8 * local[0]


@pytest.mark.parametrize("stop_at", [1, 13])
def test_a_run_that_was_killed_ends_with_the_same_bits(stop_at, tokenizer, study, training, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    longer, n_drawn = training.model_copy(update={"n_steps": 14}), []

    def trained(last_step=99):
        supernet = HybridSupernet(nemotron_h(len(tokenizer)), 0)
        mixture = Mixture(build_tasks(study.sizes), training.rows, tokenizer, study.seq_len, 0)
        law = placement_law("fixed_k", supernet, 0)

        def counted(step):
            if step == last_step:
                raise KeyboardInterrupt
            n_drawn.append(step)
            return law(step)

        history = train(supernet, mixture, longer, counted, resume_key="key")
        return supernet.blocks.state_dict(), history

    weights, history = trained()
    with pytest.raises(KeyboardInterrupt):
        trained(stop_at)
    n_drawn.clear()
    again, history_again = trained()
    assert history_again == history and all(torch.equal(x, weights[name]) for name, x in again.items())
    assert n_drawn[0] == (10 if stop_at > 10 else 0)


def test_a_law_draws_the_budget_and_never_the_model_itself(model):
    supernet = HybridSupernet(model, 0)
    law = placement_law("fixed_k", supernet, 0)
    drawn = [law(step) for step in range(60)]
    assert set(drawn) == {(0,), (1,), (3,)} and drawn == [law(step) for step in range(60)]
    assert {len(full) for full in map(placement_law("sandwich", supernet, 0), range(30))} == {0, 1}


def test_the_table_and_the_choices_agree_with_looking_at_each_placement(tokenizer, study, training):
    model = nemotron_h(len(tokenizer), "M-M*-M*")
    run = search_attention(model, tokenizer, study, training, beam_width=10, seed=1)
    supernet = run.supernet
    assert (supernet.own, run.budget, model.config.hybrid_override_pattern) == ((2, 4), 2, "M-M*-M*")
    paper = exam(study, tokenizer, "search", 1, SCORED)
    scores = {}
    for full in combinations(range(5), 2):
        supernet.activate(full)
        scores[full] = paper.score(model)
        for task in SCORED:
            np.testing.assert_array_equal(run.tables["search"][full][task].loss, scores[full][task].loss)
    for task in SCORED:
        best = min(scores, key=lambda full: (-objective(scores[full], task), full))
        assert run.found(task) == best  # a beam of all single layers sees every pair
    rows = {(row["task"], row["selector"]): row for row in run.choices()}
    assert set(rows) == set(product((*SCORED, "all"), ("beam", "exhaustive", "uniform", "pretrained", "random")))
    assert all(rows[task, "beam"]["regret"] == 0 for task in SCORED)
    assert rows["all", "pretrained"]["layers"] == "2 4" and rows["math", "exhaustive"]["placements"] == 10
    test = {full: objective(run.tables["test"][full], "knowledge") for full in scores}
    best = select(run.on("search"), 2, "knowledge", selector="exhaustive").placement
    row = rows["knowledge", "random"]
    assert row["value"] == pytest.approx(np.mean(list(test.values())))
    assert row["regret"] == pytest.approx(test[best] - np.mean(list(test.values())))
    ceilings = run.on("test").ceilings
    for selector in ("pretrained", "uniform"):
        full = tuple(map(int, rows["all", selector]["layers"].split()))
        expected = objective(run.tables["test"][full], "all", ceilings)
        assert rows["all", selector]["value"] == pytest.approx(expected)
    estimates = {key: (value, se, n) for key, value, se, n in run.estimates()}
    assert estimates["code_pretrained"][0] == run.tables["test"][2, 4]["code"].value
    assert estimates["code_found_minus_uniform"][2] == 3
    placements = run.placements()
    assert len(placements) == 2 * (10 + 1) * len(SCORED)
    assert {row["layers"]: row["kept"] for row in placements if row["kept"] != 1} == {
        "": 0, "2 4": 2, "0 1": 0, "0 3": 0, "1 3": 0,
    }  # fmt: skip


def test_evaluation_leaves_the_model_at_its_own_placement(model, tokenizer, study):
    supernet = HybridSupernet(model, 0)
    before = logits(model)
    table = evaluate(supernet, exam(study, tokenizer, "search", 0, ["math"]), [(), (0,), (2,)])
    assert list(table) == [(), (0,), (2,)] and torch.equal(logits(model), before)


def test_what_cannot_be_searched_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"0 … 3, got 4"):
        HybridSupernet(model, 0).activate((1, 4))
    with pytest.raises(ValueError, match="both kinds, got 0 attention layers among 2 mixers"):
        HybridSupernet(nemotron_h(len(tokenizer), "M-M-"), 0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, intermediate_size=8, **small))
    with pytest.raises(ValueError, match=r"got Qwen2ForCausalLM; use search\.supernet"):
        HybridSupernet(qwen, 0)
