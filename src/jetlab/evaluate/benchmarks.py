"""The paper's benchmarks (arXiv:2508.15884, Sec 3.1, Tables 3-6, 15, 16) in lm-eval, by its Python API.

paper/benchmarks.csv says for each which task of lm-eval it is, which metric is meant, how many examples are shown and what
the paper or its released code leaves open. Tasks named `jetlab_…` are ours, in the folder benchmark_tasks beside this file.
Reading the table needs no lm-eval, which takes seconds to import; `resolve` reads its task files, `score` runs them.
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from jetlab.evaluate.execution import Limits, judge
from jetlab.parallel import dealt, parallel_map
from jetlab.paths import resolve as from_root
from jetlab.progress import progress

TABLE = "paper/benchmarks.csv"
PRINTED = ("Qwen2.5-1.5B", "Jet-Nemotron-2B")  # the paper's starting model and what became of it
_OWN_TASKS = Path(__file__).parent / "benchmark_tasks"
_SEED = 1234  # lm-eval's own seed of the drawn examples, so that its command line draws the same
_KS = (1, 5, 10)  # pass@k is reported for those that a task's repeats allow
_INHERITED = ("dataset_path", "dataset_name", "output_type", "metric_list", "filter_list", "repeats")


@dataclass(frozen=True)
class Benchmark:
    """One row of paper/benchmarks.csv."""

    name: str
    axis: str  # as in paper/axes.csv
    task: str  # lm-eval's name of a task, group or tag
    metric: str
    filter: str = "none"  # what is taken from an answer before it is judged
    n_shots: int = 0  # examples with answers in the prompt
    max_length: int | None = None  # tokens of prompt and answer; longer prompts lose their beginning
    max_new_tokens: int = 256  # of the answer, where the task does not say
    executes_code: bool = False
    table: str = ""  # in paper/, that holds the printed number
    column: str = ""
    note: str = ""
    source: str = ""

    def printed(self, model: str) -> float | None:
        """The paper's number for `model` in percent; None where it prints none."""
        return _printed().get((self.table, self.column, model)) if self.table else None


@dataclass(frozen=True)
class Leaf:
    """A task without parts, as lm-eval's files describe it."""

    task: str
    dataset: str | None  # of the Hugging Face hub; None: made when the task is loaded
    subset: str | None
    output_type: str
    metrics: tuple[str, ...]
    filters: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Resolved:
    benchmark: Benchmark
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True)
class BenchmarkScore:
    """One benchmark's score: `value` and its standard error as fractions, over `n` documents."""

    name: str
    task: str
    metric: str
    value: float
    se: float
    n: int
    n_shots: int
    version: str


@cache
def read_benchmarks() -> dict[str, Benchmark]:
    """paper/benchmarks.csv by name, in its order."""
    with from_root(TABLE).open(encoding="utf-8", newline="") as file:
        rows = [
            row
            | {key: int(row[key]) for key in ("n_shots", "max_length", "max_new_tokens")}
            | {"executes_code": row["executes_code"] == "1"}
            for row in csv.DictReader(file)
        ]
    return {row["name"]: Benchmark(**row) for row in rows}


@cache
def _printed() -> dict[tuple[str, str, str], float]:
    """(table, column, model) -> the printed number."""
    found = {}
    for table in sorted({benchmark.table for benchmark in read_benchmarks().values()} - {""}):
        with from_root(f"paper/{table}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found |= {(table, column, row["model"]): float(x) for column, x in row.items() if _is_number(x)}
    return found


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).isdigit()


def require_known(names: Iterable[str]) -> None:
    """Raises ValueError for a name that paper/benchmarks.csv does not have."""
    if unknown := [name for name in names if name not in read_benchmarks()]:
        raise ValueError(
            f"benchmarks must be names of {TABLE}, got {', '.join(unknown)}; it has {', '.join(read_benchmarks())}"
        )


def _chosen(benchmarks: Sequence[str | Benchmark]) -> list[Benchmark]:
    require_known(name for name in benchmarks if isinstance(name, str))
    return [read_benchmarks()[name] if isinstance(name, str) else name for name in benchmarks]


# ---- what lm-eval's files say ---------------------------------------------------------------------------------------


