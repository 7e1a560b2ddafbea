"""The report computes its verdicts from results/ and paper/: they flip when numbers flip, and nothing is made up."""

import csv
import json
import re
import xml.etree.ElementTree as ET

import pytest

from jetlab import report
from jetlab.paths import ROOT, MissingInput
from jetlab.report import document, figures, nano2
from jetlab.report.claims import AGREES, CANNOT_TELL, DISAGREES, NOT_TESTED, measure
from jetlab.report.derived import DERIVED, speedups
from jetlab.report.study import FILES, SCORED_TASKS, Estimate

TASKS = (*SCORED_TASKS, "facts", "text")


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_estimates(path, values):
    write_csv(path, [{"key": key, "value": value, "se": 0.01, "n": 500} for key, value in values.items()])


@pytest.fixture
def tree(tmp_path):
    """A results tree of plausible shape: 8 layers, one kept, two teachers."""
    root = tmp_path / "results"

    def write_json(name, data):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(data))

    write_json("teacher/metrics.json", {f"{t}_accuracy_t{i}": 0.97 for t in TASKS for i in (0, 1)})
    write_estimates(
        root / "teacher/estimates.csv",
        {f"{t}_t{i}": 0.97 for t in TASKS for i in (0, 1)} | {f"{t}_chance": 0.1 for t in TASKS},
    )
    write_estimates(
        root / "supernet/estimates.csv",
        {f"{t}_{s}_t{i}": v for t in TASKS for s, v in (("all_linear", 0.4), ("all_full", 0.95)) for i in (0, 1)},
    )
    steps = ((1, "local"), (2, "path"))
    losses = [
        {"supernet": f"t{i}", "step": s, "phase": p, "loss": 1 / (s + 1), "tokens": 100 * s}
        for i in (0, 1)
        for s, p in steps
    ]
    write_csv(root / "supernet/loss.csv", losses)
    placements = {"found": 0.9, "uniform": 0.6, "random": 0.5, "all_linear": 0.4, "teacher": 0.97, "exhaustive": 0.91}
    placements |= {"found_minus_uniform": 0.3, "found_minus_random": 0.4}
    write_estimates(
        root / "placement/estimates.csv",
        {f"{t}_k1_{p}{s}": v for t in TASKS for p, v in placements.items() for s in ("", "_t0", "_t1")},
    )
    best = {"knowledge": 6, "math": 3, "retrieval": 2, "code": 2}
    write_csv(
        root / "placement/importance.csv",
        [
            {"teacher": i, "task": t, "layer": layer, "score": 0.9 if layer == best[t] else 0.4 + 0.01 * layer}
            for i in (0, 1)
            for t in SCORED_TASKS
            for layer in range(8)
        ],
    )
    write_json("placement/choice.json", {"layers": [2], "budget": 1, "n_layers": 8})
    write_csv(
        root / "placement/selectors.csv",
        [
            {"teacher": i, "task": t, "budget": k, "selector": s, "placements": 8, "tokens": 900}
            | {"regret": None if k == 3 else 0.01 if t == "all" else 5.0}
            for i in (0, 1)
            for t in (*SCORED_TASKS, "all")
            for k in (1, 3)  # of budget 3 the best is not known
            for s in ("beam", "uniform")
        ],
    )
    kinds = {
        "retnet": 0.50,
        "mamba2": 0.60,
        "gla": 0.70,
        "deltanet": 0.65,
        "gated_deltanet": 0.80,
        "jetblock": 0.81,
        "rwkv7": 0.90,
    }
    write_estimates(
        root / "blocks/estimates.csv",
        {f"{t}_{k}": v for t in SCORED_TASKS for k, v in kinds.items()}
        | {f"{k}_{what}": n for k in kinds for what, n in (("params", 12000), ("state_bytes", 8192))},
    )
    write_estimates(root / "block_seeds/estimates.csv", {"fresh_none_mean_jetblock_minus_gated_deltanet": 0.0})
    write_json("blocks/choice.json", {"block": "jetblock", "margin": 0.01, "se": 0.01})
    variants = {"none": 0.6, "static": 0.8, "dynamic": 0.81, "dynamic_minus_static": 0.01}
    write_estimates(
        root / "jetblock/estimates.csv",
        {f"{t}_{v}": x for t in SCORED_TASKS for v, x in variants.items()}
        | {f"{v}_params": 19000 for v in ("none", "static", "dynamic")},
    )
    write_csv(
        root / "hardware/grid.csv",
        [
            {"name": name, "params": 5000, "state_bytes": 8192}
            | {f"{t}{s}": v for t in ("retrieval", "math") for s, v in (("", score), ("_se", 0.01))}
            for name, score in (("4x16x16", 0.7), ("2x16x32", 0.8))
        ],
    )
    write_json("hardware/choice.json", {"name": "2x16x32"})
    shares = {"keys_and_values": 0.3, "states": 0.4, "weights": 0.01}
    write_estimates(root / "hardware/estimates.csv", {f"h100_{cause}_share_of_time": x for cause, x in shares.items()})
    write_estimates(
        root / "distill/estimates.csv", {f"{t}_{s}": v for t in TASKS for s, v in (("stage1", 0.9), ("stage2", 0.94))}
    )
    write_estimates(
        root / "evaluate/estimates.csv",
        {f"{t}_{m}": v for t in TASKS for m, v in (("teacher", 0.97), ("hybrid", 0.94), ("uniform", 0.6))},
    )
    write_csv(
        root / "evaluate/axes.csv",
        [
            {"axis": a, "model": m, "where": w, "score": 50.0, "se": None if w == "printed" else 1.0}
            for a in ("math", "retrieval")
            for m, w in (("Qwen2.5-1.5B", "printed"), ("found", "ours"))
        ],
    )
    write_csv(root / "evaluate/samples.csv", [{"task": "math", "prompt": "a=1 | b=2", "answer": "3", "hybrid": "3"}])
    write_csv(
        root / "throughput/throughput.csv",
        [
            {"model": m, "phase": p, "context": n, "tokens_per_s": v, "tokens_per_s_sd": 2.0, "device": "CPU"}
            for p in ("decode", "prefill")
            for n, pair in ((256, (100.0, 90.0)), (1024, (60.0, 90.0)))
            for m, v in zip(("teacher", "hybrid"), pair, strict=True)
        ],
    )
    write_csv(root / "throughput/roofline.csv", [{"model": "Jet-Nemotron-2B", "context": 65536, "ratio": 39.0}])
    write_nano2(root / "nano2")
    return root


