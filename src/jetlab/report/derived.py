"""Numbers that no stage writes: closed forms of the published shapes, sums over the papers' tables, summaries of ours.

Each function takes the study and returns an Estimate, or None where the study has nothing to say. Its name is the
`metric_key` of a row of paper/claims.csv.
"""

import functools
import math

from jetlab.inference import benchmark, requests, roofline
from jetlab.models import zoo
from jetlab.report.study import SCORED_TASKS, Estimate, Study, mean

K64, K256 = 65_536, 262_144
DERIVED = {}
MMLU_QUESTIONS, MMLU_PRO_QUESTIONS = 14_042, 12_032  # size of the test sets: gives the error that the papers leave out


def _derived(function):
    DERIVED[function.__name__] = function
    return function


def _constant(name: str, compute) -> None:
    DERIVED[name] = lambda study: Estimate(float(compute()))


@functools.cache
def _shape(name: str) -> zoo.Shape:
    return zoo.shape(name)


def _decode(model: str, baseline: str, seq_len: int, device: str = "H100"):
    return lambda: roofline.decode_speedup(_shape(baseline), _shape(model), seq_len, roofline.DEVICES[device])


def _prefill(seq_len: int):
    return lambda: roofline.prefill_speedup(_shape("Qwen3-1.7B-Base"), _shape("Jet-Nemotron-2B"), seq_len)


def _grid_params(heads: int, key: int, value: int) -> float:
    dims = zoo.LinearDims(heads, key, value)
    return zoo.n_params(zoo.with_linear(_shape("Jet-Nemotron-2B"), "gated_deltanet", dims))


def _generation_s(model: str, prompt: int, answer: int) -> float:
    """Least seconds per sequence on an A10G for `prompt` tokens in and `answer` tokens out, at the largest batch."""
    shape, device = _shape(model), roofline.DEVICES["A10G"]
    batch = roofline.largest_batch(shape, prompt + answer, device)
    return sum(requests.floor_s(shape, device, prompt, answer, batch=batch)) / batch


def request_floor(prompt: int, answer: int) -> float:
    """Answers a second that an A10G allows Nemotron Nano 2 9B over those that it allows Qwen3-8B."""
    return _generation_s("Qwen3-8B", prompt, answer) / _generation_s("NVIDIA-Nemotron-Nano-9B-v2", prompt, answer)


def _needs_gib(model: str) -> float:
    return (2 * zoo.n_params(_shape(model)) + roofline.cache_bytes(_shape(model), 131_072)) / 2**30


_constant("decode_speedup_2b_256k", _decode("Jet-Nemotron-2B", "Qwen3-1.7B-Base", K256))
_constant("decode_speedup_2b_64k", _decode("Jet-Nemotron-2B", "Qwen3-1.7B-Base", K64))
_constant("decode_speedup_4b_64k", _decode("Jet-Nemotron-4B", "Qwen3-1.7B-Base", K64))
_constant("decode_speedup_2b_over_qwen2_5_64k", _decode("Jet-Nemotron-2B", "Qwen2.5-1.5B", K64))
_constant("decode_speedup_orin", _decode("Jet-Nemotron-2B", "Qwen2.5-1.5B", K64, "Orin 32GB"))
_constant("decode_speedup_rtx_3090", _decode("Jet-Nemotron-2B", "Qwen2.5-1.5B", K64, "RTX 3090"))
_constant("prefill_speedup_64k", _prefill(K64))
_constant("prefill_speedup_256k", _prefill(K256))
_constant("cache_2b_mib", lambda: roofline.cache_as_reported_mib(_shape("Jet-Nemotron-2B")))
_constant("cache_4b_mib", lambda: roofline.cache_as_reported_mib(_shape("Jet-Nemotron-4B")))
_constant("params_jet_2b_b", lambda: zoo.n_params(_shape("Jet-Nemotron-2B")) / 1e9)
_constant("params_table2_chosen_b", lambda: _grid_params(12, 96, 256) / 1e9)
_constant("params_table2_other_b", lambda: _grid_params(8, 192, 192) / 1e9)
_constant("params_table2_chosen_m", lambda: _grid_params(12, 96, 256) / 1e6)
_constant("params_table2_other_m", lambda: _grid_params(8, 192, 192) / 1e6)
_constant("generator_dim_2b", lambda: _shape("Jet-Nemotron-2B").linear.generator_dim)
_constant("full_layers_4b", lambda: _shape("Jet-Nemotron-4B").count("attention"))
_constant("nano2_speedup_8k_16k", lambda: request_floor(8192, 16384))
_constant("nano2_speedup_1k_8k", lambda: request_floor(1024, 8192))
_constant("nano2_9b_at_128k_gib", lambda: _needs_gib("NVIDIA-Nemotron-Nano-9B-v2"))
_constant("nano2_12b_at_128k_gib", lambda: _needs_gib("NVIDIA-Nemotron-Nano-12B-v2-Base"))
_constant("nano2_params_before_b", lambda: zoo.n_params(_shape("NVIDIA-Nemotron-Nano-12B-v2-Base")) / 1e9)
_constant("nano2_params_after_b", lambda: zoo.n_params(_shape("NVIDIA-Nemotron-Nano-9B-v2")) / 1e9)


