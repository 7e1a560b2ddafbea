"""What a profile that trains on text needs, checked before the first GPU second, and what it will cost.

    python -m jetlab.preflight profiles/node8.yaml

`jetlab.run` does the same by itself before the first stage of such a profile.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jetlab.config import BlockDims, Text, Training, check_params, parse_size
from jetlab.layers import MIXERS
from jetlab.paths import ROOT, replacing, resolve, shown
from jetlab.train.text import HEAD_TOKENS

RECORD = "records/h200-x2/training.csv"  # where the speed of training was measured
PAPER = "paper/table10_costs_2b.csv"
# Measured in `RECORD` on one GPU: 80.5 and 109.8 GB, of which the sum of `gpu_bytes` explains 75 and 98.
_UNCOUNTED = 1.15
_TRAINED = 12  # bytes that a trained number takes on a GPU beside itself: its gradient and both moments of AdamW
_CHECKPOINT = 12  # on the disk: itself and both moments


@dataclass(frozen=True)
class Decoder:
    """What the pretrained model counts: numbers in all weights, in what a token is multiplied with, in one attention."""

    n_layers: int
    d_model: int
    d_ff: int
    vocab_size: int
    n_params: int
    n_matmul: int  # without an embedding table that is only looked up
    n_attention: int  # of one layer


@dataclass(frozen=True)
class Run:
    """One training run: what it trains, on how many tokens, with how many operations."""

    stage: str
    entry: str
    n_trained: int
    n_tokens: int
    flops: float


@dataclass(frozen=True)
class Finding:
    """Something that was looked at: `ok` None where it could not be."""

    what: str
    ok: bool | None
    said: str

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'NO', None: '--'}[self.ok] }  {self.what}: {self.said}"


@cache
def decoder(model: str, revision: str | None = None) -> Decoder:
    """The counts of a published shape (paper/model_shapes.json), by the last part of its hub id, or of a config.

    Other hub ids are read from the hub, folders from the disk: their config alone. Nothing is allocated.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from jetlab.models import zoo

    name = model.rsplit("/", 1)[-1]
    if name in zoo.names() and not resolve(model).is_dir():
        config = zoo.hf_config(name)
    else:
        where = resolve(model) if resolve(model).is_dir() else model
        config = AutoConfig.from_pretrained(where, revision=revision)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    n_params = sum(p.numel() for p in built.parameters())
    looked_up = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    attention = next(module for name, module in built.named_modules() if name.endswith(".self_attn"))
    return Decoder(
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        text.vocab_size,
        n_params,
        n_params - looked_up,
        sum(p.numel() for p in attention.parameters()),
    )


def runs(params: Mapping) -> list[Run]:
    """Every training run of a profile that trains on text, in the order of the stages.

    Operations of a token, N numbers that a token is multiplied with: 2 N_teacher + 4 N_student + 2 N_trained (forward of
    both, gradients of activations, and of what trains); of the local phase 2 N_teacher + 6 N_trained; of stage 2 2
    N_teacher + 6 N_student, without the teacher where labels alone count; with `recompute` 2 N_student more. Attention over
    the row is left out, and that logits are made twice; the speed in `RECORD` is in the same operations.
    """
    text = Text.from_params(**params["text"])
    model = _model(params)
    paths = params["supernet"]
    n_supernets = params["teacher"]["n_teachers"] * paths["n_seeds"]
    found = [
        _paths_run("supernet", f"t{i}", model, text, paths["block"], paths["dims"], paths["training"], model.n_layers)
        for i in range(n_supernets)
    ]
    linear = model.n_layers - params["placement"]["budget"]
    own = (model, text)
    for kind in params["variants"]["blocks"]:
        section = params["blocks"]
        found.append(_paths_run("block", kind, *own, kind, section["dims"], section["training"], linear))
    for variant in params["variants"]["jetblock"]:
        section = params["jetblock"]
        found.append(_paths_run("variant", variant, *own, "jetblock", section["dims"], section["training"], linear))
    for size in params["variants"]["sizes"]:
        dims = parse_size(size).model_dump()
        found.append(_paths_run("size", size, *own, "jetblock", dims, params["hardware"]["training"], linear))
    every_size = [parse_size(size).model_dump() for size in params["variants"]["sizes"]]
    # Which is chosen is not known yet: the largest.
    last = max(every_size, key=lambda dims: block_params("jetblock", dims, model.d_model))
    section = params["distill"]
    for stage in ("distill", "distill_uniform"):
        found.append(_paths_run(stage, "stage 1", *own, "jetblock", last, section["stage1"], linear))
        hybrid = model.n_matmul + linear * (block_params("jetblock", last, model.d_model) - model.n_attention)
        n_tokens = section["stage2_steps"] * text.tokens_per_step
        teacher = model.n_matmul if text.stage2_label_weight < 1 else 0
        of_hybrid = 8.0 if text.recompute else 6.0
        found.append(Run(stage, "stage 2", hybrid, n_tokens, n_tokens * (2.0 * teacher + of_hybrid * hybrid)))
    return found