def write_nano2(folder):
    """A hybrid of five layers, two of which go; two random rivals here, more in the record of two models."""
    models = {"original": 0.9, "pruned": 0.6, "final": 0.85, "random_0": 0.3, "random_1": 0.5}
    models |= {"narrowed": 0.8}
    requests = {"8192_16384": 8.3, "1024_8192": 3.4}
    numbers = {f"{t}_{m}": v for t in SCORED_TASKS for m, v in models.items()}
    numbers |= {f"record_request_{r}_{memory}": v for r, v in requests.items() for memory in ("card", "all")}
    numbers |= {f"record_request_{r}_card_{m}_fraction_of_floor": 0.7 for r in requests for m in ("nano", "qwen")}
    leads = {"random": 0.3, "attention_kept": 0.01, "narrowed_random": -0.1}
    numbers |= {f"record_short_over_{rival}": lead for rival, lead in leads.items()}
    numbers |= {f"record_over_{rival}": lead / 2 for rival, lead in leads.items()}
    write_estimates(folder / "estimates.csv", numbers)
    facts = {"record_fits_9b_decode_128k": 1.0, "record_fits_12b_decode_128k": 0.0}
    with (folder / "estimates.csv").open("a") as file:
        file.writelines(f"{key},{value},,\n" for key, value in facts.items())
    shape = {"n_layers": 3, "d_model": 64, "d_ff": 160, "n_mamba_heads": 8, "n_params": 400000, "bytes": 980000}
    shape |= {"logit_error": 3.2, "accuracy": 0.8, "se": 0.01}
    steps = {"candidate": "candidate 1", "winner": "winner", "random": "random 0"}
    write_csv(
        folder / "trials.csv",
        [{"of": m, "step": s, "name": name} | shape for m in ("m0", "m1") for s, name in steps.items()],
    )
    layers = [("mamba2", 5.0, None), ("mlp", 1.0, 2), ("attention", 9.0, None), ("mlp", 0.5, 1), ("mamba2", 2.0, 3)]
    write_csv(
        folder / "layers.csv",
        [
            {"of": m, "layer": i, "kind": kind, "error": error, "removed_as": place}
            for m in ("m0", "m1")
            for i, (kind, error, place) in enumerate(layers)
        ],
    )
    sizes = {("Jet-Nemotron", "teacher"): 2000000, ("Jet-Nemotron", "hybrid"): 1000000}
    sizes |= {("Nemotron Nano 2", "original"): 1500000, ("Nemotron Nano 2", "pruned"): 980000}
    write_csv(
        folder / "roads.csv",
        [
            {"road": road, "model": model, "n_params": 400000, "weight_bytes": 800000, "kv_bytes": 9, "state_bytes": 9}
            | {"bytes": n, "bytes_per_token": float(n)}
            | {t: "0.850 ± 0.010" for t in SCORED_TASKS}
            for (road, model), n in sizes.items()
        ],
    )


