"""The section on Nemotron Nano 2: what its recipe did to a small hybrid; memory, speed and scores of its published models."""

from collections import Counter

from jetlab.compress.budget import GIB, nano2_budget, needed
from jetlab.models import zoo
from jetlab.report.blocks import Block, Paragraph, Table, by_task, number, table, with_error
from jetlab.report.derived import request_floor
from jetlab.report.study import Estimate, Study

FIRST = "m0"  # the stage's first model
KINDS = {"mlp": "MLP", "mamba2": "Mamba2", "attention": "attention"}
MODELS = {"12B": "NVIDIA-Nemotron-Nano-12B-v2-Base", "9B": "NVIDIA-Nemotron-Nano-9B-v2"}
REASONING = {"9B v2": "nano_9b_v2", "12B v2": "nano_12b_v2", "Qwen3-8B": "qwen3_8b", "Qwen3-14B": "qwen3_14b"}
BASE = {
    "9B base": "nano_9b_base",
    "12B base": "nano_12b_base",
    "Qwen3-8B base": "qwen3_8b_base",
    "Gemma3-12B base": "gemma3_12b_base",
}


def _first(study: Study, name: str) -> list[dict]:
    return [row for row in study.tables["nano2"][name] if row["of"] == FIRST]


def pruned(study: Study) -> str:
    """What the winner gave up, in words: layers by kind, and bytes before and after beside those of the hybrid."""
    layers = _first(study, "layers")
    winner = next(row for row in _first(study, "trials") if row["step"] == "winner")
    n_gone = len(layers) - winner["n_layers"]
    gone = Counter(row["kind"] for row in layers if row["removed_as"] and row["removed_as"] <= n_gone)
    needed_most = max(layers, key=lambda row: row["error"])
    n_bytes = {row["model"]: row["bytes"] for row in study.tables["nano2"]["roads"]}
    given_up = ", ".join(f"{gone[kind]} {name}" for kind, name in KINDS.items() if gone[kind]) or "none"
    return (
        f"The winner keeps {winner['n_layers']} of {len(layers)} layers (given up: {given_up}) and goes from "
        f"{number(n_bytes['original'])} to {number(n_bytes['pruned'])} bytes; the hybrid takes "
        f"{number(n_bytes['hybrid'])}. Taken out alone, layer {needed_most['layer']} "
        f"({KINDS[needed_most['kind']]}, counted from 0) changes the logits most."
    )


def trials(study: Study) -> Table:
    """Candidates, winner and random rivals; what depth alone costs, where it was tried, stands in the notebook."""
    header = ("model", "layers", "width", "MLP width", "Mamba heads", "parameters", "bytes")
    rows = [
        (
            row["name"],
            *(number(row[key]) for key in ("n_layers", "d_model", "d_ff", "n_mamba_heads", "n_params", "bytes")),
            number(row["logit_error"]),
            with_error(Estimate(row["accuracy"], row["se"])),
        )
        for row in _first(study, "trials")
        if row["step"] != "depth"
    ]
    return table((*header, "error of the logits as cut", "mean accuracy"), rows)


def scores(study: Study) -> Table:
    columns = {"original": "original", "pruned": "pruned", "pruned, distilled": "final", "narrowed": "narrowed"}
    columns |= {f"random {i}, distilled": f"random_{i}" for i in range(study.n_draws)}
    return by_task(study, "nano2", columns)


def leads(study: Study) -> Table:
    """What importance is worth: mean accuracy over that of each kind of rival, in the record of two models."""
    rivals = {
        "other layers drawn": "random",
        "other layers drawn, but for attention": "attention_kept",
        "other neurons, channels and heads drawn": "narrowed_random",
    }
    rows = []
    for name, key in rivals.items():
        found = [study.get("nano2", f"{record}_over_{key}") for record in ("record_short", "record")]
        rows.append((name, *map(with_error, found), number(getattr(found[0], "n", None))))
    header = ("over models with", "lead ± se over draws, as few steps as here", "four times as many", "draws")
    return table(header, rows)


def two_roads(study: Study) -> Table:
    titles = {"n_params": "parameters", "bytes": "bytes", "bytes_per_token": "bytes a decoded token"}
    rows = study.tables["nano2"]["roads"]
    tasks = [key for key in rows[0] if key not in ("road", "model") and not key.endswith(("params", "bytes", "token"))]
    out = [(row["road"], row["model"], *(number(row[k]) for k in titles), *(row[t] for t in tasks)) for row in rows]
    return table(("road", "model", *titles.values(), *tasks), out)