@cache
def _manager(include_path: str | None, with_lm_eval: bool, metadata: tuple[tuple[str, object], ...] = ()):
    """lm-eval's index of tasks: of `include_path`, and unless that suffices of lm-eval itself and of ours."""
    from lm_eval.tasks import TaskManager

    folders = ([str(_OWN_TASKS)] if with_lm_eval else []) + ([include_path] if include_path else [])
    return TaskManager(
        include_path=folders,
        include_defaults=with_lm_eval,
        metadata={key: list(value) if isinstance(value, tuple) else value for key, value in metadata},
    )


def _manager_of(chosen: Sequence[Benchmark], include_path: str | Path | None, **metadata):
    """The smallest index that has the tasks: lm-eval's own 14,000 take seconds to list."""
    folder = None if include_path is None else str(Path(include_path).resolve())
    own = folder and all(benchmark.task in _manager(folder, False).task_index for benchmark in chosen)
    return _manager(folder, not own, tuple(metadata.items()))


def resolve(benchmarks: Sequence[str | Benchmark], *, include_path: str | Path | None = None) -> list[Resolved]:
    """What each benchmark is in the installed lm-eval: its leaf tasks with data set, metrics, filters and output type.

    `benchmarks` are names of paper/benchmarks.csv or rows of one's own; `include_path` is a folder with more task files.
    Reads files only: nothing is downloaded, and of the tasks' own code only classes that describe a task are imported.
    Raises ValueError for a name that is unknown here or to lm-eval, and for a metric or filter that a task does not report.
    """
    chosen = _chosen(benchmarks)
    index = _manager_of(chosen, include_path).task_index
    resolved = []
    for benchmark in chosen:
        if benchmark.task not in index:
            raise ValueError(
                f"benchmark {benchmark.name}: the installed lm-eval has no task {benchmark.task!r}; "
                f"correct column task of {TABLE}, or name the folder that has it as include_path"
            )
        leaves = tuple(_leaves(benchmark.task, index, {}))
        for leaf in leaves:
            for kind, wanted, found in (
                ("metric", benchmark.metric, leaf.metrics),
                ("filter", benchmark.filter, leaf.filters),
            ):
                if wanted not in found:
                    raise ValueError(
                        f"benchmark {benchmark.name}: task {leaf.task} reports no {kind} {wanted!r}; "
                        f"it has {', '.join(found)}"
                    )
        resolved.append(Resolved(benchmark, leaves))
    return resolved


def _leaves(item: str | dict, index: Mapping, inherited: dict) -> Iterable[Leaf]:
    """The leaf tasks of a task, group or tag of lm-eval's index, or of a group's member that overrides some of them."""
    if isinstance(item, dict):
        inherited = inherited | {key: item[key] for key in _INHERITED if key in item}
        item = item if isinstance(item.get("task"), list) else item.get("task") or item["group"]
    entry = None if isinstance(item, dict) else index[item]
    config = item if entry is None else entry.cfg or {}
    if entry is not None and entry.kind.name == "TAG":
        members = sorted(entry.tags)
    elif entry is None or entry.kind.name == "GROUP":
        inherited = inherited | {key: config[key] for key in _INHERITED if key in config}
        members = config["task"]
    else:
        yield _leaf(entry, config | inherited)
        return
    for member in members:
        yield from _leaves(member, index, inherited)


def _leaf(entry, config: dict) -> Leaf:
    if entry.kind.name == "PY_TASK":
        return _leaf_of_class(entry)
    if "metric_list" in config:
        # a function is written as its file and name; code is judged by `execution`, whatever function lm-eval would use
        metrics = tuple(str(metric["metric"]).rpartition(".")[2] for metric in config["metric_list"])
    else:
        from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

        metrics = tuple(DEFAULT_METRIC_REGISTRY[config.get("output_type", "generate_until")])
    if config.get("unsafe_code"):
        metrics = tuple(f"pass@{k}" for k in _KS if k <= config.get("repeats", 1))
    filters = tuple(step["name"] for step in config.get("filter_list") or [{"name": "none"}])
    version = (config.get("metadata") or {}).get("version", "")
    dataset = (config.get("dataset_path") or None, config.get("dataset_name") or None)
    return Leaf(entry.name, *dataset, config.get("output_type", "generate_until"), metrics, filters, str(version))


