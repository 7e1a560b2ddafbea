"""What the report is made of before it becomes Markdown or HTML, and how it prints numbers."""

import dataclasses
from collections.abc import Sequence

from jetlab.report.study import Estimate, Study


@dataclasses.dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class Paragraph:
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Figure:
    name: str  # figures/{name}.svg
    caption: str


Block = Heading | Paragraph | Table | Figure


def number(value: float | None, digits: int = 3) -> str:
    """A number as the tables print it: `digits` significant, whole numbers and thousands in full."""
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", " ")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    text = f"{value:.{digits}g}"
    return f"{value:.2e}" if "e" in text and abs(value) < 1e-4 else text


def with_error(estimate: Estimate | None) -> str:
    """value ± standard error, the value to the last digit that its error leaves."""
    if estimate is None:
        return "–"
    if not estimate.se:
        return number(estimate.value)
    decimals = next((d for d in range(5) if estimate.se >= 10**-d), 4) + (1 if estimate.se < 1000 else 0)
    decimals = min(decimals, 4)
    return f"{estimate.value:.{decimals}f} ± {estimate.se:.{decimals}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(tuple(header), tuple(tuple(str(cell) for cell in row) for row in rows))


def by_task(study: Study, stage: str, columns: dict[str, str]) -> Table:
    """Tasks down, `{task}_{suffix}` across for column title -> suffix; columns that no task has are left out."""
    columns = {title: suffix for title, suffix in columns.items() if study.tasks(stage, suffix)}
    tasks = list(dict.fromkeys(t for suffix in columns.values() for t in study.tasks(stage, suffix)))
    rows = [(t, *(with_error(study.get(stage, f"{t}_{suffix}")) for suffix in columns.values())) for t in tasks]
    return table(("task", *columns), rows)
