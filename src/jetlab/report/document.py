"""The report as a list of blocks, before it becomes Markdown or HTML. Every result in it comes from the study.

Text may use `code`, **bold** and [links](target), which both renderers know.
"""

from collections.abc import Sequence

from jetlab.inference import roofline
from jetlab.models import zoo
from jetlab.report import figures, nano2
from jetlab.report.blocks import Block, Figure, Heading, Paragraph, Table, by_task, number, table, with_error
from jetlab.report.claims import AGREES, CANNOT_TELL, DISAGREES, NOT_TESTED, VERDICTS, Judged
from jetlab.report.derived import DERIVED, speedups
from jetlab.report.study import SCORED_TASKS, STAGES, Estimate, Study
from jetlab.search.hardware import RULE

NOTEBOOKS = {  # stage -> the notebook that shows it
    "teacher": "01_teacher",
    "supernet": "02_supernet",
    "placement": "03_placement",
    "blocks": "04_blocks",
    "block_seeds": "04b_blocks_over_seeds",
    "jetblock": "05_jetblock",
    "hardware": "06_hardware_search",
    "distill": "07_distill",
    "evaluate": "08_evaluate",
    "throughput": "09_throughput",
    "nano2": "10_nemotron_nano2",
}


def paper_value(item: Judged) -> str:
    """The number of the claim with its unit, or a dash."""
    if item.claim.paper_value is None:
        return "–"
    return f"{number(item.claim.paper_value)} {item.claim.unit}".strip()


def verdict_table(items: Sequence[Judged]) -> Table:
    """paper | ours | n | verdict, one row a claim."""
    rows = []
    for item in items:
        n = number(item.ours.n) if item.ours else "–"
        rows.append((item.claim.claim, paper_value(item), with_error(item.ours), n, f"**{item.verdict}**"))
    return table(("the paper says", "paper", "ours ± se", "n", "verdict"), rows)


def _count(items: Sequence[Judged], what: str) -> int:
    return sum(item.verdict == what for item in items)


def headline(items: Sequence[Judged]) -> str:
    """One paragraph that the verdicts write."""
    by_id = {item.claim.id: item for item in items}
    asked = [item for item in items if item.verdict != NOT_TESTED]
    words = {
        AGREES: "agrees with",
        DISAGREES: "disagrees with",
        CANNOT_TELL: "cannot tell about",
        NOT_TESTED: "does not test",
    }
    parts = [
        f"**Of {len(asked)} claims that could be asked, {_count(asked, AGREES)} agree, "
        f"{_count(asked, DISAGREES)} disagree and {_count(asked, CANNOT_TELL)} cannot be told either way**; "
        f"{_count(items, NOT_TESTED)} more are out of reach of a study of this size and are listed with the reason."
    ]
    for claim_id, text in (
        ("placement-retrieval", "that a searched placement beats a uniform one on retrieval"),
        ("different-layers", "that different tasks need different layers"),
        ("jetblock-better", "that the JetBlock beats Gated DeltaNet"),
        ("speedup-here", "that the hybrid decodes faster"),
    ):
        if claim_id in by_id:
            parts.append(f"The miniature {words[by_id[claim_id].verdict]} the paper's finding {text}.")
    return " ".join(parts)


def _section(study: Study, items: Sequence[Judged], stage: str, title: str, text: str, *blocks: Block) -> list[Block]:
    out: list[Block] = [Heading(2, title), Paragraph(text), *blocks]
    asked = [item for item in items if item.claim.kind == stage]
    if asked:
        out.append(verdict_table(asked))
    out.append(Paragraph(f"Notebook: [{NOTEBOOKS[stage]}](notebooks/{NOTEBOOKS[stage]}.ipynb)."))
    return out


def _teachers(study: Study, suffixes: dict[str, str]) -> dict[str, str]:
    return {f"{name}, teacher {t}": f"{s}_t{t}" for t in range(study.n_teachers) for name, s in suffixes.items()}


