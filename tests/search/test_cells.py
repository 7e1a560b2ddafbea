"""Specification of cells: what a family holds, what a replicate shares, and what a row says."""

import pytest

from jetlab.config import CellStudy, ConfigError
from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims
from jetlab.layers.jetblock import VARIANTS
from jetlab.search import cells
from jetlab.tasks import SCORED
from jetlab.train.loop import TrainingDiverged

KINDS = ["retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "jetblock", "rwkv7"]


@pytest.fixture(scope="module")
def study(sizes):
    rows = {"retrieval": 1, "knowledge": 1}
    training = {
        "n_local": 1, "n_steps": 2, "learning_rate": 3e-3, "warmup": 1, "feature_weight": 2.0, "logit_weight": 1.0,
        "rows": rows, "weights": {}, "growth": 0.4,
    }  # fmt: skip
    scratch = {
        "n_steps": 2, "learning_rate": 2e-3, "muon_learning_rate": 4e-3, "warmup": 1, "growth": 0.4,
        "rows": rows, "weights": {},
    }  # fmt: skip
    sections = {
        "common": {"seed": 0, "n_threads": 1, "path": "paper", "device": "cpu"},
        "tasks": {
            "seq_len": 40, "sizes": sizes, "n_contexts": {"search": 2, "select": 2, "test": 2}, "n_questions": 2,
        },
    }  # fmt: skip
    return lambda **changes: CellStudy.from_params(
        **sections
        | {
            "family": "blocks",
            "training": training,
            "scratch": scratch,
            "stage2_steps": 1,
            "stage2_learning_rate": 5e-4,
        }
        | {"lengths": [0, 20], "dims": {"n_heads": 4, "head_dim": 8, "head_dim_v": 16}, "state_size": 512}
        | {"blocks": KINDS, "jetblock": list(VARIANTS), "sizes": ["h4_k8_v16", "h2_k16_v16"]}
        | {"teachers": ["assets/teacher/0"], "seeds": [1, 2], "learning_rates": [], "tuning_seed": 0}
        | {"found": [3], "placements": ["found", "none", "uniform"], "n_workers": 1}
        | changes
    )


def test_blocks_come_at_equal_state_and_near_equal_parameters_at_every_placement(study):
    design = cells.list_cells(study(), 8, 64)
    assert len(design) == 7 * 2 * 3
    assert {(c.placement, c.layers) for c in design} == {("found", (3,)), ("none", ()), ("uniform", (4,))}
    target = MIXERS["jetblock"].n_params(BlockDims(64, 4, 8, 16))
    for cell in design:
        depth = {"layer_idx": 1, "n_layers": 8, "first": False}
        options = depth if getattr(MIXERS[cell.kind], "depends_on_depth", False) else {}
        n_params = sum(p.numel() for p in MIXERS[cell.kind](cell.dims, **options).parameters())
        if cell.equal == "state":
            assert cell.dims.state_size == 512
        else:
            assert abs(n_params / target - 1) < 0.03, cell.kind


def test_a_family_varies_what_it_is_named_for(study):
    variants = cells.list_cells(study(family="jetblock", placements=["none"]), 8, 64)
    assert [c.name for c in variants] == list(VARIANTS)
    assert {c.dims.conv_size for c in variants} == {2, 3, 4, 8} and {c.kind for c in variants} == {"jetblock"}
    sizes = cells.list_cells(study(family="sizes", placements=["none"]), 8, 64)
    assert [c.dims for c in sizes] == [BlockDims(64, 4, 8, 16), BlockDims(64, 2, 16, 16)]
    assert len({c.learning_rate for c in cells.list_cells(study(family="scratch"), 8, 64)}) == 1


def test_a_replicate_is_a_teacher_with_a_seed(study):
    own = study(teachers=["assets/teacher/0", "assets/teacher/1"])
    design = cells.list_cells(own, 8, 64)[:3]
    found = cells.replicated(design, own)
    assert len(found) == 3 * 4 and {(c.teacher, c.seed) for c in found} == {
        (f"assets/teacher/{t}", s) for t in (0, 1) for s in (1, 2)
    }


def test_the_tuning_seed_takes_no_further_part(study):
    with pytest.raises(ConfigError, match="tuning_seed 1 chooses the rates, so it must not be among seeds"):
        study(learning_rates=[1e-3], tuning_seed=1)


def test_the_best_rate_is_by_select_and_never_one_that_diverged(study):
    def row(rate, score):
        scores = {} if score is None else {f"{task}_select": score for task in SCORED}
        return {"name": "gla", "placement": "none", "learning_rate": rate, **scores, "retrieval": 1.0}

    rows = [row(1e-3, 0.5), row(2e-3, 0.9), row(4e-3, None)]
    assert cells.best_rates(rows) == {("gla", "none"): 2e-3}
    assert cells.best_rates([*rows, row(2e-3, None)]) == {("gla", "none"): 1e-3}  # diverged on another replicate
    design = [c for c in cells.list_cells(study(placements=["none"]), 8, 64) if c.name == "gla"]
    assert {c.learning_rate for c in cells.tuned(design, {("gla", "none"): 2e-3})} == {2e-3}


@pytest.mark.parametrize("family", ["blocks", "scratch"])
def test_rows_say_what_was_trained_and_equal_seeds_give_equal_rows(study, family):
    own = study(family=family, placements=["found"])
    (cell,) = [c for c in cells.list_cells(own, 8, 64) if c.name == "gla" and c.equal == "state"]
    rows = cells.run_cells(own, [cell, cells.replace(cell, seed=2), cell])
    assert rows[0] == rows[2] != rows[1]
    assert rows[0]["name"] == "gla" and rows[0]["teacher"] == "0" and rows[0]["seed"] == 1
    assert rows[0]["block_params"] == MIXERS["gla"].n_params(BlockDims(64, 4, 8, 16))
    for task in SCORED:
        assert {task, f"{task}_loss", f"{task}_select"} <= set(rows[0])


def test_a_run_that_diverges_leaves_a_row_without_scores(study, monkeypatch):
    def diverge(*_args, **_options):
        raise TrainingDiverged("the loss must be a finite number")

    monkeypatch.setattr(cells, "train_hybrid", diverge)
    own = study()
    (row,) = cells.run_cells(own, cells.list_cells(own, 8, 64)[:1])
    assert row["name"] == "retnet" and "loss" not in row


def test_a_final_model_is_asked_all_that_notebook_08_asks(study):
    own = study(family="final", placements=["uniform"])
    (row,) = cells.run_cells(own, cells.list_cells(own, 8, 64))
    for task in SCORED:
        for end in ("", "_stage1", "_teacher", "_linear_mean", "_attention_zero", "_before_20", "_behind_20_teacher"):
            assert f"{task}{end}" in row
        assert row[f"{task}_before_0"] == row[f"{task}_behind_0"] == row[task]
        assert row[f"{task}_teacher"] == row[f"{task}_before_0_teacher"]


def test_a_final_row_holds_nothing_of_stage_1_under_the_names_of_the_end(study):
    own = study(family="final", placements=["found"])
    (row,) = cells.run_cells(own, cells.list_cells(own, 8, 64))
    assert row["loss"] != row["stage1_loss"]
    assert not [key for key in row if key.endswith("_select")]


def test_a_block_that_is_equal_in_both_ways_is_trained_once(study, monkeypatch):
    own = study(placements=["none"], blocks=["jetblock", "gla"])
    trained = []
    monkeypatch.setattr(cells, "_run", lambda _study, cell: trained.append(cell) or {"name": cell.name})
    rows = cells.run_cells(own, cells.list_cells(own, 8, 64))
    assert [(row["name"], row["equal"]) for row in rows] == [
        ("jetblock", "state"), ("gla", "state"), ("jetblock", "params"), ("gla", "params"),
    ]  # fmt: skip
    assert [cell.name for cell in trained] == ["jetblock", "gla", "gla"]


def test_contrasts_hold_blocks_and_convolutions(study):
    own = study(family="contrasts", blocks=["gla"], jetblock=["static", "dynamic"], placements=["none"])
    assert [(c.name, c.kind) for c in cells.list_cells(own, 8, 64)] == [
        ("gla", "gla"), ("static", "jetblock"), ("dynamic", "jetblock"),
    ]  # fmt: skip


def test_what_cannot_be_compared_is_refused(study):
    with pytest.raises(ConfigError, match="the same run again: give one"):
        study(family="scratch", teachers=["assets/teacher/0", "assets/teacher/1"])
    with pytest.raises(ConfigError, match="a size must hold state_size = 512 numbers, h1_k2_v3 holds 6"):
        cells.list_cells(study(family="sizes", sizes=["h1_k2_v3"]), 8, 64)