@_derived
def cache_bound(study: Study) -> Estimate:
    """Layers with a full cache times key-value heads, baseline over model: the limit at infinite context."""
    baseline, model = _shape("Qwen3-1.7B-Base"), _shape("Jet-Nemotron-2B")
    layers = baseline.count("attention") / model.count("attention")
    return Estimate(layers * baseline.n_kv_heads / model.n_kv_heads)


@_derived
def cache_rows_equal(study: Study) -> Estimate:
    """Rows of the paper's cache column that the closed form gives exactly."""
    rows = study.paper["kv_cache_check"]
    return Estimate(
        float(sum(roofline.cache_as_reported_mib(_shape(row["model"])) == row["reported_mib"] for row in rows))
    )


@_derived
def table2_params_equal(study: Study) -> Estimate:
    """Rows of Table 2 whose parameter count the closed form rounds to."""
    rows = study.paper["table2_hardware_aware_search"]
    counts = [_grid_params(row["n_heads"], row["d_k"], row["d_v"]) / 1e9 for row in rows]
    return Estimate(float(sum(abs(c - row["params_b"]) <= 0.005 for c, row in zip(counts, rows, strict=True))))


@_derived
def table2_floor_spread(study: Study) -> Estimate:
    """Fastest over slowest decoding floor of the nine settings of Table 2, minus 1 (H100, 64K, batch 128)."""
    speeds = []
    for row in study.paper["table2_hardware_aware_search"]:
        dims = zoo.LinearDims(row["n_heads"], row["d_k"], row["d_v"])
        shape = zoo.with_linear(_shape("Jet-Nemotron-2B"), "gated_deltanet", dims)
        speeds.append(roofline.decode_tokens_per_s(shape, K64, roofline.DEVICES["H100"], batch_size=128))
    return Estimate(max(speeds) / min(speeds) - 1)