def _model(params: Mapping) -> Decoder:
    teacher = params["teacher"]
    if teacher["source"] == "hub":
        return decoder(teacher["hub_id"], teacher["hub_revision"])
    if teacher["source"] == "bundled":
        return decoder("assets/teacher/0")
    raise ValueError(
        "a profile that trains on text starts from a model of the hub or a bundled one, got teacher.source: train; "
        "give source: hub with a hub_id"
    )


def block_params(kind: str, dims: Mapping, d_model: int) -> int:
    return MIXERS[kind].n_params(BlockDims(d_model, **dims))


def _paths_run(
    stage: str, entry: str, model: Decoder, text: Text, kind: str, dims: Mapping, training: Mapping, n_linear: int
) -> Run:
    settings = Training.from_params(**training)
    trained = n_linear * block_params(kind, dims, model.d_model)
    student = model.n_matmul + trained - n_linear * model.n_attention
    local = settings.n_local * (2.0 * model.n_matmul + 6.0 * trained)
    of_student = 6.0 if text.recompute else 4.0
    whole = settings.n_steps * (2.0 * model.n_matmul + of_student * student + 2.0 * trained)
    n_tokens = (settings.n_local + settings.n_steps) * text.tokens_per_step
    return Run(stage, entry, trained, n_tokens, text.tokens_per_step * (local + whole))


def measured_flops() -> tuple[float, str]:
    """Operations of the model per GPU and second that were measured, and where: the most processes of `RECORD`."""
    import csv

    with resolve(RECORD).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: (int(row["processes"]), float(row["model_tflops_per_gpu"])))
    where = f"{best['model']} on {best['processes']} {best['device']}, {RECORD}"
    return 1e12 * float(best["model_tflops_per_gpu"]), where


def gpu_bytes(params: Mapping) -> int:
    """Bytes that a GPU holds at once in the run that needs most: shards, two gathered layers, and the row's activations.

    Per process of W: 4 B of every weight and 12 B of what trains, over W; a layer gathered twice and what stands outside
    the layers once; hidden states of teacher and student of every layer; logits of `HEAD_TOKENS` tokens six times; the
    mask of documents, T² numbers a row; activations of one layer, or of all without `recompute`, of `rows_at_once` rows.
    """
    text, model = Text.from_params(**params["text"]), _model(params)
    size = 2 if text.precision == "bfloat16" else 4
    B, T, D, L = text.rows_at_once, text.seq_len, model.d_model, model.n_layers
    stages = runs(params)
    most = max(stages, key=lambda run: run.n_trained)
    # In stage 2 the teacher stands beside the hybrid, in the others the paths beside it.
    shards = (4 * (model.n_params + most.n_trained) + _TRAINED * most.n_trained) / text.n_processes
    outside = 2 * model.vocab_size * D
    layer = (model.n_params - model.vocab_size * D) / L + max(r.n_trained for r in stages if r.entry != "stage 2") / L
    gathered = size * (2 * layer + outside)
    kept = B * T * size * (14 * D + 4 * model.d_ff)
    activations = 2 * L * B * T * D * size + kept * (1 if text.recompute else L)
    head = 6 * 4 * min(B * T, HEAD_TOKENS) * model.vocab_size
    return int(_UNCOUNTED * (shards + gathered + activations + head + size * B * T * T))