def _teacher(study: Study) -> Table:
    tasks = list(dict.fromkeys(t for i in range(study.n_teachers) for t in study.tasks("teacher", f"t{i}")))
    rows = []
    for task in tasks:
        scores = [study.get("teacher", f"{task}_t{i}") for i in range(study.n_teachers)]
        n = next((e.n for e in scores if e and e.n), None)
        rows.append((task, *(map(with_error, scores)), with_error(study.get("teacher", f"{task}_chance")), number(n)))
    return table(("task", *(f"teacher {i}" for i in range(study.n_teachers)), "chance", "n"), rows)


def _selectors(study: Study) -> Table:
    """Choices for all tasks at once, whose scores share one scale; budgets of which the best placement is known."""
    grouped: dict[tuple, list[dict]] = {}
    for row in study.tables["placement"]["selectors"]:
        if row["task"] == "all" and row["regret"] is not None:
            grouped.setdefault((row["selector"], row["budget"]), []).append(row)
    out = []
    for (selector, budget), group in grouped.items():
        regret, looked_at, tokens = (
            sum(r[key] for r in group) / len(group) for key in ("regret", "placements", "tokens")
        )
        out.append((selector, *map(number, (budget, regret, round(looked_at), round(tokens), len(group)))))
    header = ("selector", "full layers", "mean regret [0…1]", "placements looked at", "tokens", "searches")
    return table(header, out)


def _blocks(study: Study) -> Table:
    kinds = figures.block_kinds(study)
    paper = {
        "retnet": "RetNet",
        "mamba2": "Mamba2",
        "gla": "GLA",
        "deltanet": "DeltaNet",
        "gated_deltanet": "Gated DeltaNet",
        "jetblock": "JetBlock (before hardware-aware search)",
    }
    printed = {row["block"]: row for row in study.paper["table1_linear_blocks"]}
    asked = {t for kind in kinds for t in study.tasks("blocks", kind)}
    tasks = [t for t in SCORED_TASKS if t in asked]
    rows = []
    for kind in kinds:
        row = printed.get(paper.get(kind, ""), {})
        rows.append(
            (
                kind,
                *(with_error(study.get("blocks", f"{t}_{kind}")) for t in tasks),
                number(getattr(study.get("blocks", f"{kind}_params"), "value", None)),
                number(getattr(study.get("blocks", f"{kind}_state_bytes"), "value", None)),
                " / ".join(number(row.get(m)) for m in ("mmlu", "math", "retrieval")),
            )
        )
    return table(("block", *tasks, "parameters", "state [bytes]", "paper: MMLU / math / retrieval [%]"), rows)


def _grid(study: Study) -> Table:
    rows = study.tables["hardware"]["grid"]
    tasks = [t for t in SCORED_TASKS if t in rows[0]]
    out = []
    for row in rows:
        scores = [with_error(Estimate(row[t], row[f"{t}_se"]) if row[t] is not None else None) for t in tasks]
        out.append((row["name"], number(row.get("params")), number(row.get("state_bytes")), *scores))
    return table(("setting", "parameters", "state [bytes]", *tasks), out)


def _speeds(study: Study) -> Table:
    rows = []
    for phase in ("decode", "prefill"):
        by_context: dict[int, dict] = {}
        for row in study.tables["throughput"]["throughput"]:
            if row["phase"] == phase and row["model"] in ("teacher", "hybrid"):
                speed = Estimate(row["tokens_per_s"], row.get("tokens_per_s_sd"))
                by_context.setdefault(int(row["context"]), {})[row["model"]] = speed
        ratios = speedups(study, phase)
        for context, speeds in sorted(by_context.items()):
            measured = [with_error(speeds.get(model)) for model in ("teacher", "hybrid")]
            rows.append((phase, number(context), *measured, with_error(ratios.get(context))))
    return table(("phase", "context [tokens]", "teacher [tokens/s]", "hybrid [tokens/s]", "ratio"), rows)


def _cache_column(study: Study) -> Table:
    rows = []
    for row in study.paper["kv_cache_check"]:
        computed = roofline.cache_as_reported_mib(zoo.shape(row["model"]))
        gap = 100 * (computed / row["reported_mib"] - 1)
        rows.append(
            (row["model"], number(row["reported_mib"]), number(computed, 5), f"{gap:+.1f} %" if gap else "equal")
        )
    return table(("model", "Table 3 [MiB]", "closed form [MiB]", "gap"), rows)