def judged(tree, claim_id):
    return next(item for item in report.judge_all(report.load(tree)) if item.claim.id == claim_id)


def set_values(path, **values):
    rows = list(csv.DictReader(path.open()))
    for row in rows:
        row["value"] = values.get(row["key"], row["value"])
    write_csv(path, rows)


@pytest.mark.parametrize(
    ("value", "se", "rule", "paper", "expected"),
    [
        pytest.param(0.10, 0.04, "above 0", None, AGREES, id="beyond-two-errors"),
        pytest.param(0.10, 0.05, "above 0", None, CANNOT_TELL, id="exactly-two-errors"),
        pytest.param(-0.10, 0.04, "above 0", None, DISAGREES, id="beyond-on-the-other-side"),
        pytest.param(0.0, None, "above 0", None, DISAGREES, id="equal-is-not-above"),
        pytest.param(0.01, 0.004, "within 0.02", None, AGREES, id="small-for-certain"),
        pytest.param(0.01, 0.02, "within 0.02", None, CANNOT_TELL, id="no-difference-seen-is-not-no-difference"),
        pytest.param(50.8, None, "near 0.1", 53.6, AGREES, id="within-a-tenth-of-the-paper"),
        pytest.param(39.0, None, "near 0.1", 47.3, DISAGREES, id="not-within-a-tenth"),
        pytest.param(9.0, None, "near 0", 9.0, AGREES, id="exactly-equal"),
        pytest.param(0.0, 0.0, "above 0", None, CANNOT_TELL, id="both-scores-at-the-ceiling"),
        pytest.param(1.0, 0.1, "untested", None, NOT_TESTED, id="declared-out-of-reach"),
    ],
)
def test_a_verdict_needs_two_standard_errors(value, se, rule, paper, expected):
    assert report.verdict(Estimate(value, se), rule, paper) == expected


@pytest.mark.parametrize(("n", "expected"), [(None, AGREES), (6, CANNOT_TELL), (200, AGREES)])
def test_few_runs_need_more_than_two_standard_errors(n, expected):
    assert report.verdict(Estimate(0.022, 0.01, n), "above 0") == expected  # t is 2.57 with 5 degrees of freedom


@pytest.mark.parametrize("rule", ["bigger 0", "above", "above much"])
def test_an_unreadable_rule_is_refused(rule):
    with pytest.raises(ValueError, match="a rule"):
        report.verdict(Estimate(1.0), rule)


def test_verdicts_flip_when_the_numbers_flip(tree):
    path = tree / "placement/estimates.csv"
    assert judged(tree, "placement-retrieval").verdict == AGREES

    set_values(path, retrieval_k1_found_minus_uniform=0.019)
    assert judged(tree, "placement-retrieval").verdict == CANNOT_TELL
    set_values(path, retrieval_k1_found_minus_uniform=-0.3)
    assert judged(tree, "placement-retrieval").verdict == DISAGREES