def disk_bytes(params: Mapping) -> int:
    """Bytes that the study writes, at most: what stages keep, twice for DVC's cache, and the jobs of the largest stage.

    Kept are the teacher in bfloat16, a supernet's paths and the two final models, in float32. A job holds three checkpoints of
    12 B a trained number, the start and the end of its weights; stage 2's stands beside stage 1's, both phases of it.
    """
    model, stages = _model(params), runs(params)
    final = [run.n_trained for run in stages if run.entry == "stage 2"]
    paths = sum(run.n_trained for run in stages if run.stage == "supernet")
    kept = 2 * model.n_params + 4 * (paths + sum(final))
    first = max(run.n_trained for run in stages if run.entry == "stage 1")
    jobs = (3 * _CHECKPOINT + 2 * 4) * max(final) + (2 * 3 * _CHECKPOINT + 2 * 4) * first
    return 2 * kept + jobs


def costs(params: Mapping) -> list[dict]:
    """Rows {stage, runs, tokens_b, exaflop, gpu_hours, paper_tokens_b, paper_gpu_hours}, one a stage and their sum.

    GPU hours are operations over `measured_flops`; the paper's are of H100s (Table 10), of 2 billion parameters, and its
    tokens those of one run of a stage.
    """
    import csv

    speed, _ = measured_flops()
    with resolve(PAPER).open(encoding="utf-8", newline="") as file:
        paper = [(float(row["tokens_b"]), float(row["h100_gpu_hours"])) for row in csv.DictReader(file)]
    of = dict(zip(("supernet", "block", "variant", "size", "stage 1", "stage 2"), paper, strict=True))
    groups: dict[str, list[Run]] = {}
    for run in runs(params):
        groups.setdefault(f"{run.stage}, {run.entry}" if "distill" in run.stage else run.stage, []).append(run)
    rows = []
    for name, members in groups.items():
        tokens, hours = of.get(name.removeprefix("distill, "), (None, None))
        rows.append(_row(name, members, speed, tokens, hours))
    every = [run for members in groups.values() for run in members]
    return [*rows, _row("all", every, speed, None, sum(hours for _, hours in paper))]


def _row(stage: str, members: Sequence[Run], speed: float, tokens: float | None, hours: float | None) -> dict:
    flops = sum(run.flops for run in members)
    return {
        "stage": stage,
        "runs": len(members),
        "tokens_b": sum(run.n_tokens for run in members) / 1e9,
        "exaflop": flops / 1e18,
        "gpu_hours": flops / speed / 3600,
        "paper_tokens_b": tokens,
        "paper_gpu_hours": hours,
    }


def hub_ids(params: Mapping) -> list[tuple[str, str]]:
    """(kind, id) of everything that the profile reads from the hub: "model" or "dataset"."""
    teacher = params["teacher"]
    from_hub = teacher["source"] == "hub" and not resolve(teacher["hub_id"]).is_dir()  # a folder does for an id
    found = [("model", teacher["hub_id"])] if from_hub else []
    sources = [*params["text"]["sources"], *params["text"]["stage2_sources"]]
    found += [("dataset", source["hub_id"]) for source in sources if source.get("hub_id")]
    if names := params["evaluate"]["benchmarks"]:
        from jetlab.evaluate import benchmarks

        leaves = (leaf for resolved in benchmarks.resolve(names) for leaf in resolved.leaves)
        found += [("dataset", leaf.dataset) for leaf in leaves if leaf.dataset]
    return list(dict.fromkeys(found))