def _leaf_of_class(entry) -> Leaf:
    """A task that is a class: what its attributes and methods say, without making one, which would download its data."""
    from lm_eval.tasks._yaml_loader import load_yaml

    task_class = load_yaml(entry.yaml_path)["class"]
    metrics = tuple(task_class.aggregation(task_class.__new__(task_class)))
    dataset = (task_class.DATASET_PATH, task_class.DATASET_NAME)
    output_type = task_class.OUTPUT_TYPE or "generate_until"
    return Leaf(entry.name, *dataset, output_type, metrics, ("none",), str(task_class.VERSION))


# ---- scoring --------------------------------------------------------------------------------------------------------


def score(
    model,
    tokenizer,
    benchmarks: Sequence[str | Benchmark],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    execute_code: bool = False,
    max_length: int | None = None,
    include_path: str | Path | None = None,
    limits: Limits | None = None,
) -> list[BenchmarkScore]:
    """What lm-eval says of a Hugging Face model, with slots or without: one row a benchmark, in the order asked for.

    `benchmarks` and `include_path` as in `resolve`; data come from the Hugging Face hub unless a task names local files.
    `limit` documents of each leaf task are scored (None: all); `max_length` in tokens takes the place of the benchmark's
    own. A group has lm-eval's aggregate, or the mean of its leaves where it declares none, and the standard error that
    belongs to it. Nothing is printed, and the global generators stay as they were.

    Raises ValueError as `resolve` does, and for a benchmark that executes code unless `execute_code`. Then lm-eval only
    generates; what the model wrote runs in processes under `limits`, which is no security boundary (`execution` says why).
    """
    from jetlab.evaluate.harness import quietly

    chosen = [resolved.benchmark for resolved in resolve(benchmarks, include_path=include_path)]
    if not execute_code and (risky := [benchmark.name for benchmark in chosen if benchmark.executes_code]):
        raise ValueError(
            f"{', '.join(risky)} would run programs that the model wrote on this machine, which can read your files and "
            "do harm; in a container without network pass execute_code=True (params.yaml: execute_code: true), or leave "
            "them out"
        )
    rows = []
    with progress(len(chosen), "benchmarks", unit="benchmark") as bar:
        for benchmark in chosen:
            with quietly(model), torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(_SEED)  # some tasks sample
                rows.append(_score(model, tokenizer, benchmark, limit, batch_size, max_length, include_path, limits))
            bar.update()
    return rows


def score_models(
    folders: Mapping[str, str | Path],
    benchmarks: Sequence[str | Benchmark],
    *,
    on: Sequence[str] = ("cpu",),
    **options,
) -> dict[str, list[BenchmarkScore]]:
    """`score` of several saved models by name; their benchmarks are dealt to the devices `on`, a process each.

    A folder is that of a plain decoder or a hybrid, ours or Jet-Nemotron's. `options` are those of `score`.
    """
    pairs = [(name, str(folder), benchmark) for benchmark in benchmarks for name, folder in folders.items()]
    shares = list(zip(on, dealt(pairs, len(on)), strict=False))
    parts = parallel_map(partial(_score_share, options), shares, n_workers=len(on))
    rows = {(name, row.name): row for part in parts for name, row in part}
    wanted = [benchmark if isinstance(benchmark, str) else benchmark.name for benchmark in benchmarks]
    return {name: [rows[name, benchmark] for benchmark in wanted] for name in folders}


def _score_share(
    options: Mapping, share: tuple[str, Sequence[tuple[str, str, str | Benchmark]]]
) -> list[tuple[str, BenchmarkScore]]:
    device, pairs = share
    found = []
    for name, folder in dict.fromkeys((name, folder) for name, folder, _ in pairs):
        model, tokenizer = _load(folder, device)
        mine = [benchmark for other, _, benchmark in pairs if other == name]
        found += [(name, row) for row in score(model, tokenizer, mine, **options)]
    return found


def _load(folder: str, device: str):
    from jetlab.models import export, surgery

    layout = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model, tokenizer = (export if layout["model_type"] == "jet_nemotron" else surgery).load(folder, device=device)
    return model.bfloat16() if device.startswith("cuda") else model, tokenizer


