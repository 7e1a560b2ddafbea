"""The grid at equal state size (Sec 2.5, Table 2): a row is chosen by accuracy and bytes, never by a clock."""

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
