"""What a stage writes: headline numbers, estimates with errors, curves, figures and the choice it hands on.

A file appears whole or not at all, in fixed order and rounding, without time, host or path: equal runs, equal bytes.
`to_show`, `recorded`, `machine_records` and `upstream` are the other direction: what a notebook reads of its own stage, of
records and of the stages before it.
"""

import csv
import io
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetlab.paths import ROOT, replacing, require, resolve, shown

if TYPE_CHECKING:
    import pandas

MAX_METRICS = 15  # what one reads at a glance in `dvc metrics diff`; all else goes into estimates.csv
METRIC_DIGITS = 4  # significant digits; the last ones move with the machine, the first three are the result
CURVE_DIGITS = 5


class Results:
    """The results folder of one stage, made on first use. A relative `out_dir` is meant from the repository's root."""

    def __init__(self, out_dir: str | Path) -> None:
        self.dir = resolve(out_dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._metrics: dict[str, int | float] = {}
        self._estimates: dict[str, dict] = {}
        self._choice: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        """Where to put a file of another kind (weights), e.g. `results.path("model.safetensors")`.

        Raises ValueError if `name` leaves the folder.
        """
        path = self.dir / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"a result must lie inside {shown(self.dir)}, got {name!r}; give a plain file name")
        return path

    def metrics(self, **values: float) -> None:
        """Headline numbers into metrics.json: flat, sorted, one key a line, 4 significant digits, whole numbers exact.

        Put the unit into the name (`latency_ms`). Several calls add up. Raises ValueError for a value that is not a
        finite number and beyond 15 keys a stage.
        """
        merged = self._metrics | {key: _number(key, value, METRIC_DIGITS) for key, value in values.items()}
        if len(merged) > MAX_METRICS:
            raise ValueError(
                f"metrics.json holds at most {MAX_METRICS} headline numbers, got {len(merged)}; "
                "move the others to .estimate(key, value, se, n)"
            )
        self._metrics = merged
        _write_json(self.dir / "metrics.json", merged, sort_keys=True)

    def estimate(self, key: str, value: float, se: float | None = None, n: int | None = None) -> None:
        """One more row `key,value,se,n` of estimates.csv: se its standard error in the value's unit, n the examples.

        Raises ValueError for a number that is not finite, a negative se, or a key that has a row already.
        """
        if key in self._estimates:
            raise ValueError(f"each estimate is written once, got {key!r} again; add what differs to the key")
        row = {
            "key": key,
            "value": _number(key, value, CURVE_DIGITS),
            "se": None if se is None else _number(f"se of {key}", se, METRIC_DIGITS),
            "n": None if n is None else _number(f"n of {key}", n, CURVE_DIGITS),
        }
        if se is not None and se < 0:
            raise ValueError(f"a standard error cannot be negative, got {se} for {key}")
        self._estimates[key] = row
        _write_csv(self.dir / "estimates.csv", list(self._estimates.values()))

    def curve(self, name: str, rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] = ()) -> None:
        """Rows of a table into `name`.csv: 5 significant digits, columns in order of first use, None stays blank.

        `columns` come first, and make a table that may have no row. Raises ValueError if there is neither a row nor a column,
        or a number is not finite.
        """
        if not len(rows) and not columns:
            raise ValueError(f"{name}.csv needs at least one row, got none; was the number of steps 0?")
        _write_csv(
            self.path(f"{name}.csv"),
            [
                {key: _cell(f"{name}.{key} in row {i}", value) for key, value in row.items()}
                for i, row in enumerate(rows)
            ],
            columns,
        )

    def figure(self, name: str, fig) -> None:
        """Save `fig` as figures/`name`.svg and, in a notebook, show it below the cell."""
        from jetlab import plots

        plots.save(fig, self.path(f"figures/{name}.svg"))
        plots.show(fig)

    def choice(self, **fields: Any) -> None:
        """What the next stage reads: choice.json, keys sorted, numbers to 5 significant digits. Several calls add up.

        Raises ValueError for a number that is not finite or a value that JSON cannot hold.
        """
        self._choice |= {key: _plain(key, value) for key, value in fields.items()}
        _write_json(self.dir / "choice.json", self._choice, sort_keys=True)


