"""The grid at equal state size (Sec 2.5, Table 2): a row is chosen by accuracy and bytes, never by a clock."""

from typing import TYPE_CHECKING

from jetlab.evaluate import replicates

if TYPE_CHECKING:
    import pandas as pd

RULE = (
    "the highest mean of retrieval and math accuracy; rows within one standard error of it count as equal, and among "
    "those the one with the fewest bytes of state, then the fewest parameters"
)


def choose(rows: list[dict]) -> dict:
    """The row of the grid that `RULE` picks.

    Each row has `size`, `retrieval`, `retrieval_se`, `math`, `math_se`, `state_bytes` and `params`. The standard error of
    a mean of two tasks is √(se₁² + se₂²) / 2. Raises ValueError for an empty grid.
    """
    if not rows:
        raise ValueError("a grid needs at least one row, got none; list sizes in params.yaml under variants.sizes")

    def mean(row: dict) -> float:
        return (row["retrieval"] + row["math"]) / 2

    top = max(rows, key=mean)
    margin = (top["retrieval_se"] ** 2 + top["math_se"] ** 2) ** 0.5 / 2
    equal = [row for row in rows if mean(row) >= mean(top) - margin]
    return min(equal, key=lambda row: (row["state_bytes"], row["params"], row["size"]))


def choose_by_replicates(cells: "pd.DataFrame") -> str:
    """The name that `RULE` picks by the scores of several seeds on split `select`.

    Its standard errors are those of the differences from the highest, paired within seeds. Raises ValueError for cells of
    several placements, or of one seed.
    """
    scores = cells.assign(both=(cells["retrieval_select"] + cells["math_select"]) / 2)
    wide = replicates.table(scores, "both")
    top = wide.mean().idxmax()
    gaps = {name: replicates.mean_of(wide[top] - wide[name]) for name in wide}
    size = cells.drop_duplicates("name").set_index("name")
    equal = [name for name, gap in gaps.items() if gap.value <= gap.se]
    return min(equal, key=lambda name: (size.state_bytes[name], size.params[name], name))
