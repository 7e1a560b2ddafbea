"""The pictures of the report, one function each, drawn from the study alone."""

from itertools import accumulate

from matplotlib.patches import FancyBboxPatch

from jetlab import plots
from jetlab.inference import roofline
from jetlab.models import zoo
from jetlab.report.derived import speedups
from jetlab.report.study import SCORED_TASKS, Study, mean

PATH = (
    ("teacher", "full attention"),
    ("supernet", "two paths a layer"),
    ("placement", "which layers stay"),
    ("blocks", "which linear block"),
    ("jetblock", "which convolution"),
    ("hardware", "which widths"),
    ("distill", "two stages"),
    ("evaluate", "every task"),
    ("throughput", "speed and floor"),
    ("nano2", "the other road"),
    ("report", "against the paper"),
)
PLACEMENTS = ("teacher", "exhaustive", "found", "random", "uniform", "all_linear")


def path_of_the_study(study: Study):
    """Boxes of the stages in reading order, six a row; the bars mark those whose MLPs are frozen."""
    fig, ax = plots.figure(width=9, height=2.6)
    for i, (stage, what) in enumerate(PATH):
        x, y = i % 6, 1.35 - 1.3 * (i // 6)
        face = "#f3ddd3" if 1 <= i <= 5 else "#e6ebf2"
        ax.add_patch(FancyBboxPatch((x + 0.06, y), 0.8, 0.6, boxstyle="round,pad=0.03", fc=face, ec="#666666"))
        ax.text(x + 0.46, y + 0.4, stage, ha="center", va="center", fontsize=10.5, weight="bold")
        ax.text(x + 0.46, y + 0.15, what, ha="center", va="center", fontsize=8.5)
        if i + 1 < len(PATH):
            ax.annotate(
                "", (x + 1.03, y + 0.3), (x + 0.89, y + 0.3), arrowprops={"arrowstyle": "->", "color": "#444444"}
            )
    for left, right, y in ((1.03, 5.89, 1.22), (0.03, 0.46, -0.08)):  # of distill, stage 1 alone
        ax.plot([left, right], [y, y], color="#d55e00", linewidth=2)
    ax.text(0.03, -0.24, "MLPs frozen, to the end of stage 1 of distill", va="center", fontsize=9)
    ax.set(xlim=(0, 6.05), ylim=(-0.35, 2))
    ax.axis("off")
    return fig


def architecture(study: Study):
    """Layer kinds of the teacher, the chosen hybrid and the uniform rule."""
    choice = study.choices["placement"]
    n, found = int(choice["n_layers"]), set(choice["layers"])
    block = study.choices["blocks"].get("used", "jetblock")
    k = len(found)
    uniform = {(2 * j + 1) * n // (2 * k) for j in range(k)} if k else set()
    rows = {"teacher": set(range(n)), "found": found, "uniform": uniform}
    return plots.strip({name: ["attention" if i in kept else block for i in range(n)] for name, kept in rows.items()})


def supernet_loss(study: Study):
    """Loss over steps of every supernet."""
    table = study.tables["supernet"]["loss"]
    rows = [row | {"run": f"teacher {row['supernet'].removeprefix('t')}, {row['phase']}"} for row in table]
    label = "step [count]"
    return plots.curve(rows, "step", "loss", group="run", x_label=label, y_label="loss [1]", log_y=True)


def importance(study: Study):
    """Score of the supernet with one full layer, over tasks and layers, each task scaled to 0…1; first teacher."""
    rows = study.tables["placement"]["importance"]
    first = min(row["teacher"] for row in rows)
    scores: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["teacher"] == first:
            scores.setdefault(row["task"], {})[int(row["layer"])] = float(row["score"])
    tasks = [t for t in SCORED_TASKS if t in scores] + sorted(t for t in scores if t not in SCORED_TASKS)
    layers = sorted({layer for by_layer in scores.values() for layer in by_layer})
    matrix = []
    for task in tasks:
        low, high = min(scores[task].values()), max(scores[task].values())
        span = (high - low) or 1.0
        matrix.append([(scores[task].get(layer, low) - low) / span for layer in layers])
    return plots.heat_map(
        matrix,
        layers,
        tasks,
        x_label="layer with full attention [index]",
        y_label="task",
        value_label="score, scaled per task [0…1]",
    )


def _grouped(study: Study, stage: str, series: dict[str, str], x_label: str = "task"):
    """Bars of `{task}_{suffix}` for each series name -> suffix, over the scored tasks that have all of them."""
    tasks = [t for t in SCORED_TASKS if all(study.get(stage, f"{t}_{suffix}") for suffix in series.values())]
    if not tasks or not series:
        return None
    found = {name: [study.get(stage, f"{t}_{suffix}") for t in tasks] for name, suffix in series.items()}
    return plots.bars(
        tasks,
        {name: [e.value for e in es] for name, es in found.items()},
        {name: [e.se or 0.0 for e in es] for name, es in found.items()},
        x_label=x_label,
        y_label="accuracy [fraction]",
    )


def placement(study: Study):
    """All placements at the kept budget, first teacher."""
    have = [p for p in PLACEMENTS if study.get("placement", f"retrieval_k{study.budget}_{p}")]
    fig = _grouped(study, "placement", {p: f"k{study.budget}_{p}" for p in have})
    for text in fig.axes[0].get_legend().get_texts() if fig else ():
        text.set_text(text.get_text().replace("_", " "))  # as the table beside it prints them
    return fig


def block_kinds(study: Study) -> list[str]:
    """Blocks that the study trained, by the keys `{kind}_params`, in the order of notebook 04."""
    order = ("retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "jetblock", "rwkv7")
    keys = study.estimates["blocks"].keys() | study.metrics.get("blocks", {}).keys()
    found = {key.removesuffix("_params") for key in keys if key.endswith("_params")}
    return [kind for kind in order if kind in found] + sorted(found - set(order))


def blocks(study: Study):
    return _grouped(study, "blocks", {kind: kind for kind in block_kinds(study)})


def variants(study: Study) -> list[str]:
    """Variants of the JetBlock that were trained here, by the keys `{variant}_params`."""
    return [key.removesuffix("_params") for key in study.estimates["jetblock"] if key.endswith("_params")]


def jetblock(study: Study):
    return _grouped(study, "jetblock", {v: v for v in variants(study)})


def hardware(study: Study):
    """Math and retrieval of the grid at equal state size."""
    rows = study.tables["hardware"]["grid"]
    tasks = [t for t in SCORED_TASKS if all(row.get(t) is not None for row in rows)]
    if not tasks:
        return None
    return plots.bars(
        [str(row["name"]) for row in rows],
        {t: [row[t] for row in rows] for t in tasks},
        {t: [row.get(f"{t}_se") or 0.0 for row in rows] for t in tasks},
        x_label="heads x key width x value width",
        y_label="accuracy [fraction]",
    )


EVALUATED = {"teacher": "teacher", "hybrid": "hybrid", "hybrid, uniform": "uniform"}  # column -> suffix of its keys
STEPS = ("uniform placement", "found placement", "Gated DeltaNet", "JetBlock", "widths")


def evaluate(study: Study):
    """The final models, as far as the stage has them."""
    return _grouped(study, "evaluate", {m: s for m, s in EVALUATED.items() if study.get("evaluate", f"retrieval_{s}")})


def waterfall(study: Study):
    """What each step of the search added, over the seeds of the record (Fig 3); whiskers are errors of the steps."""
    steps = [study.get("distill", f"record_mean_step_{name.replace(' ', '_')}") for name in STEPS]
    if None in steps:
        return None
    levels = list(accumulate(step.value for step in steps))
    errors = [step.se or 0.0 for step in steps]
    return plots.waterfall(STEPS, levels, errors, x_label="step", y_label="mean accuracy [fraction]")


def six_axes(study: Study):
    """The paper's axes and ours side by side."""
    rows = study.tables["evaluate"].get("axes")
    return plots.interval_panels(rows, [row["axis"] for row in study.paper["axes"]], "axis") if rows else None


def accuracy_over_speed(study: Study):
    """Accuracy over decoding speed, the area of a dot its cache (Fig 1): printed, and ours at the longest context measured."""
    rows = [r for r in study.paper["table3_mmlu_bbh"] if r["cache_mib_64k"] and r["throughput_tok_s"] and r["mmlu"]]
    decode = [r for r in study.tables["throughput"]["throughput"] if r["phase"] == "decode" and r.get("bytes")]
    if not decode:
        return None
    longest = max(row["context"] for row in decode)
    speed = {row["model"]: row for row in decode if row["context"] == longest}
    ours = []
    for name, suffix in (("teacher", "teacher"), ("hybrid", "hybrid"), ("hybrid, uniform", "uniform")):
        scores = [study.get("evaluate", f"{t}_{suffix}") for t in SCORED_TASKS]
        row = speed.get("teacher" if name == "teacher" else "hybrid")  # both hybrids have the same layers to run
        if None not in scores and row:
            ours.append((name, row["tokens_per_s"], mean(scores).value, row["bytes"] / 2**20))
    printed = [(r["model"], r["throughput_tok_s"], r["mmlu"], r["cache_mib_64k"]) for r in rows]
    fig, (left, right) = plots.figure(1, 2, width=11, height=4.6)
    plots.bubbles(
        printed, x_label="decoding speed at 64K [tokens/s]", y_label="MMLU [points]", title="printed, one H100", ax=left
    )
    label = f"decoding speed at {longest} [tokens/s]"
    plots.bubbles(ours, x_label=label, y_label="mean accuracy [fraction]", title="ours, one CPU thread", ax=right)
    return fig


def throughput(study: Study):
    """Measured tokens/s over context, decode and prefill side by side."""
    fig, axes = plots.figure(1, 2, width=9.5, height=3.8)
    for ax, phase in zip(axes, ("decode", "prefill"), strict=True):
        rows = [r for r in study.tables["throughput"]["throughput"] if r["phase"] == phase]
        if rows:
            plots.curve(
                rows,
                "context",
                "tokens_per_s",
                group="model",
                error="tokens_per_s_sd",
                x_label="context [tokens]",
                y_label="speed [tokens/s]",
                title=phase,
                log_x=True,
                ax=ax,
            )
    return fig


def speedup(study: Study):
    """Decoding gain over context: printed in Fig 6, allowed by memory traffic on an H100, measured on an H200 and here."""
    jet, qwen = zoo.shape("Jet-Nemotron-2B"), zoo.shape("Qwen3-1.7B-Base")
    rows = []
    for row in study.paper["fig6_speedup_vs_qwen3_1_7b"]:
        n = row["context"]
        floor = roofline.decode_speedup(qwen, jet, n, roofline.DEVICES["H100"])
        rows += [{"context": n, "what": "paper, H100", "ratio": row["decode_speedup"]}]
        rows += [{"context": n, "what": "allowed by memory traffic, H100", "ratio": floor}]
        if measured := study.get("throughput", f"gpu_decode_qwen3_{int(n)}"):
            rows += [{"context": n, "what": "our engine, H200", "ratio": measured.value}]
    rows += [{"context": n, "what": "miniature, CPU", "ratio": e.value} for n, e in speedups(study, "decode").items()]
    return plots.curve(
        rows,
        "context",
        "ratio",
        group="what",
        x_label="context [tokens]",
        y_label="decoding speed over full attention [ratio]",
        baselines={"limit 56": 56.0, "equal": 1.0},
        log_x=True,
        log_y=True,
    )


def nano2_layers(study: Study):
    """What the logits lose without one layer of the small NemotronH; above a bar, its place in the order of removal."""
    rows = [row for row in study.tables["nano2"]["layers"] if row["of"] == "m0"]
    fig, ax = plots.figure(width=9, height=3.6)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = [row for row in rows if row["kind"] == kind]
        at, errors = [row["layer"] for row in some], [row["error"] for row in some]
        drawn = ax.bar(at, errors, color=plots.colour(kind), edgecolor="#666666", linewidth=0.5, label=kind)
        places = ["" if row["removed_as"] is None else str(row["removed_as"]) for row in some]
        ax.bar_label(drawn, places, padding=2, fontsize=9)
    ax.set(yscale="log", xlabel="layer [index]", ylabel="squared error of the logits [1]")
    ax.set_xticks([row["layer"] for row in rows])
    ax.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return fig


def nano2(study: Study):
    """The small NemotronH before pruning, after it and after distillation, and what rivals it at equal bytes."""
    series = {"original": "original", "pruned": "pruned", "pruned, distilled": "final", "narrowed": "narrowed"}
    return _grouped(study, "nano2", series | {f"random {i}": f"random_{i}" for i in range(study.n_draws)})


FIGURES = {
    "path": path_of_the_study,
    "architecture": architecture,
    "supernet_loss": supernet_loss,
    "importance": importance,
    "placement": placement,
    "blocks": blocks,
    "jetblock": jetblock,
    "hardware": hardware,
    "waterfall": waterfall,
    "evaluate": evaluate,
    "six_axes": six_axes,
    "accuracy_over_speed": accuracy_over_speed,
    "throughput": throughput,
    "speedup": speedup,
    "nano2_layers": nano2_layers,
    "nano2": nano2,
}