@dataclass(frozen=True)
class Written:
    """The small results that a run of a stage left in a folder."""

    dir: Path

    def table(self, name: str) -> "pandas.DataFrame":
        """`name`.csv. Raises MissingInput if that run did not write it."""
        import pandas

        return pandas.read_csv(require(self.dir / f"{name}.csv", self.dir.name))

    def estimates(self) -> "pandas.DataFrame":
        """estimates.csv by key: columns value, se, n."""
        return self.table("estimates").set_index("key")

    def metrics(self) -> dict[str, int | float]:
        """metrics.json. Raises MissingInput if that run did not write it."""
        return json.loads(require(self.dir / "metrics.json", self.dir.name).read_text(encoding="utf-8"))

    def environment(self) -> dict[str, Any]:
        """environment.json: the machine and the packages of a record. Raises MissingInput if it is not there."""
        return json.loads(require(self.dir / "environment.json", self.dir.name).read_text(encoding="utf-8"))

    def choice(self) -> dict[str, Any]:
        """choice.json. Raises MissingInput if that run did not write it."""
        return json.loads(require(self.dir / "choice.json", self.dir.name).read_text(encoding="utf-8"))


def to_show(out_dir: str | Path, stage: str) -> Written:
    """Where the figures of a notebook come from; prints one sentence that says so.

    In the pipeline, whose `out_dir` lies in results/, from the run itself. Reading along, from the committed run of the
    stage, results/`stage`, which is of full size; where there is none yet, from the notebook's own short run.
    """
    own, committed = resolve(out_dir), resolve("results") / stage
    if own.is_relative_to(ROOT / "results"):
        print("The figures show this run.")
        return Written(own)
    if (committed / "metrics.json").is_file():
        print(f"The figures show the study's committed run ({shown(committed)}), not the short one made here.")
        return Written(committed)
    print(f"The figures show the short run made here: no run of stage {stage} is committed yet.")
    return Written(own)


def recorded(name: str, out_dir: str | Path) -> Written:
    """The committed record records/`name` of a longer run, else the notebook's own in `out_dir`; prints which it is."""
    folder = resolve("records") / name
    if (folder / "command.txt").is_file():
        print(f"The figures show the committed record {shown(folder)}, made by the command beside it.")
        return Written(folder)
    print(f"The figures show the short run made here: {shown(folder)} is not committed yet.")
    return Written(resolve(out_dir))


def machine_records(name: str) -> list[Written]:
    """What benchmarks/`name`.py left in records/*/`name`, a folder for each machine, by name; prints which, or that none is.

    A folder counts once its run is over: environment.json is written after the last line of `name`.csv.
    """
    folders = sorted(file.parent for file in resolve("records").glob(f"*/{name}/environment.json"))
    folders = [folder for folder in folders if (folder / f"{name}.csv").is_file()]
    if folders:
        print(
            f"The records of benchmarks/{name}.py are {', '.join(map(shown, folders))}, made by the command beside each."
        )
    else:
        print(f"No run of benchmarks/{name}.py on a GPU is committed yet (records/*/{name}): there is nothing to show.")
    return [Written(folder) for folder in folders]


def upstream(folder: str | Path | None, stage: str, default: Mapping[str, Any]) -> dict[str, Any]:
    """choice.json of an earlier stage in `folder`; `default` if `folder` is None, as when reading along.

    Raises MissingInput, naming the stage to run, if the folder has none.
    """
    if folder is None:
        return dict(default)
    return json.loads(require(Path(folder) / "choice.json", stage).read_text(encoding="utf-8"))


def _number(key: str, value: Any, digits: int) -> int | float:
    """`value` as a Python number: whole numbers and bools exactly, others to `digits` significant digits."""
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if isinstance(value, numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{key} must be a number, got {value!r}; text belongs in .choice or a curve's column")
    if not math.isfinite(value):
        raise ValueError(f"{key} must be finite, got {value}; look at the loss curve, or try a lower learning rate")
    return float(f"{float(value):.{digits}g}") + 0.0  # + 0.0: no -0.0 in a diff


def _cell(key: str, value: Any) -> Any:
    return value if value is None or isinstance(value, str) else _number(key, value, CURVE_DIGITS)


def _plain(key: str, value: Any) -> Any:
    """`value` as JSON data, checked and rounded at every depth."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(f"{key}.{k}", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{key}[{i}]", v) for i, v in enumerate(value)]
    return _number(key, value, CURVE_DIGITS)


def _write_json(path: Path, data: Mapping[str, Any], *, sort_keys: bool) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    columns = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