def test_a_difference_adds_errors_in_squares(tree):
    ours = judged(tree, "choice-needs-softmax").ours
    assert ours.value == pytest.approx(0.55)
    assert ours.se == pytest.approx(0.01 * 2**0.5)
    assert ours.n == 500


def test_a_gain_is_in_the_unit_of_its_claim(tree):
    ours = judged(tree, "placement-retrieval").ours
    assert (ours.value, ours.se, ours.n) == (pytest.approx(30), pytest.approx(1.0), 500)  # points


def test_the_importance_map_is_summarised_as_the_claims_ask(tree):
    study = report.load(tree)
    assert measure("few_layers_matter", study).value == pytest.approx(1 / 8)
    distinct = measure("distinct_best_layers", study)
    assert (distinct.value, distinct.se, distinct.n) == (3, 0, 2)  # retrieval and code share a layer, for both teachers
    assert measure("math_needs_more_layers", study).value == 0


def test_a_claim_that_no_stage_measured_is_not_judged(tree):
    assert judged(tree, "static-qk").verdict == NOT_TESTED  # the variant was not trained


def test_claims_about_two_blocks_are_decided_by_their_mean_over_the_scored_tasks(tree):
    lead = judged(tree, "gating-with-delta-rule").ours
    assert lead.value == pytest.approx(10)  # points
    assert lead.se == pytest.approx(1.0 * (2 / 4) ** 0.5)  # four tasks, each a difference of two errors of 0.01
    for claim_id in ("gating-with-delta-rule", "delta-rule-with-gating", "gating-over-fixed-decay"):
        assert judged(tree, claim_id).verdict == AGREES
    assert judged(tree, "jetblock-over-mamba2").verdict == AGREES
    assert judged(tree, "jetblock-better").verdict == CANNOT_TELL

    set_values(tree / "blocks/estimates.csv", **{f"{task}_retnet": 0.75 for task in SCORED_TASKS})
    assert judged(tree, "gating-over-fixed-decay").verdict == DISAGREES


def test_the_best_published_block_leads_the_best_of_the_others_that_the_paper_trained(tree):
    path = tree / "blocks/estimates.csv"
    assert judged(tree, "gated-deltanet-best").ours.value == pytest.approx(10)  # over GLA; RWKV7 is not among them

    set_values(path, **{f"{task}_deltanet": 0.79 for task in SCORED_TASKS})
    assert judged(tree, "gated-deltanet-best").verdict == CANNOT_TELL
    set_values(path, **{f"{task}_mamba2": 0.95 for task in SCORED_TASKS})
    assert judged(tree, "gated-deltanet-best").verdict == DISAGREES

    rows = [row for row in csv.DictReader(path.open()) if not row["key"].endswith("_retnet")]
    write_csv(path, rows)
    assert judged(tree, "gated-deltanet-best").verdict == NOT_TESTED  # best of all but one is another claim


@pytest.mark.parametrize(
    ("claim_id", "block", "other"),
    [
        ("gated-deltanet-best", "Gated DeltaNet", "GLA"),
        ("gating-with-delta-rule", "Gated DeltaNet", "GLA"),
        ("delta-rule-with-gating", "Gated DeltaNet", "DeltaNet"),
        ("gating-over-fixed-decay", "GLA", "RetNet"),
    ],
)
def test_the_paper_value_of_two_blocks_is_their_mean_difference_in_table_1(tree, claim_id, block, other):
    printed = {row["block"]: row for row in report.load(tree).paper["table1_linear_blocks"]}
    leads = [printed[block][column] - printed[other][column] for column in ("mmlu", "math", "retrieval")]
    assert judged(tree, claim_id).claim.paper_value == pytest.approx(sum(leads) / 3, abs=0.05)  # printed to a tenth


def test_the_paper_value_of_the_jetblock_over_mamba2_is_their_mean_difference_in_the_picture(tree):
    rows = report.load(tree).paper["fig_jetblock_vs_mamba2"]
    leads = [row["jetblock"] - row["mamba2"] for row in rows if row["metric"] != "Commonsense"]
    assert judged(tree, "jetblock-over-mamba2").claim.paper_value == pytest.approx(sum(leads) / 3, abs=0.05)