def _score(
    model, tokenizer, benchmark: Benchmark, limit, batch_size: int, max_length, include_path, limits: Limits | None
) -> BenchmarkScore:
    from lm_eval import evaluate

    from jetlab.evaluate.harness import HarnessModel

    metadata = {}
    if benchmark.task == "ruler":  # its documents are made for a length and a tokeniser
        metadata = {"max_seq_lengths": (int(benchmark.metric),), "tokenizer": tokenizer.name_or_path}
    loaded = _manager_of([benchmark], include_path, **metadata).load([benchmark.task])
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", benchmark.n_shots)
        task.set_fewshot_seed(_SEED)
        if benchmark.executes_code:
            ks = [k for k in _KS if k <= task.get_config("repeats")]
            task.set_config("process_results", judge(task.doc_to_target, ks, limits))
    found = evaluate(
        lm=HarnessModel(
            model,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length or benchmark.max_length,
            max_new_tokens=benchmark.max_new_tokens,
        ),
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=1000,  # only where no formula gives the standard error
        log_samples=True,
        confirm_run_unsafe_code=benchmark.executes_code,
    )
    value, se = _value_and_se(found, benchmark, list(loaded["tasks"]))
    n = sum(found["n-samples"][leaf]["effective"] for leaf in loaded["tasks"])
    version = str(found["versions"].get(benchmark.task, ""))
    return BenchmarkScore(benchmark.name, benchmark.task, benchmark.metric, value, se, n, benchmark.n_shots, version)


def _value_and_se(found: Mapping, benchmark: Benchmark, leaves: Sequence[str]) -> tuple[float, float]:
    """The score of the task or group, and its standard error; both from the leaves where lm-eval does not aggregate."""
    key, se_key = f"{benchmark.metric},{benchmark.filter}", f"{benchmark.metric}_stderr,{benchmark.filter}"
    by_leaf = [(found["results"][leaf][key], _se_of_leaf(found, leaf, benchmark)) for leaf in leaves]
    own = found["results"].get(benchmark.task, {})
    if key not in own:
        mean = sum(value for value, _ in by_leaf) / len(by_leaf)
        return float(mean), math.sqrt(sum(se**2 for _, se in by_leaf)) / len(by_leaf)
    se = own.get(se_key, "N/A")
    if not isinstance(se, str):
        return float(own[key]), float(se)
    return float(own[key]), math.sqrt(sum(se**2 for _, se in by_leaf)) / len(by_leaf)


def _se_of_leaf(found: Mapping, leaf: str, benchmark: Benchmark) -> float:
    """lm-eval's standard error, or where it knows none (a mean by numpy, a single document) that of the logged scores."""
    from jetlab.evaluate.suite import standard_error

    se = found["results"][leaf].get(f"{benchmark.metric}_stderr,{benchmark.filter}", "N/A")
    if not isinstance(se, str):
        return float(se)
    logged = [sample for sample in found["samples"][leaf] if sample["filter"] == benchmark.filter]
    return standard_error([sample[benchmark.metric] for sample in logged])


def beside_paper(
    scores: Mapping[str, Sequence[BenchmarkScore]],
    models: Sequence[str] = PRINTED,
    names: Sequence[str] | None = None,
) -> list[dict[str, str | float | int | None]]:
    """Rows {benchmark, axis, task, metric, shots, printed number of each of `models`, ours and its error}, in percent.

    `scores` are ours, by the name of the model; without any only what is printed is shown. `names` chooses benchmarks
    (None: those that are scored, or all). None stands where the paper prints nothing. Raises ValueError for an unknown name.
    """
    ours = {model: {row.name: row for row in rows} for model, rows in scores.items()}
    scored = dict.fromkeys(name for rows in ours.values() for name in rows)
    names = names or list(scored) or list(read_benchmarks())
    require_known(names)
    table = []
    for benchmark in (read_benchmarks()[name] for name in names):
        row = {"benchmark": benchmark.name, "axis": benchmark.axis, "task": benchmark.task}
        row |= {"metric": benchmark.metric, "shots": benchmark.n_shots}
        row |= {f"{model} (printed)": benchmark.printed(model) for model in models}
        for model, rows in ours.items():
            found = rows.get(benchmark.name)
            row |= {model: 100 * found.value if found else None, f"{model} se": 100 * found.se if found else None}
        table.append(row)
    return table