def memory() -> Table:
    """The sum of Sec 4 for both published shapes."""
    budget = nano2_budget()
    rows = []
    for name, model in MODELS.items():
        shape = zoo.shape(model)
        found = needed(shape, budget)
        parts = (found.weights, found.kv_cache, found.states + found.conv, found.total, budget.n_bytes - found.total)
        rows.append((name, f"{zoo.n_params(shape) / 1e9:.2f}", *(f"{part / GIB:.2f}" for part in parts)))
    columns = ("weights", "keys and values", "states", "sum", f"left of {budget.n_bytes / GIB:.2f}")
    return table(("model", "parameters [10^9]", *(f"{column} [GiB]" for column in columns)), rows)


def requests(study: Study) -> Table:
    """Answer tokens a second of the 9B over those of Qwen3-8B: printed, of the floors, and of the record."""
    rows = []
    for row in study.paper["nano2_throughput"]:
        prompt, answer = int(row["isl"]), int(row["osl"])
        key = f"record_request_{prompt}_{answer}"
        floors = [study.get("nano2", f"{key}_card_{model}_fraction_of_floor") for model in ("nano", "qwen")]
        rows.append(
            (
                number(prompt),
                number(answer),
                number(row["speedup_vs_qwen3_8b"]),
                f"{request_floor(prompt, answer):.2f}",
                *(with_error(study.get("nano2", f"{key}_{memory}")) for memory in ("card", "all")),
                " / ".join(number(getattr(floor, "value", None), 2) for floor in floors),
            )
        )
    header = (
        "in [tokens]",
        "out [tokens]",
        "printed, A10G",
        "floors, A10G",
        "our engine, H200 capped at 22.06 GiB",
        "our engine, all of the H200",
        "share of its floor, capped: 9B / Qwen3-8B",
    )
    return table(header, rows)


def printed(study: Study, name: str, columns: dict[str, str]) -> Table:
    """A table of the paper as it stands in paper/, without its sources."""
    rows = [(row["benchmark"], *(number(row[key], 4) for key in columns.values())) for row in study.paper[name]]
    return table(("benchmark", *columns), rows)


def section(study: Study, figure) -> tuple[str, list[Block]]:
    """The section's first paragraph and what follows it; `figure` gives a drawing that exists, else nothing."""
    most = max(row["tokens_b"] for row in study.paper["nano2_distillation"])
    text = (
        "The other road to a fast hybrid: pretrain layers of Mamba2, MLPs and a little attention, prune them until a budget "
        "of memory holds, distil. The small model is one that this repository trained on the study's tasks; its budget is "
        f"what the hybrid of section 7 takes. {pruned(study)}"
    )
    blocks: list[Block] = [
        *figure("nano2_layers", "Error of the logits without one layer; numbers give the order in which layers went."),
        Paragraph(
            "The trials. Candidates fit the budget; each is distilled for a few steps and scored on split `select`. The "
            "winner, the best candidate that gives up width, and as many layers drawn at random are distilled longer on the "
            "same rows and scored on split `test`, so only these compare with each other:"
        ),
        trials(study),
        Paragraph("Accuracy on split `test`. Errors are those of the test contexts:"),
        *figure("nano2", "Accuracy before pruning, after it and after distillation, with standard errors."),
        scores(study),
        Paragraph(
            "One draw proves nothing. In the records of both models, with five draws of each kind, distilled as long, of the "
            "same bytes:"
        ),
        leads(study),
        Paragraph(
            "Both roads on one measuring stick, one sequence at the context of the budget. Tasks, contexts and scorer are the "
            "same; models, pretraining and steps of distillation are not:"
        ),
        two_roads(study),
        Paragraph(
            "Why 9B and not 12B. The published shapes at 128K tokens and batch 1, in bf16 with states in fp32; the budget is "
            "an A10G's 22.06 GiB less 5 % for the framework and 1.3 GiB for a vision encoder. Activations are not "
            "counted:"
        ),
        memory(),
        Paragraph(
            "Speed of whole requests: answer tokens a second of the 9B over those of Qwen3-8B. Floors are the least times that "
            "an A10G allows, each at its largest batch; a model further from its floor than the other shifts the ratio, up or "
            "down. Measured is a record of one H200 with random weights, each model at the largest batch that the memory "
            "holds; the sequences of a batch run side by side, where the paper's vLLM lets new ones join:"
        ),
        requests(study),
        Paragraph(
            "Accuracy of the published models, as the paper prints it and not measured here; a dash is a number that our "
            "reading notes lack (`paper/nano2_accuracy_*.csv`). Reasoning models [points]:"
        ),
        printed(study, "nano2_accuracy_reasoning", REASONING),
        Paragraph("Base models [points]:"),
        printed(study, "nano2_accuracy_base", BASE),
        Paragraph(
            "**Not reproduced**: pretraining in FP8 on 20 T tokens and its long-context phase; post-training by SFT, DPO, "
            f"GRPO and RLHF and the merge of checkpoints; distillation on up to {number(most)} billion tokens a phase."
        ),
    ]
    return text, blocks