def test_blocks_stand_in_the_order_in_which_the_notebook_teaches_them(tree):
    taught = ["retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "jetblock", "rwkv7"]
    assert figures.block_kinds(report.load(tree)) == taught


def test_measured_speedups_compare_models_of_the_same_run(tree):
    ratios = speedups(report.load(tree), "decode")
    assert [ratios[n].value for n in (256, 1024)] == [0.9, 1.5]
    assert judged(tree, "speedup-here").verdict == AGREES
    assert judged(tree, "speedup-grows").verdict == AGREES


def test_pruning_is_judged_by_means_over_the_scored_tasks(tree):
    path = tree / "nano2/estimates.csv"
    kept = judged(tree, "nano2-kept").ours
    assert kept.value == pytest.approx(-5)  # points
    assert kept.se == pytest.approx(1.0 * (2 / 4) ** 0.5)
    assert judged(tree, "nano2-distillation").ours.value == pytest.approx(0.25)
    assert judged(tree, "nano2-kept").verdict == DISAGREES

    set_values(path, **{f"{t}_final": 0.9 for t in SCORED_TASKS})
    assert judged(tree, "nano2-kept").verdict == AGREES


def test_what_importance_is_worth_is_judged_by_each_kind_of_rival(tree):
    assert judged(tree, "nano2-importance").verdict == AGREES
    assert judged(tree, "nano2-importance-attention-kept").verdict == CANNOT_TELL  # one error above nothing
    assert judged(tree, "nano2-importance-widths").verdict == DISAGREES
    assert judged(tree, "nano2-importance-longer").ours.value == pytest.approx(0.15)
    leads = nano2.leads(report.load(tree)).rows
    assert leads[0][2] == "0.150 ± 0.010"
    assert [row[1] for row in leads] == ["0.300 ± 0.010", "0.010 ± 0.010", "-0.100 ± 0.010"]


def test_the_gpu_decides_which_model_fits_the_card(tree):
    assert judged(tree, "nano2-fits-h200").verdict == judged(tree, "nano2-12b-does-not-h200").verdict == AGREES
    assert judged(tree, "nano2-6.3-h200").verdict == DISAGREES  # faster than printed is another number, too
    assert judged(tree, "nano2-3.3-h200").verdict == AGREES

    set_values(tree / "nano2/estimates.csv", record_fits_9b_decode_128k=0.0, record_fits_12b_decode_128k=1.0)
    assert judged(tree, "nano2-fits-h200").verdict == judged(tree, "nano2-12b-does-not-h200").verdict == DISAGREES


def test_the_printed_accuracies_give_the_limit_of_what_pruning_may_lose(tree):
    rows = report.load(tree).paper["nano2_accuracy_base"]
    losses = [row["nano_9b_base"] - row["nano_12b_base"] for row in rows if row["nano_9b_base"] is not None]
    claim = judged(tree, "nano2-kept").claim
    assert judged(tree, "nano2-accuracy-printed").ours.n == 9
    assert len(losses) == 6  # as the reasons say
    assert claim.paper_value == pytest.approx(sum(losses) / 6, abs=0.05)  # printed to a tenth
    assert claim.rule == f"above {claim.paper_value}"


def test_the_section_on_pruning_counts_what_the_winner_gave_up(tree):
    text = nano2.pruned(report.load(tree))
    assert "keeps 3 of 5 layers (given up: 2 MLP)" in text  # the third in the order of removal stays
    assert "from 1 500 000 to 980 000 bytes; the hybrid takes 1 000 000" in text
    assert "layer 2 (attention, counted from 0)" in text

    layers = list(csv.DictReader((tree / "nano2/layers.csv").open()))
    write_csv(tree / "nano2/layers.csv", [row | {"kind": "mamba2"} if row["layer"] == "1" else row for row in layers])
    assert "given up: 1 MLP, 1 Mamba2" in nano2.pruned(report.load(tree))


def test_the_section_on_pruning_shows_the_first_model_and_every_draw(tree):
    study = report.load(tree)
    assert [row[0] for row in nano2.trials(study).rows] == ["candidate 1", "winner", "random 0"]
    scores = nano2.scores(study)
    assert scores.header[-2:] == ("random 0, distilled", "random 1, distilled")
    assert scores.rows[0][1:] == tuple(f"{x:.3f} ± 0.010" for x in (0.9, 0.6, 0.85, 0.8, 0.3, 0.5))
    assert nano2.two_roads(study).header[-4:] == SCORED_TASKS


def test_only_the_smaller_published_model_leaves_room_in_the_budget():
    large, small = ({"model": row[0], "left": float(row[-1])} for row in nano2.memory().rows)
    assert nano2.memory().header[-1] == "left of 19.66 [GiB]"
    assert large["model"] == "12B" and large["left"] < 0 < small["left"]


def test_the_papers_accuracies_are_printed_as_they_stand(tree, tmp_path):
    report.write(report.load(tree), tmp_path / "out")
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    assert "| AIME24 | 81.9 | 85.42 | 75.83 | 81.53 |" in lines
    assert "| RULER-128K | 82.22 | 84.74 | – | 80.7 |" in lines
    request = next(line for line in lines if line.startswith("| 8 192 | 16 384 | 6.3 |"))
    assert "8.300 ± 0.010" in request


@pytest.mark.parametrize(
    ("claim_id", "expected"),
    [
        ("decode-256k", AGREES),
        ("article-swap-2b", DISAGREES),
        ("article-swap-4b", DISAGREES),
        ("article-params-m", DISAGREES),
        ("params-chosen", AGREES),
        ("article-120b", DISAGREES),
        ("article-49", DISAGREES),
        ("cache-2b", DISAGREES),
        ("cache-4b", AGREES),
        ("cache-column", DISAGREES),
        ("cache-image-swap", DISAGREES),
        ("beats-deepseek", AGREES),
        ("beats-moonlight", CANNOT_TELL),
        ("prefill-256k", AGREES),
        ("nano2-fits", AGREES),
        ("nano2-12b-does-not", AGREES),
        ("nano2-accuracy-printed", AGREES),
        ("window-is-enough", NOT_TESTED),
    ],
)
def test_claims_that_arithmetic_decides(tree, claim_id, expected):
    assert judged(tree, claim_id).verdict == expected


def test_every_claim_can_be_judged_and_says_why():
    kinds = {"arithmetic", "tables", "none", *FILES}
    for claim in report.read_claims():
        assert claim.kind in kinds, claim.id
        assert claim.reason and claim.source, claim.id
        assert (claim.rule == "untested") == (claim.metric_key == ""), claim.id
        if "/" not in claim.metric_key and claim.metric_key:
            assert claim.metric_key in DERIVED, claim.id
    used = {claim.metric_key for claim in report.read_claims()}
    assert set(DERIVED) <= used


@pytest.mark.parametrize(("stage", "file"), [(stage, file) for stage, files in FILES.items() for file in files])
def test_a_missing_file_names_the_stage_to_run(tree, stage, file):
    (tree / stage / file).unlink()
    with pytest.raises(MissingInput, match=f"written by stage {stage}; run `dvc repro {stage}`"):
        report.load(tree)


def test_extra_keys_and_files_change_nothing_but_are_kept(tree):
    write_csv(tree / "teacher/loss.csv", [{"step": 1, "loss": 2.0}])
    assert report.load(tree).tables["teacher"]["loss"] == [{"step": 1, "loss": 2.0}]


def test_an_estimates_file_without_its_columns_is_refused(tree):
    write_csv(tree / "evaluate/estimates.csv", [{"name": "retrieval_hybrid", "score": 1}])
    with pytest.raises(ValueError, match="must have the columns key,value,se,n, got name,score"):
        report.load(tree)


def test_the_report_is_written_twice_with_the_same_bytes(tree, tmp_path):
    study = report.load(tree)
    for name in ("first", "second"):
        report.write(study, tmp_path / name)
    first = {p.relative_to(tmp_path / "first"): p.read_bytes() for p in (tmp_path / "first").rglob("*") if p.is_file()}
    second = {
        p.relative_to(tmp_path / "second"): p.read_bytes() for p in (tmp_path / "second").rglob("*") if p.is_file()
    }
    assert first == second
    assert len(first) == 16  # two pages, fourteen figures


def test_the_pages_hold_every_claim_and_load_nothing(tree, tmp_path):
    report.write(report.load(tree), tmp_path / "out")
    markdown = (tmp_path / "out/report.md").read_text()
    page = (tmp_path / "out/index.html").read_text()

    for name in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (tmp_path / "out" / name).exists()
    for claim in report.read_claims():
        assert claim.claim in markdown
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#|notebooks/)', page)
    assert "@import" not in page and "url(http" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    ET.fromstring(re.sub(r"<(meta|!doctype)[^>]*>", "", page))  # every element closed
    assert str(tmp_path) not in markdown + page


def test_a_table_keeps_its_columns_when_a_cell_holds_a_bar(tree, tmp_path):
    report.write(report.load(tree), tmp_path / "out")
    lines = [line for line in (tmp_path / "out/report.md").read_text().splitlines() if "a=1" in line]
    assert lines and all(r"a=1 \| b=2" in line for line in lines)


def test_notebooks_are_copied_and_a_large_one_is_refused(tree, tmp_path):
    for stage in FILES:
        (tree / stage / "notebook.ipynb").write_text("{}")
    copies = report.publish_notebooks(tree, tmp_path / "out", committed=tmp_path / "none")
    assert list(copies)[:2] == ["01_teacher", "02_supernet"]
    assert sorted(p.stem for p in (tmp_path / "out/notebooks").iterdir()) == sorted(copies)

    (tree / "blocks/notebook.ipynb").write_text("x" * 300_001)
    with pytest.raises(ValueError, match="must stay within 300,000 bytes, got 300,001"):
        report.publish_notebooks(tree, tmp_path / "other", committed=tmp_path / "none")
    assert not (tmp_path / "other").exists()


def test_in_a_fresh_clone_the_committed_notebooks_stand_in(tree, tmp_path):
    committed = tmp_path / "reports/notebooks"
    for stage in FILES:
        (tree / stage / "notebook.ipynb").write_text("{}")
    report.publish_notebooks(tree, tmp_path / "reports", committed=committed)
    for stage in FILES:
        (tree / stage / "notebook.ipynb").unlink()

    copies = report.publish_notebooks(tree, tmp_path / "scratch", committed=committed)
    assert copies["01_teacher"].endswith("reports/notebooks/01_teacher.ipynb")
    with pytest.raises(MissingInput, match="written by stage teacher"):
        report.publish_notebooks(tree, tmp_path / "scratch", committed=tmp_path / "none")


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.91234, 0.0123), "0.912 ± 0.012"),
        (Estimate(1234.5, 56.7), "1234.5 ± 56.7"),
        (Estimate(50.84), "50.8"),
        (Estimate(1_964_806_208), "1 964 806 208"),
        (None, "–"),
    ],
)
def test_numbers_show_as_many_digits_as_their_error_leaves(estimate, text):
    assert document.with_error(estimate) == text