def _ranks(values: list[float]) -> list[float]:
    """Ranks from 1, ties sharing their mean."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def _spearman(a: list[float], b: list[float]) -> float:
    a, b = _ranks(a), _ranks(b)
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    cross = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return cross / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


@_derived
def cache_explains_more_than_params(study: Study) -> Estimate:
    """|rank correlation of speed with cache size| − |… with parameters|, over the models of Table 3."""
    rows = [r for r in study.paper["table3_mmlu_bbh"] if r["cache_mib_64k"] and r["throughput_tok_s"]]
    speed = [r["throughput_tok_s"] for r in rows]
    by_cache = _spearman(speed, [r["cache_mib_64k"] for r in rows])
    by_params = _spearman(speed, [float(r["params_b"]) for r in rows])
    return Estimate(abs(by_cache) - abs(by_params), None, len(rows))


def _row(study: Study, table: str, column: str, value: str) -> dict:
    return next(row for row in study.paper[table] if row[column] == value)


def _lead(study: Study, metric: str, other: str, questions: int) -> Estimate:
    """Lead of Jet-Nemotron-2B in points; the error is that of two proportions over the size of the test set."""
    ours = _row(study, "table3_mmlu_bbh", "model", "Jet-Nemotron-2B")[metric]
    theirs = _row(study, "table3_mmlu_bbh", "model", other)[metric]
    variances = [p * (100 - p) / questions for p in (ours, theirs)]
    return Estimate(ours - theirs, math.sqrt(sum(variances)), questions)


@_derived
def mmlu_lead_deepseek(study: Study) -> Estimate:
    return _lead(study, "mmlu", "DeepSeek-V3-Small@1.3T", MMLU_QUESTIONS)


@_derived
def mmlu_lead_moonlight(study: Study) -> Estimate:
    return _lead(study, "mmlu", "Moonlight@1.2T", MMLU_QUESTIONS)


@_derived
def mmlu_pro_lead_moonlight(study: Study) -> Estimate:
    return _lead(study, "mmlu_pro", "Moonlight@1.2T", MMLU_PRO_QUESTIONS)


@_derived
def mmlu_lead_qwen2_5(study: Study) -> Estimate:
    return _lead(study, "mmlu", "Qwen2.5-1.5B", MMLU_QUESTIONS)


@_derived
def controlled_data_lead(study: Study) -> Estimate:
    """MMLU points over the starting model continued on the same corpus (Table 12)."""
    ours = _row(study, "table12_controlled_data", "model", "Jet-Nemotron-2B")["mmlu"]
    theirs = _row(study, "table12_controlled_data", "model", "Qwen2.5-1.5B continued")["mmlu"]
    variances = [p * (100 - p) / MMLU_QUESTIONS for p in (ours, theirs)]
    return Estimate(ours - theirs, math.sqrt(sum(variances)), MMLU_QUESTIONS)


@_derived
def math_lead_qwen3(study: Study) -> Estimate:
    jet, qwen = (_row(study, "table4_math", "model", name)["avg"] for name in ("Jet-Nemotron-2B", "Qwen3-1.7B-Base"))
    return Estimate(jet - qwen)


@_derived
def llama_retrieval_mean(study: Study) -> Estimate:
    row = _row(study, "table15_retrieval", "model", "Llama3.2-3B")
    return Estimate((row["fda"] + row["swde"] + row["squad"]) / 3)


@_derived
def search_gpu_hours(study: Study) -> Estimate:
    rows = [r for r in study.paper["table10_costs_2b"] if r["stage"].startswith("PostNAS")]
    return Estimate(float(sum(r["h100_gpu_hours"] for r in rows)))


@_derived
def nano2_reasoning_lead(study: Study) -> Estimate:
    """Mean lead of the 9B over Qwen3-8B in points, over the benchmarks that print both."""
    rows = study.paper["nano2_accuracy_reasoning"]
    leads = [row["nano_9b_v2"] - row["qwen3_8b"] for row in rows if None not in (row["nano_9b_v2"], row["qwen3_8b"])]
    return Estimate(sum(leads) / len(leads), None, len(leads))


def _fig3_gain(metric: str):
    def gain(study: Study) -> Estimate:
        rows = study.paper["fig3_postnas_breakdown"]
        return Estimate(rows[-1][metric] - rows[0][metric])

    return gain


def _fig5b(method: str):
    def read_off(study: Study) -> Estimate:
        rows = study.paper["fig5b_placement_vs_uniform_digitised"]
        row = next(r for r in rows if r["method"] == method and r["n_full_attention_layers"] == 2)
        return Estimate(row["mmlu_acc_approx"], 0.25)  # read off a picture: about ±0.5 at most, taken as two errors

    return read_off


DERIVED |= {f"fig3_gain_{m}": _fig3_gain(m) for m in ("mmlu", "math", "retrieval", "commonsense")}
DERIVED |= {"fig5b_postnas_2": _fig5b("PostNAS"), "fig5b_uniform_2": _fig5b("Uniform")}


# --- summaries of this study's own results


def _importance(study: Study) -> dict[tuple, dict[int, float]]:
    """(teacher, task) -> layer -> score when that layer alone keeps full attention."""
    scores: dict[tuple, dict[int, float]] = {}
    for row in study.tables["placement"]["importance"]:
        if row["task"] in SCORED_TASKS:
            scores.setdefault((row["teacher"], row["task"]), {})[int(row["layer"])] = float(row["score"])
    return scores


def _strong_layers(scores: dict[int, float]) -> list[int]:
    """Layers that bring more than half of the best layer's gain over the median layer."""
    ordered = sorted(scores.values())
    middle = ordered[len(ordered) // 2]
    return [layer for layer, score in scores.items() if score > middle + 0.5 * (ordered[-1] - middle)]


def _spread(values: list[float]) -> Estimate:
    count = len(values)
    average = sum(values) / count
    if count < 2:
        return Estimate(average, None, count)
    return Estimate(average, math.sqrt(sum((v - average) ** 2 for v in values) / (count - 1) / count), count)


@_derived
def few_layers_matter(study: Study) -> Estimate:
    """Share of layers with more than half of the best layer's gain; mean over teachers and scored tasks."""
    return _spread([len(_strong_layers(s)) / len(s) for s in _importance(study).values()])


@_derived
def distinct_best_layers(study: Study) -> Estimate:
    """Different best layers among the scored tasks of a teacher; mean and spread over teachers."""
    best: dict = {}
    for (teacher, _), scores in _importance(study).items():
        best.setdefault(teacher, set()).add(max(scores, key=lambda layer: (scores[layer], -layer)))
    return _spread([len(layers) for layers in best.values()])


@_derived
def math_needs_more_layers(study: Study) -> Estimate:
    """Strong layers of math minus the mean over the other scored tasks; mean over teachers."""
    counts: dict = {}
    for (teacher, task), scores in _importance(study).items():
        counts.setdefault(teacher, {})[task] = len(_strong_layers(scores))
    gaps = []
    for by_task in counts.values():
        others = [count for task, count in by_task.items() if task != "math"]
        if "math" in by_task and others:
            gaps.append(by_task["math"] - sum(others) / len(others))
    return _spread(gaps) if gaps else None


def _mean_difference(study: Study, stage: str, first: str, second: str) -> Estimate | None:
    """Mean over the scored tasks of `{task}_{first}` − `{task}_{second}`; None where no task has both."""
    pairs = [(study.get(stage, f"{t}_{first}"), study.get(stage, f"{t}_{second}")) for t in SCORED_TASKS]
    differences = [a - b for a, b in pairs if a and b]
    return mean(differences) if differences else None


def _lead_of_block(kind: str, other: str):
    return lambda study: _mean_difference(study, "blocks", kind, other)


DERIVED |= {
    f"{kind}_over_{other}": _lead_of_block(kind, other)
    for kind, other in (
        ("jetblock", "gated_deltanet"),
        ("jetblock", "mamba2"),
        ("gated_deltanet", "gla"),
        ("gated_deltanet", "deltanet"),
        ("gla", "retnet"),
    )
}


@_derived
def gated_deltanet_over_best_other(study: Study) -> Estimate | None:
    """Mean lead of Gated DeltaNet over the best of the other blocks that the paper trained; None unless all were here.

    RWKV7 is left out: the paper's Table 1 gives its speed alone. The best of four noisy means is the one that luck
    raised most, so the lead errs towards too small.
    """
    leads = [
        _mean_difference(study, "blocks", "gated_deltanet", kind) for kind in ("retnet", "mamba2", "gla", "deltanet")
    ]
    return None if None in leads else min(leads, key=lambda lead: lead.value)


@_derived
def dynamic_over_static(study: Study) -> Estimate | None:
    """Mean over the scored tasks, by the paired differences where the stage wrote them."""
    paired = [e for t in SCORED_TASKS if (e := study.get("jetblock", f"{t}_dynamic_minus_static"))]
    return mean(paired) if paired else _mean_difference(study, "jetblock", "dynamic", "static")


@_derived
def dimensions_matter_on_math(study: Study) -> Estimate | None:
    """Best minus worst math score of the grid at equal state size, with the error of that difference."""
    rows = [r for r in study.tables["hardware"]["grid"] if r.get("math") is not None]
    if len(rows) < 2:
        return None
    best, worst = max(rows, key=lambda r: r["math"]), min(rows, key=lambda r: r["math"])
    return Estimate(best["math"], best.get("math_se")) - Estimate(worst["math"], worst.get("math_se"))


@_derived
def stage1_below_teacher(study: Study) -> Estimate | None:
    """Mean loss of accuracy after stage 1, whose MLPs are frozen: teacher minus stage 1 over the scored tasks."""
    pairs = [(study.get("evaluate", f"{t}_teacher"), study.get("distill", f"{t}_stage1")) for t in SCORED_TASKS]
    differences = [a - b for a, b in pairs if a and b]
    return mean(differences) if differences else None


@_derived
def stage2_over_stage1(study: Study) -> Estimate | None:
    return _mean_difference(study, "distill", "stage2", "stage1")


@_derived
def hybrid_over_teacher(study: Study) -> Estimate | None:
    return _mean_difference(study, "evaluate", "hybrid", "teacher")


@_derived
def hybrid_over_uniform(study: Study) -> Estimate | None:
    """Mean over the scored tasks, by the paired differences where the stage wrote them."""
    paired = [e for t in SCORED_TASKS if (e := study.get("evaluate", f"{t}_hybrid_minus_uniform"))]
    return mean(paired) if paired else _mean_difference(study, "evaluate", "hybrid", "uniform")


@_derived
def nano2_final_over_original(study: Study) -> Estimate | None:
    return _mean_difference(study, "nano2", "final", "original")


@_derived
def nano2_final_over_pruned(study: Study) -> Estimate | None:
    return _mean_difference(study, "nano2", "final", "pruned")


@_derived
def keys_and_values_take_more_time_than_weights(study: Study) -> Estimate | None:
    """Part of a decoding step's time on an H100 that keys and values take, minus the part of the weights."""
    keys, weights = (study.get("hardware", f"h100_{cause}_share_of_time") for cause in ("keys_and_values", "weights"))
    return None if None in (keys, weights) else keys - weights


def speedups(study: Study, phase: str) -> dict[int, Estimate]:
    """Context -> tokens/s of the hybrid over those of the teacher, measured in the same run."""
    ratios = benchmark.speedups(study.tables["throughput"]["throughput"], phase, "hybrid", "teacher")
    return {context: Estimate(ratio, spread) for context, (ratio, spread) in ratios.items()}


def _at_ends(phase: str):
    def growth(study: Study) -> Estimate | None:
        ratios = list(speedups(study, phase).values())
        return ratios[-1] - ratios[0] if len(ratios) > 1 else None

    return growth


def _longest(phase: str):
    def ratio(study: Study) -> Estimate | None:
        ratios = list(speedups(study, phase).values())
        return ratios[-1] if ratios else None

    return ratio


DERIVED |= {
    "measured_decode_speedup": _longest("decode"),
    "measured_prefill_speedup": _longest("prefill"),
    "measured_decode_speedup_growth": _at_ends("decode"),
}