def _hub(params: Mapping) -> Iterator[Finding]:
    """Whether every id can be read with the token that is here. Ids are asked for one by one; nothing is downloaded."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    wanted = hub_ids(params)
    if not wanted:
        yield Finding("hub", True, "nothing is read from it")
        return
    token = get_token()
    yield Finding(
        "token", token is not None or None, "there" if token else "none: sets with terms need one (`hf auth login`)"
    )
    api = HfApi(token=token)
    for kind, name in wanted:
        try:
            api.auth_check(name, repo_type=kind)
            yield Finding(f"{kind} {name}", True, "can be read")
        except GatedRepoError:
            yield Finding(
                f"{kind} {name}", False, "its terms are not agreed to; do so on its page with the token's account"
            )
        except RepositoryNotFoundError:
            yield Finding(
                f"{kind} {name}",
                False,
                "no such id, or it is private; correct the id, or give a token that may read it",
            )
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
            said = f"cannot be reached ({type(error).__name__}), so {len(wanted)} ids were not looked at; check the network"
            yield Finding("hub", False, f"{said} and HF_HUB_OFFLINE")
            return


def _machine(params: Mapping) -> Iterator[Finding]:
    import torch

    text = Text.from_params(**params["text"])
    need, free = disk_bytes(params), shutil.disk_usage(ROOT).free
    yield Finding("disk", free > need, f"{need / 1e9:.0f} GB needed at most, {free / 1e9:.0f} GB free in {ROOT.name}/")
    if params["common"]["device"] == "cpu":
        yield Finding("GPUs", True, "none is used (common.device: cpu)")
        return
    n_gpus = torch.cuda.device_count()
    if "JETLAB_TORCHRUN" in os.environ:
        yield Finding("GPUs", n_gpus > 0, f"{n_gpus} here; how many elsewhere JETLAB_TORCHRUN must know")
    else:
        way_out = (
            "" if n_gpus >= text.n_processes else "; lower text.n_processes, or set JETLAB_TORCHRUN for several nodes"
        )
        said = f"{text.n_processes} needed (text.n_processes), {n_gpus} here{way_out}"
        yield Finding("GPUs", n_gpus >= text.n_processes, said)
    need = gpu_bytes(params)
    if n_gpus:
        there = min(torch.cuda.get_device_properties(i).total_memory for i in range(n_gpus))
        said = f"about {need / 1e9:.0f} GB of {there / 1e9:.0f} GB; else lower text.rows_at_once or set text.recompute: true"
        yield Finding("memory of a GPU", need < 0.95 * there, said)
    else:
        yield Finding("memory of a GPU", None, f"about {need / 1e9:.0f} GB needed")


def _files(params: Mapping) -> Iterator[Finding]:
    from jetlab.config import Source
    from jetlab.data.corpus import source_files

    for raw in [*params["text"]["sources"], *params["text"]["stage2_sources"]]:
        source = Source.from_params(**raw)
        if source.files is not None:
            try:
                yield Finding(f"files of {source.name}", True, f"{len(source_files(source))} found")
            except ValueError as error:
                yield Finding(f"files of {source.name}", False, str(error))


def check(params: Mapping) -> list[Finding]:
    """All findings about a profile that trains on text. Raises ConfigError for one that breaks a rule of its own."""
    check_params(dict(params))
    return list(dict.fromkeys([*_files(params), *_hub(params), *_machine(params)]))  # stages may share a source


def table(params: Mapping) -> str:
    """The costs as text."""
    rows = costs(params)
    _, where = measured_flops()
    lines = [
        f"{'stage':26}{'runs':>5}{'B tokens':>10}{'exaFLOP':>10}{'GPU hours':>11}{'paper: B a run':>16}{'H100 hours':>12}"
    ]
    for row in rows:
        paper = [f"{row[key]:,.0f}" if row[key] is not None else "–" for key in ("paper_tokens_b", "paper_gpu_hours")]
        numbers = f"{row['tokens_b']:>10.4g}{row['exaflop']:>10.4g}{row['gpu_hours']:>11,.4g}"
        lines.append(f"{row['stage']:26}{row['runs']:>5}{numbers}{paper[0]:>16}{paper[1]:>12}")
    return "\n".join([*lines, f"Hours at the speed of {where}; searching and scoring come on top."])


def once(params: Mapping, *, out=None) -> None:
    """Check a profile before its first stage, print findings and costs, and remember that it passed, in scratch/.

    Raises ValueError that lists what does not hold.
    """
    out = sys.stderr if out is None else out
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:16]
    passed = resolve(f"scratch/preflight/{digest}.txt")
    if passed.exists():
        return
    findings = check(params)
    report = "\n".join([*map(str, findings), "", table(params)])
    print(report, file=out, flush=True)
    if wrong := [finding for finding in findings if finding.ok is False]:
        raise ValueError(
            f"profile {params['common']['profile']!r} cannot start: "
            + "; ".join(f"{finding.what}: {finding.said}" for finding in wrong)
        )
    with replacing(passed) as temporary:
        temporary.write_text(report + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    from jetlab.run import RunError, read_params

    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    file = Path(*arguments) if arguments else Path("params.yaml")
    try:
        params = read_params(resolve(file))
        if not params.get("text"):
            print(
                f"{shown(resolve(file))} trains on tasks: it needs neither a network nor a GPU of its own",
                file=sys.stdout,
            )
            return 0
        findings = check(params)
    except (RunError, ValueError, OSError) as error:
        print(f"jetlab.preflight: {error}", file=sys.stderr)
        return 1
    print(*findings, "", table(params), sep="\n")
    return int(any(finding.ok is False for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
