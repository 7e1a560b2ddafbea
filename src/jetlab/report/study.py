"""What the stages left in results/, read once: estimates with errors, headline numbers, choices and curves."""

import csv
import dataclasses
import json
import math
from pathlib import Path

from scipy import stats

from jetlab import paths

SCORED_TASKS = ("knowledge", "math", "retrieval", "code")
CONTROL_TASKS = ("facts", "text")
FILES = {  # stage -> files that the report cannot do without
    "teacher": ("metrics.json", "estimates.csv"),
    "supernet": ("estimates.csv", "loss.csv"),
    "placement": ("estimates.csv", "choice.json", "importance.csv", "selectors.csv"),
    "blocks": ("estimates.csv", "choice.json"),
    "block_seeds": ("estimates.csv",),
    "jetblock": ("estimates.csv",),
    "hardware": ("estimates.csv", "grid.csv", "choice.json"),
    "distill": ("estimates.csv",),
    "evaluate": ("estimates.csv", "axes.csv", "samples.csv"),
    "throughput": ("throughput.csv", "roofline.csv"),
    "nano2": ("estimates.csv", "trials.csv", "roads.csv", "layers.csv"),
}
STAGES = tuple(FILES)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number, its standard error in the same unit (None where it has none) and the number n of what it averages."""

    value: float
    se: float | None = None
    n: int | None = None

    @property
    def half_width(self) -> float:
        """Of the 95 % interval: t standard errors with n − 1 degrees of freedom, two where n is not known."""
        if self.se is None:
            return 0.0
        return self.se * (float(stats.t.ppf(0.975, self.n - 1)) if self.n and self.n > 1 else 2.0)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Difference with the errors added in squares: safe, if wide, where both scored the same examples."""
        errors = [e.se for e in (self, other) if e.se is not None]
        se = math.hypot(*errors) if errors else None
        counts = [e.n for e in (self, other) if e.n is not None]
        return Estimate(self.value - other.value, se, min(counts) if counts else None)

    def times(self, factor: float) -> "Estimate":
        """The same in a unit that is 1 / `factor` as large."""
        return Estimate(factor * self.value, None if self.se is None else abs(factor) * self.se, self.n)


def mean(estimates: list[Estimate]) -> Estimate:
    """Mean of independent estimates; its error is √Σse² / count, its n the sum."""
    count = len(estimates)
    errors = [e.se for e in estimates if e.se is not None]
    counts = [e.n for e in estimates if e.n is not None]
    return Estimate(
        sum(e.value for e in estimates) / count,
        math.hypot(*errors) / count if errors else None,
        sum(counts) if counts else None,
    )


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything the report reads. Tables are lists of rows whose cells are numbers where they look like numbers."""

    estimates: dict[str, dict[str, Estimate]]  # stage -> key -> estimate
    metrics: dict[str, dict[str, float]]
    choices: dict[str, dict]
    tables: dict[str, dict[str, list[dict]]]  # stage -> name -> rows
    paper: dict[str, list[dict]]  # table of the papers -> rows
    profile: str  # of the params.yaml with which every stage ran

    def get(self, stage: str, key: str) -> Estimate | None:
        """The estimate of a stage, its headline number where it has no estimate of that name, or None."""
        if key in self.estimates.get(stage, {}):
            return self.estimates[stage][key]
        value = self.metrics.get(stage, {}).get(key)
        return None if value is None else Estimate(float(value))

    @property
    def budget(self) -> int:
        """Full-attention layers that the study keeps."""
        return int(self.choices["placement"]["budget"])

    @property
    def n_teachers(self) -> int:
        """Teachers that the supernet stage used, by its curves."""
        return len({row["supernet"].partition("_")[0] for row in self.tables["supernet"]["loss"]})

    @property
    def n_draws(self) -> int:
        """Random prunings of stage nano2's first model, by its keys `{task}_random_{i}`."""
        count = 0
        while self.tasks("nano2", f"random_{count}"):
            count += 1
        return count

    def tasks(self, stage: str, suffix: str) -> list[str]:
        """Tasks that a stage scored, by its keys `{task}_{suffix}`: scored four, controls, others."""
        ends = "_" + suffix
        found = {key.removesuffix(ends) for key in self.estimates.get(stage, {}) if key.endswith(ends)}
        known = [task for task in (*SCORED_TASKS, *CONTROL_TASKS) if task in found]
        return known + sorted(task for task in found if task not in known and "_" not in task)


def _cell(text: str):
    if text is None or text == "":
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "e" not in text.lower() and "." not in text else number


def read_table(path: Path) -> list[dict]:
    """Rows of a csv; a cell that reads as a number is one, an empty cell is None."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _cell(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _estimates(path: Path) -> dict[str, Estimate]:
    rows = read_table(path)
    if rows and not {"key", "value"} <= set(rows[0]):
        raise ValueError(
            f"{paths.shown(path)} must have the columns key,value,se,n, got {','.join(rows[0])}; run its stage again"
        )
    return {row["key"]: Estimate(float(row["value"]), row.get("se"), row.get("n")) for row in rows}


def load(results: str | Path = "results", paper: str | Path = "paper") -> Study:
    """Read the results of all stages and the papers' tables.

    Extra files and keys are kept or ignored; a missing file raises jetlab.paths.MissingInput with the stage to run, and
    an estimates.csv without its columns raises ValueError, as do results of more than one profile.
    """
    study, profiles = Study({}, {}, {}, {}, {}, ""), {}
    for stage, files in FILES.items():
        folder = Path(results) / stage
        for file in files:
            paths.require(folder / file, stage)
        folder = paths.resolve(folder)
        study.tables[stage] = {}
        for path in sorted(folder.glob("*.csv")):
            if path.name == "estimates.csv":
                study.estimates[stage] = _estimates(path)
            else:
                study.tables[stage][path.stem] = read_table(path)
        for name, store in (("metrics.json", study.metrics), ("choice.json", study.choices)):
            if (folder / name).exists():
                store[stage] = json.loads((folder / name).read_text(encoding="utf-8"))
        if stage in study.metrics:
            profiles[stage] = study.metrics[stage].pop("profile", "none")
    for path in sorted(paths.resolve(paper).glob("*.csv")):
        study.paper[path.stem] = read_table(path)
    return dataclasses.replace(study, profile=_one_profile(profiles))


def _one_profile(profiles: dict[str, str]) -> str:
    """The profile of all stages. Raises ValueError if they differ: a table of both would compare nothing."""
    if len(names := set(profiles.values())) != 1:
        found = "; ".join(f"{name}: {', '.join(s for s, p in profiles.items() if p == name)}" for name in sorted(names))
        raise ValueError(
            f"all results must be of one profile, got {found}; run `dvc repro` with one params.yaml, each profile on a "
            "branch of its own"
        )
    return names.pop()