def _ratios(study: Study) -> Table:
    jet, qwen = zoo.shape("Jet-Nemotron-2B"), zoo.shape("Qwen3-1.7B-Base")
    rows = []
    for row in study.paper["fig6_speedup_vs_qwen3_1_7b"]:
        n = int(row["context"])
        floors = [roofline.decode_speedup(qwen, jet, n, roofline.DEVICES[d]) for d in ("H100", "H200")]
        size = [roofline.bytes_ratio(qwen, jet, n, state_bytes_per_value=b) for b in (4, 2)]
        rows.append(
            (
                number(n),
                number(row["decode_speedup"]),
                with_error(study.get("throughput", f"gpu_decode_qwen3_{n}")),
                *(f"{floor:.1f}" for floor in floors),
                f"{size[0]:.1f} – {size[1]:.1f}",
                number(row["prefill_speedup"]),
                with_error(study.get("throughput", f"gpu_prefill_qwen3_{n}")),
                f"{roofline.prefill_speedup(qwen, jet, n):.2f}",
            )
        )
    header = (
        "context [tokens]",
        "decode, paper",
        "decode, our engine on an H200",
        "decode, allowed on an H100",
        "decode, allowed on an H200",
        "bytes a token (fp32 – bf16 states)",
        "prefill, paper",
        "prefill, our engine on an H200",
        "operations of a prefill",
    )
    return table(header, rows)


ASKED_VARIANTS = ("none", "static", "dynamic", "dynamic_static_qk", "dynamic_also_qk", "static_equal_params")


def _over_seeds(study: Study, stage: str, names: Sequence[str], columns: dict[str, str]) -> list[Block]:
    """Means over the scored tasks from the record, by the keys `record_{column}_mean_{name}`; nothing where it has none."""
    rows = [
        (name, *(with_error(study.get(stage, f"record_{column}_mean_{name}")) for column in columns.values()))
        for name in names
        if any(study.get(stage, f"record_{column}_mean_{name}") for column in columns.values())
    ]
    if not rows:
        return []
    return [
        Paragraph(
            "Mean of the scored tasks in the record of three seeds and two teachers, ± standard error over the seeds:"
        ),
        table(("", *columns), rows),
    ]


def _samples(study: Study) -> list[Block]:
    rows = study.tables["evaluate"]["samples"][:3]
    if not rows:
        return []
    shown = [
        tuple(" ".join(str(cell if cell is not None else "").split())[:160] for cell in row.values()) for row in rows
    ]
    return [table(tuple(rows[0]), shown)]


def _size(study: Study) -> str:
    """How far the study's model is from the paper's."""
    n_params = study.metrics["teacher"].get("n_params", 0)
    if n_params > 1e9:
        return f"It has {n_params / 1e9:.2f} billion parameters; rows that name records are of small models."
    return (
        "It is thousands of times smaller than the paper's; its "
        "tasks are synthetic, its data and budget its own: directions can be compared, sizes of effects cannot."
    )