def test_the_readme_shows_the_verdicts_of_the_committed_results():
    paper = "Jet-Nemotron (arXiv:2508.15884), "  # left out where it is the source
    items = report.judge_all(report.load())
    judged = {f"{item.claim.claim} ({item.claim.source.removeprefix(paper)})": item for item in items}
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("results:begin")[1].split("results:end")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line[:1] == "|"][2:]
    assert rows
    for name, printed, ours, verdict in rows:
        item = judged[name]
        if item.claim.kind != "throughput":  # measured anew, and with other noise, by whoever runs the study
            assert [printed, ours, verdict] == [
                document.paper_value(item),
                document.with_error(item.ours),
                item.verdict,
            ], name


def test_results_of_two_profiles_are_refused(tree):
    for stage, name in (("teacher", "laptop"), ("supernet", "laptop"), ("blocks", "node8")):
        file = tree / stage / "metrics.json"
        numbers = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(numbers | {"profile": name}))
    with pytest.raises(ValueError, match=r"one profile, got laptop: teacher, supernet; node8: blocks; run `dvc repro`"):
        report.load(tree)
    (tree / "blocks/metrics.json").write_text(json.dumps({"profile": "laptop"}))
    study = report.load(tree)
    assert study.profile == "laptop" and "profile" not in study.metrics["teacher"]
