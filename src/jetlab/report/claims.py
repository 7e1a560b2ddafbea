"""Claims and their verdicts. A row of paper/claims.csv says where our number comes from and what would decide; the
verdict is computed from the numbers each time, never stored.

    metric_key   name of a function in jetlab.report.derived, or stage/key, or stage/key - stage/key;
                 {k} stands for the number of full-attention layers that the study keeps
    rule         above X · below X · within X (|ours| at most X) · near R (ours within the fraction R of the paper's
                 value) · untested

Where our number has a standard error, a verdict needs the 95 % interval to leave the limit out: by Student's t over the n
that it is a mean of, and two standard errors where n is not known. Scores are fractions; against a claim in points they
count in points, 100 to the whole.
"""

import csv
import dataclasses
from pathlib import Path

from jetlab import paths
from jetlab.report.derived import DERIVED
from jetlab.report.study import STAGES, Estimate, Study

AGREES, DISAGREES, CANNOT_TELL, NOT_TESTED = "agrees", "disagrees", "cannot tell", "not tested here"
VERDICTS = (AGREES, DISAGREES, CANNOT_TELL, NOT_TESTED)
COLUMNS = ("id", "claim", "source", "kind", "paper_value", "unit", "metric_key", "rule", "reason")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A row of paper/claims.csv as it stands; paper_value is None where the source gives no number."""

    id: str
    claim: str
    source: str
    kind: str  # arithmetic, tables, none, or the stage that measures it
    paper_value: float | None
    unit: str
    metric_key: str
    rule: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim with our number (None where there is none) and the verdict."""

    claim: Claim
    ours: Estimate | None
    verdict: str


def read_claims(path: str | Path = "paper/claims.csv") -> list[Claim]:
    """All claims, in the order of the file. Raises ValueError for wrong columns or an id that comes twice."""
    with paths.resolve(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} must have the columns {','.join(COLUMNS)}, got {reader.fieldnames}; restore them")
        rows = list(reader)
    ids = [row["id"] for row in rows]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise ValueError(f"each claim has its own id in {path}, got twice: {', '.join(twice)}; rename one")
    return [Claim(**row | {"paper_value": float(row["paper_value"]) if row["paper_value"] else None}) for row in rows]


def measure(key: str, study: Study) -> Estimate | None:
    """Our number for a metric_key, or None where the study does not have it. Raises ValueError for an unknown name."""
    if key in DERIVED:
        return DERIVED[key](study)
    terms = []
    for term in key.replace("{k}", str(study.budget)).split(" - "):
        stage, slash, name = term.strip().partition("/")
        if not slash:
            raise ValueError(f"metric_key must be stage/key or a name in jetlab.report.derived, got {key!r}; see there")
        terms.append(study.get(stage, name))
    if any(term is None for term in terms):
        return None
    return terms[0] if len(terms) == 1 else terms[0] - terms[1]


def verdict(ours: Estimate | None, rule: str, paper_value: float | None = None) -> str:
    """What `rule` says about our number: one of VERDICTS.

    The distance to the limit must exceed half of the 95 % interval, else "cannot tell", as for two scores that both stand at
    the ceiling with an error of 0; a number without error decides alone.
    Raises ValueError for a rule that is none of above, below, within, near, untested.
    """
    word, _, limit = rule.partition(" ")
    if word == "untested" or ours is None:
        return NOT_TESTED
    try:
        limit = float(limit)
    except ValueError:
        raise ValueError(f"a rule needs a number, got {rule!r}; e.g. 'above 0' or 'near 0.1'") from None
    if word == "above":
        margin = ours.value - limit
    elif word == "below":
        margin = limit - ours.value
    elif word == "within":
        margin = limit - abs(ours.value)
    elif word == "near":
        if paper_value is None:
            raise ValueError(f"the rule {rule!r} compares with paper_value, got none; give the claim its number")
        margin = limit * abs(paper_value) - abs(ours.value - paper_value)
    else:
        raise ValueError(f"a rule starts with above, below, within, near or untested, got {rule!r}")
    if ours.se is not None and abs(margin) <= ours.half_width:
        return CANNOT_TELL
    strict = word in ("above", "below")
    return AGREES if margin > 0 or (margin == 0 and not strict) else DISAGREES


def judge(claim: Claim, study: Study) -> Judged:
    """The claim with our number and the verdict."""
    ours = measure(claim.metric_key, study) if claim.metric_key else None
    if ours is not None and claim.unit == "points" and claim.kind in STAGES:
        ours = ours.times(100)
    return Judged(claim, ours, verdict(ours, claim.rule, claim.paper_value))


def judge_all(study: Study, path: str | Path = "paper/claims.csv") -> list[Judged]:
    """All claims, judged, in the order of the file."""
    return [judge(claim, study) for claim in read_claims(path)]