def document(study: Study, items: Sequence[Judged], drawn: Sequence[str]) -> list[Block]:
    """All blocks of the report; `drawn` names the figures that exist."""

    def figure(name: str, caption: str) -> list[Block]:
        return [Figure(name, caption)] if name in drawn else []

    k = study.budget
    layers = ", ".join(str(layer) for layer in study.choices["placement"]["layers"])
    n_layers = study.choices["placement"]["n_layers"]
    placements = {p.replace("_", " "): f"k{k}_{p}" for p in figures.PLACEMENTS}
    read_off = [DERIVED[name](study).value for name in ("fig5b_postnas_2", "fig5b_uniform_2")]
    best_block = study.choices["blocks"].get("block", "–")
    best_size = study.choices["hardware"].get("name", study.choices["hardware"].get("choice", "–"))
    out: list[Block] = [
        Heading(1, "Jet-Nemotron in miniature: what the papers say and what this study measures"),
        Paragraph(headline(items)),
        Paragraph(
            "A pretrained transformer goes through the four search steps of PostNAS (arXiv:2508.15884) and comes "
            f"out as a hybrid of linear and full attention. {_size(study)} "
            "Beside it goes the road of Nemotron Nano 2 (arXiv:2508.14444): a small hybrid pruned to the same bytes. "
            "Speed and memory of the published models are closed forms and hold at their true size. "
            f"All results are of profile `{study.profile}`."
        ),
        *figure("path", "The path of the study. Each box is a stage of the pipeline and a notebook."),
        Heading(2, "How to read a verdict"),
        Paragraph(
            "**agrees** and **disagrees** need the 95 % interval of our number, by Student's t over the n that stands "
            "beside it, to leave out the limit that the claim sets; **cannot tell** has it inside; **not tested here** "
            "says why. Scores are fractions of "
            "right answers, differences against a number in points are in points; text is in bits per character, lower "
            "is better. The error of a score is that of its test contexts, and differences add two of them in squares. "
            "It is not that of training: from section 4 on each model of this machine is one training run, so a verdict "
            "between two of them says which of these two was better, not that the next seed will agree. Rows that say "
            "**seeds** are of the records of one H100 (notebook 16), averaged over two teachers and compared within a "
            "seed; their errors are those of so many seeds. n counts contexts, of several questions each (or searches, seeds). "
            "Throughput errors are the spread over repeats. "
            "For a speed of a published model the number beside the paper's is the ratio that memory traffic and "
            "operations allow: **disagrees** then says that the hardware alone does not give the printed ratio. "
            "With this many comparisons, about one in twenty leaves its interval by chance."
        ),
        table(("verdict", "claims"), [(word, number(_count(items, word))) for word in VERDICTS]),
    ]
    out += _section(
        study,
        items,
        "teacher",
        "1 · The starting models",
        "Full-attention transformers of two seeds. Facts and text are controls: they need no attention across "
        "distance, and no search looks at them.",
        _teacher(study),
    )
    out += _section(
        study,
        items,
        "supernet",
        "2 · Supernet (paper: Sec 2.2)",
        "Every layer gets a linear path beside its attention; the paths learn the features of the original, one "
        "randomly drawn subnetwork a step. All-linear and all-full are its two extremes on test examples.",
        *figure("supernet_loss", "Training loss of the supernets; the two phases have different losses."),
        by_task(study, "supernet", _teachers(study, {"all linear": "all_linear", "all full": "all_full"})),
    )
    out += _section(
        study,
        items,
        "placement",
        "3 · Where full attention stays (paper: Sec 2.2, Fig 5)",
        f"With {k} of {n_layers} layers kept, the search keeps layer(s) {layers} (counted from 0). Exhaustive is the "
        "best placement there is, on the examples that it was chosen with; random is the mean over placements; uniform "
        f"is fixed beforehand. With two layers the paper's Fig 5b reads {number(read_off[0])} (searched) against "
        f"{number(read_off[1])} (uniform) on MMLU.",
        *figure("architecture", "Layers of the teacher, of the chosen hybrid and of the uniform rule."),
        *figure("importance", "Importance of each layer alone (first teacher), the paper's Fig 5a in miniature."),
        *figure("placement", f"Accuracy with {k} full layer(s), test examples, with standard errors."),
        by_task(study, "placement", placements),
        Paragraph(
            "How far each selector, asked for all tasks at once, stays behind what an exhaustive search chooses on the same "
            "examples, on a scale from chance (0) to the teacher (1), and what it costs. Chosen on other examples than "
            "tested, a choice can be a little better than that, so a regret can fall below 0:"
        ),
        _selectors(study),
    )
    out += _section(
        study,
        items,
        "blocks",
        "4 · Which linear block (paper: Sec 2.3, Table 1)",
        "Each block at the found placement with the same heads and widths, so with a matrix state of the same size; "
        "parameters differ, and so do the bytes of all that is carried, by the inputs of the convolutions. Same data "
        "and steps. Where a task is near 1 for all blocks it tells nothing, and the mean rests on the others. The "
        "paper timed RWKV7 but did not train it, and gives the JetBlock's scores in Fig 3. Best here, chosen on other "
        f"examples than those of the table: {best_block}. The controls, facts and text, stand in the notebook. What several "
        "seeds say, also without any full layer and at equal parameters, is in "
        "[notebook 04b](notebooks/04b_blocks_over_seeds.ipynb).",
        *figure("blocks", "Accuracy of the blocks, with standard errors."),
        _blocks(study),
        *_over_seeds(
            study, "block_seeds", figures.block_kinds(study), {"found": "found_state", "no full layer": "none_state"}
        ),
    )
    out += _section(
        study,
        items,
        "jetblock",
        "5 · The JetBlock (paper: Sec 2.4)",
        "No convolution, a static one or a dynamic one on the values. The paper prints no table for this step. All "
        "nineteen variants of the record stand in the notebook; here those that the claims ask about.",
        *figure("jetblock", "Accuracy of the variants, with standard errors."),
        by_task(study, "jetblock", {v: v for v in figures.variants(study)}),
        *_over_seeds(study, "jetblock", ASKED_VARIANTS, {"found": "found", "no full layer": "none"}),
    )
    out += _section(
        study,
        items,
        "hardware",
        "6 · Widths at equal cache (paper: Sec 2.5, Table 2)",
        f"All settings hold the same number of state elements. The rule, set beforehand: {RULE}. It takes "
        f"{best_size}. Where retrieval and math are at the ceiling, that is a choice by size alone, whatever the other "
        "tasks lose.",
        *figure("hardware", "Accuracy of the settings, with standard errors."),
        _grid(study),
    )
    out += _section(
        study,
        items,
        "distill",
        "7 · Two stages of distillation (paper: Sec 3.1)",
        "Stage 1 trains the new layers with frozen MLPs, stage 2 all weights. The waterfall is the paper's Fig 3 on the "
        "record: every bar trained alike by stage 1, two teachers and three seeds.",
        *figure("waterfall", "What each step of the search added, with the standard errors of the steps."),
        by_task(study, "distill", {"after stage 1": "stage1", "after stage 2": "stage2"}),
    )
    out += _section(
        study,
        items,
        "evaluate",
        "8 · The final model (paper: Tables 3-6)",
        "The hybrid beside its teacher, and beside the same hybrid trained at the uniform placement. The notebook also "
        "stretches the contexts beyond the length of training and switches off each kind of layer.",
        *figure("evaluate", "Accuracy of the final models, with standard errors."),
        by_task(study, "evaluate", figures.EVALUATED),
        *figure("six_axes", "The paper's six axes and what stands for them here; commonsense has no counterpart."),
        *_samples(study),
    )
    out += _section(
        study,
        items,
        "throughput",
        "9 · Speed (paper: Fig 6, Table 3)",
        "Measured here: both models in turn on one CPU thread, batch 1, medians over repeats. Computed: the least "
        "time that memory traffic and operations allow on a GPU, for the published shapes. From a record: the published "
        "shapes with random weights in our engine on one H200, each at the largest batch in 80 GB.",
        *figure("accuracy_over_speed", "Accuracy over speed, the area of a dot its cache, as the paper's Fig 1."),
        *figure("throughput", "Measured speed over context, with the spread over repeats."),
        _speeds(study),
        *figure(
            "speedup",
            "Decoding gain over context: printed, allowed by the hardware, measured at full size and here.",
        ),
        _ratios(study),
    )
    text, blocks = nano2.section(study, figure)
    out += _section(
        study, items, "nano2", "10 · Nemotron Nano 2: a hybrid pruned to a budget (arXiv:2508.14444)", text, *blocks
    )
    out += [
        Heading(2, "11 · Cache and parameters in closed form (paper: Tables 2 and 3)"),
        Paragraph(
            "Keys and values in bf16, recurrent states in fp32 for Jet-Nemotron and in bf16 for Mamba2, 64K tokens, "
            "one sequence. Gemma3n is counted without its local layers, as the paper does."
        ),
        _cache_column(study),
        Heading(2, "12 · Every claim"),
        Paragraph(
            "All claims of the two papers and of articles about them that can be stated as a number or a direction. "
            "Articles are named as such; what they print is not what the papers print."
        ),
        table(
            ("claim", "source", "paper", "ours ± se", "verdict", "reason"),
            [
                (i.claim.claim, i.claim.source, paper_value(i), with_error(i.ours), f"**{i.verdict}**", i.claim.reason)
                for i in items
            ],
        ),
        Paragraph("Data: `paper/` (the papers' tables with their sources) and `results/` (" + ", ".join(STAGES) + ")."),
    ]
    return out
