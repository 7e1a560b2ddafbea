"""House style and the pictures of the study: curve, bars, heat maps, strip of layers, roofline.

Every axis has a label, every numeric axis its unit in brackets ("loss [nats/token]", "layer [index]"). A block or a
placement has the same colour in every figure; colours stay apart for colour-blind readers, and lines differ in their
marker too. Figures are free of date and random ids: equal data, equal bytes.
"""

import io
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox
from PIL import Image  # matplotlib needs it for every PNG and so installs it

from jetlab.paths import replacing

# tqdm misses a widget that no notebook here needs, and says so in the first cell that imports transformers
warnings.filterwarnings("ignore", message="IProgress not found")

# Paul Tol's "muted" scheme, whose members differ for all common kinds of colour blindness; attention is near black.
LAYER_COLOURS = {
    "attention": "#2b2b2b",
    "sliding_attention": "#8a8a8a",
    "jetblock": "#cc6677",
    "gated_deltanet": "#332288",
    "deltanet": "#88ccee",
    "gla": "#117733",
    "mamba2": "#44aa99",
    "retnet": "#b8a03a",
    "rwkv7": "#aa4499",
    "mlp": "#dddddd",
}
PLACEMENT_COLOURS = {
    "found": "#d55e00",
    "uniform": "#0072b2",
    "random": "#8c8c8c",
    "all_linear": "#56b4e9",
    "teacher": "#000000",
    "exhaustive": "#009e73",
}
OP_COLOURS = {  # an operation of one block takes the block's; the step of a JetBlock must differ from the whole of it
    "gated_delta_rule": LAYER_COLOURS["gated_deltanet"],
    "gated_linear_attention": LAYER_COLOURS["mamba2"],
    "dynamic_conv": "#997700",
    "jetblock_step": "#4477aa",
}
OTHER_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#997700", "#66ccee")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "errorbar.capsize": 3,
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "jetlab",  # else the ids in an SVG are random
    "svg.fonttype": "path",  # looks the same where the font is missing
}
mpl.rcParams.update(STYLE)


class Figure(matplotlib.figure.Figure):
    """A figure that appears once: as the last value of a cell, or through `Results.figure`."""

    def _repr_png_(self) -> bytes:
        """As PNG with 256 colours, a third of the bytes of one with all: an executed notebook holds many figures."""
        full, data = io.BytesIO(), io.BytesIO()
        self.savefig(full, format="png", metadata={"Software": None})
        Image.open(full).convert("RGB").quantize(256).save(data, format="png", optimize=True)
        return data.getvalue()


def figure(n_rows: int = 1, n_cols: int = 1, *, width: float = 7.5, height: float | None = None, **grid: Any):
    """An empty figure in house style and its axes (one, or an array). Sizes in inches, `grid` as in Figure.subplots."""
    fig = Figure(figsize=(width, height or 3.6 * n_rows))
    return fig, fig.subplots(n_rows, n_cols, **grid)


def colour(name: str, position: int = 0) -> str:
    """The fixed colour of a block, placement or operation; other names take the one at `position` of a list of their own."""
    return (LAYER_COLOURS | PLACEMENT_COLOURS | OP_COLOURS).get(name) or OTHER_COLOURS[position % len(OTHER_COLOURS)]


def save(fig: matplotlib.figure.Figure, path: str | os.PathLike) -> None:
    """Write `fig` as SVG, whole or not at all: no date, no version, ids from a fixed salt."""
    with replacing(path) as temporary, mpl.rc_context({k: STYLE[k] for k in ("svg.hashsalt", "svg.fonttype")}):
        fig.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})


def show(fig: matplotlib.figure.Figure) -> None:
    """Show `fig` below the running cell; outside a notebook nothing happens."""
    if "ipykernel" not in sys.modules:
        return
    from IPython.display import display

    display(fig)
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(fig)  # a figure made with pyplot would appear a second time at the end of the cell


def curve(
    rows: Iterable[Mapping[str, Any]],
    x: str,
    y: str | Sequence[str],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    group: str | None = None,
    error: str | None = None,
    baselines: Mapping[str, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    ax=None,
):
    """Lines of column `y` (or several) over column `x`; rows with a blank value are left out.

    `group` names a column: one line for each of its values. `error` names a column with standard errors. `baselines`
    are dashed level lines, e.g. {"chance": 0.25}. Returns the Figure. Raises ValueError if a label lacks its unit or no
    row has both values.
    """
    fig, ax = _axes(ax, x_label, y_label, title)
    rows = _rows(rows)
    columns = [y] if isinstance(y, str) else list(y)
    groups = [None] if group is None else list(dict.fromkeys(row[group] for row in rows))
    lines = [(g, c) for g in groups for c in columns]
    for position, (g, column) in enumerate(lines):
        points = [r for r in rows if (g is None or r[group] == g) and _given(r.get(x)) and _given(r.get(column))]
        if not points:
            raise ValueError(f"a curve needs a row with {x!r} and {column!r}, got none; columns: {sorted(rows[0])}")
        name = str(column if g is None else g if len(columns) == 1 else f"{g}, {column}")
        key = name if len(columns) == 1 or g is None else str(g)
        position = groups.index(g) if len(columns) > 1 and g is not None else position  # lines of a group look alike
        style = {
            "color": colour(key, position),
            "label": name if len(lines) > 1 or baselines else None,
            "marker": MARKERS[position % len(MARKERS)] if len(points) <= 24 else None,
            "linestyle": "-" if g is None else ("-", "--", ":", "-.")[columns.index(column) % 4],
        }
        xs, ys = [p[x] for p in points], [p[column] for p in points]
        if error:
            ax.errorbar(xs, ys, yerr=[p.get(error) or 0 for p in points], **style)
        else:
            ax.plot(xs, ys, **style)
    _baselines(ax, baselines)
    if log_x:
        ax.set_xscale("log", base=2)
    if log_y:
        ax.set_yscale("log")
    if len(lines) > 4:  # more would cover the lines
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif len(lines) > 1 or baselines:
        ax.legend(loc="best")
    return fig


def bars(
    labels: Sequence[str],
    values: Sequence[float] | Mapping[str, Sequence[float]],
    errors: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    *,
    y_label: str,
    x_label: str,
    title: str = "",
    baselines: Mapping[str, float] | None = None,
    fmt: str = "",
    ax=None,
):
    """One bar a label, or groups of bars when `values` maps a series to its values; `errors` are standard errors.

    `x_label` says what the labels are ("block"); `fmt`, e.g. ".2f", writes each value over its bar. Returns the Figure.
    Raises ValueError if lengths differ or `y_label` lacks its unit.
    """
    fig, ax = _axes(ax, x_label, y_label, title, categories="x")
    grouped = isinstance(values, Mapping)
    series = dict(values) if grouped else {"": values}
    errors = (dict(errors) if grouped else {"": errors}) if errors is not None else {}
    labels = [str(label) for label in labels]
    width = 0.8 / len(series)
    for i, (name, heights) in enumerate(series.items()):
        heights = [float(h) for h in heights]
        if len(heights) != len(labels):
            raise ValueError(f"each bar needs a label, got {len(labels)} labels and {len(heights)} values of {name!r}")
        at = np.arange(len(labels)) - 0.4 + width * (i + 0.5)
        colours = colour(str(name), i) if grouped else [colour(label, 0) for label in labels]
        drawn = ax.bar(
            at,
            heights,
            width=width * 0.9,
            color=colours,
            label=str(name) or None,
            yerr=errors.get(name),
            error_kw={"ecolor": "#666666", "elinewidth": 1.2},
        )
        if fmt:
            ax.bar_label(drawn, [format(h, fmt) for h in heights], padding=3, fontsize=9)
    _baselines(ax, baselines)
    longest = max(map(len, labels), default=0)
    slanted = longest * len(labels) > 70  # characters that fit beside each other at full width
    ax.set_xticks(range(len(labels)), labels, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    ax.grid(False, axis="x")
    if grouped or baselines:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def dots(
    groups: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    baselines: Mapping[str, float] | None = None,
    ax=None,
):
    """A dot for every value of a group, in a column each, with a bar at their mean: single runs beside what they average to."""
    fig, ax = _axes(ax, x_label, y_label, title, categories="x")
    for index, (name, values) in enumerate(groups.items()):
        shifts = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else [0.0]
        ax.scatter(index + np.asarray(shifts), values, s=22, color=colour(name, index), zorder=3)
        ax.hlines(np.mean(values), index - 0.3, index + 0.3, color="#222222", linewidth=1.4, zorder=4)
    tilt = {"rotation": 35, "ha": "right"} if max(map(len, groups)) * len(groups) > 60 else {}
    ax.set_xticks(range(len(groups)), list(groups), **tilt)
    _baselines(ax, baselines)
    return fig


def intervals(
    labels: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    errors: Mapping[str, Sequence[float | None]] | None = None,
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    baselines: Mapping[str, float] | None = None,
    ax=None,
):
    """Dots with whiskers ± `errors`, a row for each label and a colour for each series: many estimates at one glance.

    A value that is None leaves its place empty. `y_label` says what the labels are. Returns the Figure.
    Raises ValueError if lengths differ or `x_label` lacks its unit.
    """
    fig, ax = _axes(ax, x_label, y_label, title, categories="y", height=0.9 + 0.34 * len(labels))
    rows = np.arange(len(labels))[::-1].astype(float)
    for i, (name, points) in enumerate(values.items()):
        if len(points) != len(labels):
            raise ValueError(f"each dot needs a label, got {len(labels)} labels and {len(points)} values of {name!r}")
        at = rows + 0.5 * ((len(values) - 1) / 2 - i) / max(len(values), 2)
        whiskers = (errors or {}).get(name, [0.0] * len(points))
        kept = [k for k, value in enumerate(points) if value is not None]
        ax.errorbar(
            [points[k] for k in kept],
            at[kept],
            xerr=[whiskers[k] or 0.0 for k in kept],
            fmt=MARKERS[i % len(MARKERS)],
            color=colour(name, i),
            label=name or None,
            linewidth=1.4,
        )
    for name, value in (baselines or {}).items():
        ax.axvline(value, color="#666666", linestyle="--", linewidth=1.2, label=name)
    ax.set_yticks(rows, [str(label) for label in labels])
    ax.set_ylim(-0.6, len(labels) - 0.4)
    ax.grid(False, axis="y")
    if any(values) or baselines:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def interval_panels(rows, labels: Sequence[str], column: str):
    """`intervals` of rows {`column`, model, where, score [points], se}, a panel for each `where`, a series for each model.

    A label without a row leaves its place empty; a score without `se` has no whisker.
    """
    rows = _rows(rows)
    sides = list(dict.fromkeys(row["where"] for row in rows))
    fig, axes = figure(1, len(sides), width=6 * len(sides), height=3.6, squeeze=False)
    for ax, where in zip(axes.flat, sides, strict=True):
        values, errors = {}, {}
        for model in dict.fromkeys(row["model"] for row in rows if row["where"] == where):
            own = {row[column]: row for row in rows if row["model"] == model}
            values[model] = [own[label]["score"] if label in own else None for label in labels]
            errors[model] = [own[label].get("se") if label in own else None for label in labels]
        errors = {name: [x if x is not None and _given(x) else None for x in own] for name, own in errors.items()}
        intervals(labels, values, errors, x_label="score [points]", y_label=column, title=where, ax=ax)
    return fig


def bubbles(
    points: Sequence[tuple[str, float, float, float]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    ax=None,
):
    """Dots (name, x, y, size) with an area proportional to `size`, each with its name; x is logarithmic over a decade."""
    fig, ax = _axes(ax, x_label, y_label, title)
    largest = max(size for *_, size in points)
    for i, (name, x, y, size) in enumerate(points):
        ax.scatter(x, y, s=1500 * size / largest, color=colour(name, i), alpha=0.45, linewidths=0)
        ax.plot(x, y, "+", color="#222222", markersize=5, markeredgewidth=0.8)  # where the area is too small to be seen
        ax.annotate(name, (x, y), xytext=(0, 5), textcoords="offset points", fontsize=9, ha="center")
    if max(x for _, x, *_ in points) > 10 * min(x for _, x, *_ in points):
        ax.set_xscale("log")
    ax.margins(0.2)
    return fig


def waterfall(
    steps: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float] | None = None,
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    ax=None,
):
    """What each step adds to the one before: the first bar stands on 0, the others float; `errors` are those of the steps.

    Values are levels after each step; what is written over a bar is its difference. Returns the Figure.
    """
    fig, ax = _axes(ax, x_label, y_label, title, categories="x")
    if len(values) != len(steps):
        raise ValueError(f"each level needs a step, got {len(steps)} steps and {len(values)} values")
    values = [float(value) for value in values]
    gains = [values[0], *(after - before for before, after in pairwise(values))]
    bottoms = [0.0, *values[:-1]]
    colours = ["#8c8c8c", *("#0072b2" if gain >= 0 else "#d55e00" for gain in gains[1:])]
    ax.bar(
        range(len(steps)),
        gains,
        bottom=bottoms,
        width=0.62,
        color=colours,
        yerr=errors,
        error_kw={"ecolor": "#222222", "elinewidth": 1.2},
    )
    for i, (bottom, gain) in enumerate(zip(bottoms, gains, strict=True)):
        above = max(bottom, bottom + gain) + (errors[i] if errors is not None else 0.0)
        text = format(gain, ".3f") if i == 0 else format(gain, "+.3f")
        ax.annotate(text, (i, above), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)
        if i + 1 < len(steps):
            ax.plot([i, i + 1], [values[i]] * 2, color="#666666", linewidth=0.8)
    slanted = max(map(len, steps)) * len(steps) > 60
    ax.set_xticks(range(len(steps)), list(steps), rotation=30 if slanted else 0, ha="right" if slanted else "center")
    lowest = min(min(bottoms[1:], default=0.0), min(values))
    room = max(values) - lowest
    ax.set_ylim(max(0.0, lowest - 0.8 * room) if room else None, max(values) + 0.35 * room if room else None)
    ax.grid(False, axis="x")
    return fig


def factors(steps: Sequence[str], values: Sequence[float], floors: Sequence[float], *, title: str = "", ax=None):
    """Factors that multiply, one bar a step from 1 on a logarithmic axis; hollow diamonds are the factors expected of `floors`.

    Returns the Figure. Raises ValueError if a factor is not positive or the lengths differ.
    """
    fig, ax = _axes(ax, "gain over the step above [ratio]", "change", title, categories="y")
    if not len(steps) == len(values) == len(floors):
        raise ValueError(f"each step needs a factor and a floor's, got {len(steps)}, {len(values)} and {len(floors)}")
    if min(*values, *floors) <= 0:
        raise ValueError(f"factors must be positive, got {list(values)} and {list(floors)}; give ratios of speeds")
    places = range(len(steps))
    ax.barh(places, [value - 1 for value in values], left=1, height=0.55, color="#0072b2")
    ax.plot(floors, places, linestyle="", marker="D", fillstyle="none", color="#222222", label="floors")
    for place, value, floor in zip(places, values, floors, strict=True):
        beyond = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        ax.annotate(f"{value:.2f} ×", (max(value, floor, 1.0), place), **beyond)
    ax.set(xscale="log", xlim=(0.8, 1.8 * max(*values, *floors)))
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50) if tick < 1.8 * max(*values, *floors)]
    ax.set_xticks(ticks, [f"{tick} ×" for tick in ticks])
    ax.minorticks_off()
    ax.set_yticks(places, list(steps))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.legend(loc="lower right")
    return fig


def heat_map(
    matrix: Sequence[Sequence[float]],
    x_labels: Sequence[Any],
    y_labels: Sequence[Any],
    *,
    x_label: str,
    y_label: str,
    value_label: str,
    title: str = "",
    fmt: str = ".2f",
    diverging: bool = False,
    ax=None,
):
    """Cells coloured and labelled by value, row 0 on top; NaN cells stay empty.

    `diverging` centres the colours on zero, for differences. Returns the Figure. Raises ValueError if the labels do not
    match the matrix or `value_label` lacks its unit.
    """
    matrix = _cells_of(matrix, x_labels, y_labels)
    _need_unit(value_label, "value_label")
    height = 1.4 + 0.42 * len(y_labels)
    fig, ax = _axes(ax, x_label, y_label, title, categories="xy", height=max(2.6, height))
    mesh = _cells(ax, matrix, x_labels, y_labels, _limits([matrix], diverging), diverging, fmt)
    _colour_bar(fig, mesh, ax, value_label)
    return fig


def heat_maps(
    matrices: Mapping[str, Sequence[Sequence[float]]],
    x_labels: Sequence[Any],
    y_labels: Sequence[Any],
    *,
    x_label: str,
    y_label: str,
    value_label: str,
    fmt: str = ".2f",
    n_cols: int = 2,
    limits: tuple[float, float] | None = None,
):
    """Heat maps of the same rows and columns side by side, each under its name, on one scale of colours.

    `limits` are the ends of that scale, for colours that mean the same in several figures; the cells' own if None.
    Returns the Figure. Raises ValueError as `heat_map` does, and if there is no matrix.
    """
    if not matrices:
        raise ValueError("heat maps need at least one matrix, got none; pass a mapping from names to matrices")
    cells = {name: _cells_of(matrix, x_labels, y_labels) for name, matrix in matrices.items()}
    _need_unit(value_label, "value_label")
    n_rows = -(-len(cells) // n_cols)
    fig, axes = figure(n_rows, n_cols, width=10, height=1.0 + n_rows * (0.7 + 0.3 * len(y_labels)), squeeze=False)
    for i, (ax, (name, matrix)) in enumerate(zip(axes.flat, cells.items(), strict=False)):
        _axes(ax, x_label, y_label, name, categories="xy")
        mesh = _cells(ax, matrix, x_labels, y_labels, limits or _limits(cells.values(), False), False, fmt)
        if i % n_cols:
            ax.set(ylabel="", yticklabels=[])
        if i + n_cols < len(cells):  # another map below repeats the labels
            ax.set(xlabel="", xticklabels=[])
    for ax in axes.flat[len(cells) :]:
        ax.set_axis_off()
    _colour_bar(fig, mesh, axes, value_label)
    return fig


def strip(
    layer_kinds: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    x_label: str = "layer [index, 0 = nearest the input]",
    y_label: str = "model",
    title: str = "",
    ax=None,
):
    """A row of boxes, one a layer, coloured by kind; a mapping name -> kinds gives one row a model. Returns the Figure.

    Raises ValueError if there is no layer.
    """
    models = layer_kinds if isinstance(layer_kinds, Mapping) else {"": layer_kinds}
    models = {name: tuple(kinds) for name, kinds in models.items()}
    depth = max((len(kinds) for kinds in models.values()), default=0)
    if not depth:
        raise ValueError("a strip needs at least one layer, got none; pass the model's layer_kinds")
    named = list(models) != [""]
    fig, ax = _axes(ax, x_label, y_label if named else " ", title, categories="xy", height=1.6 + 0.45 * len(models))
    for row, kinds in enumerate(models.values()):
        for layer, kind in enumerate(kinds):
            ax.broken_barh([(layer + 0.06, 0.88)], (row + 0.1, 0.8), color=colour(kind, layer))
    seen = list(dict.fromkeys(kind for kinds in models.values() for kind in kinds))
    patches = [Patch(color=colour(kind), label=kind.replace("_", " ")) for kind in seen]
    fig.legend(handles=patches, loc="outside upper right", ncols=min(5, len(seen)))
    ax.set_xlim(0, depth)
    ax.set_ylim(len(models), 0)
    shown = range(0, depth, 1 if depth <= 40 else 5)
    ax.set_xticks([i + 0.5 for i in shown], list(map(str, shown)), fontsize=11 if depth <= 24 else 8)
    ax.set_yticks(np.arange(len(models)) + 0.5, [str(name) for name in models])
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return fig


def roofline(kernels, bytes_per_s: float, flops_per_s: float, *, title: str = ""):
    """How near operations come to a machine's two ceilings: TFLOP/s over operations per byte that must move.

    `kernels` has the columns of benchmarks/kernels.py: op, pass, shape, dtype, ms, peer, peer_ms, flops, bytes; a row for
    each peer. The roof is min(`bytes_per_s` · x, `flops_per_s`): below its slope memory is the limit, below its level the
    products. Filled dots are ours; hollow ones on a line with them are the peers, for the same operations in another time.
    Passes that go back have a panel of their own. Left out are rows with `flops` 0, which have no place on a logarithmic
    axis (gated_rms_norm has no products), and rows without `ms` (an error above its bound). Returns the Figure.
    Raises ValueError if no row is left.
    """
    rows = [row for row in _rows(kernels) if row["flops"] > 0 and _given(row["ms"])]
    if not rows:
        raise ValueError("a roofline needs a row with flops above 0 and with ms, got none; did every check fail?")
    ops = list(dict.fromkeys(row["op"] for row in rows))
    markers = dict(zip(dict.fromkeys(["ours", *(row["peer"] for row in rows)]), MARKERS, strict=False))
    panels = [own for back in (False, True) if (own := [row for row in rows if ("backward" in row["pass"]) == back])]
    fig, axes = figure(1, len(panels), width=5.0 * len(panels), height=4.2, squeeze=False)
    labels = {"x_label": "operations per byte [FLOP/B]", "y_label": "speed [TFLOP/s]"}
    clouds = {}
    for ax, own in zip(axes.flat, panels, strict=True):
        _axes(ax, **labels, title=", ".join(dict.fromkeys(row["pass"] for row in own)))
        ax.set(xscale="log", yscale="log")
        _roof(ax, [row["flops"] / row["bytes"] for row in own], bytes_per_s, flops_per_s)
        clouds[ax] = {}
        for op in dict.fromkeys(row["op"] for row in own):
            shade = colour(op, ops.index(op))
            clouds[ax][op] = shade, _speeds(ax, [row for row in own if row["op"] == op], markers, shade)
        ax.set_ylim(min(y for _, cloud in clouds[ax].values() for _, y in cloud) / 2.5, 2 * flops_per_s / 1e12)
    grey = {"color": "#444444", "linestyle": ""}
    handles = [
        Line2D([], [], **grey, marker=m, fillstyle="full" if n == "ours" else "none") for n, m in markers.items()
    ]
    fig.legend(handles, list(markers), loc="outside lower center", ncols=len(markers))
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    for ax, named in clouds.items():
        _names(ax, named)
    return fig


def _roof(ax, intensities: Sequence[float], bytes_per_s: float, flops_per_s: float) -> None:
    """min(`bytes_per_s` · x, `flops_per_s`) in TFLOP/s with its two values, over all `intensities` and its ridge."""
    ridge = flops_per_s / bytes_per_s
    low, high = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    xs = np.array([low, ridge, high])
    ax.plot(
        xs, np.minimum(bytes_per_s * xs, flops_per_s) / 1e12, color="#666666", linewidth=1.4, label="roof", zorder=1
    )
    ax.set_xlim(low, high)
    style = {"color": "#666666", "fontsize": 9, "rotation_mode": "anchor"}
    ax.text(high, 1.1 * flops_per_s / 1e12, f"{flops_per_s / 1e12:.0f} TFLOP/s, a product", ha="right", **style)
    above, start = 1.3 * bytes_per_s / 1e12, 1.1 * low
    steep = {"rotation": np.degrees(np.arctan(above)), "transform_rotates_text": True}  # on paper as steep as the line
    ax.text(start, above * start, f"{bytes_per_s / 1e12:.2f} TB/s, a copy", **style, **steep)


def _speeds(ax, rows: Sequence[Mapping[str, Any]], markers: Mapping[str, str], shade: str) -> list[tuple[float, float]]:
    """Draw the dots of one operation, ours over the peers' and a line through those of one case; returns all dots."""
    sides: dict[str, dict] = {name: {} for name in markers}
    for row in rows:
        case = tuple(row[name] for name in ("pass", "shape", "dtype"))
        x = row["flops"] / row["bytes"]
        sides["ours"][case] = (x, row["flops"] / row["ms"] / 1e9)
        if _given(row["peer_ms"]):
            sides[row["peer"]][case] = (x, row["flops"] / row["peer_ms"] / 1e9)
    for case, (x, _) in sides["ours"].items():
        ys = [own[case][1] for own in sides.values() if case in own]
        ax.vlines(x, min(ys), max(ys), color=shade, linewidth=0.9, zorder=2)
    for name, own in sides.items():
        if own:
            ours = {"markerfacecolor": shade, "markeredgecolor": "white", "markeredgewidth": 0.6, "markersize": 7}
            hollow = {"markerfacecolor": "white", "markeredgecolor": shade, "markersize": 5.5, "markeredgewidth": 1.2}
            style = ours if name == "ours" else hollow
            label = f"{rows[0]['op']}, {name}"
            ax.plot(
                *zip(*own.values(), strict=True), markers[name], **style, label=label, zorder=4 if name == "ours" else 3
            )
    return [point for own in sides.values() for point in own.values()]


def _names(ax, clouds: Mapping[str, tuple[str, Sequence[tuple[float, float]]]]) -> None:
    """Each name, in its colour, beside one of its dots where it covers no dot, no line and no other text.

    Taken is the first place that covers least, from the nearest to the dots and from the lowest dot up. The limits of the
    axes must stand.
    """
    ax.get_figure().draw_without_rendering()  # places on paper are known only after the layout
    texts = [text.get_window_extent() for text in ax.texts]
    lines = [ax.transData.transform(line.get_xydata()) for line in ax.lines if line.get_linestyle() != "None"]
    lines += [ax.transData.transform(segment) for lot in ax.collections for segment in lot.get_segments()]
    along = [
        start + (end - start) * t for line in lines for start, end in pairwise(line) for t in np.linspace(0, 1, 200)
    ]
    dots = ax.transData.transform([point for _, cloud in clouds.values() for point in cloud])
    aligned = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}
    ways = [(0, -1), (1, 0), (-1, 0), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)]
    for name, (shade, cloud) in clouds.items():
        words = textwrap.fill(name.replace("_", " "), 13)  # two short lines find a place more easily than a long one
        style = {"textcoords": "offset points", "color": shade, "fontsize": 10, "linespacing": 1.0}
        text = ax.annotate(words, cloud[0], (0, 0), **style)

        def put(place, text=text) -> Bbox:
            away, text.xy, (right, up) = place
            text.set(position=(away * right, away * up), ha=aligned[right][0], va=aligned[up][1])
            return text.get_window_extent()

        def covered(place) -> float:
            box = put(place)
            outside = not (ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max))
            hidden = box.padded(6).count_contains(dots) + box.padded(2).count_contains(along) / 10
            return hidden + 100 * (outside + box.padded(4).count_overlaps(texts))

        lowest_first = sorted(cloud, key=lambda dot: dot[1])
        places = [(away, dot, way) for away in (8, 20) for dot in lowest_first for way in ways]
        texts.append(put(min(places, key=covered)))


def _axes(ax, x_label: str, y_label: str, title: str, *, categories: str = "", height: float = 3.8):
    """Labelled axes: those given, or those of a new figure."""
    for name, label in (("x", x_label), ("y", y_label)):
        if name in categories:
            if not label:
                raise ValueError(
                    f'every axis needs a label, got none for {name}; say what the entries are, e.g. "block"'
                )
        else:
            _need_unit(label, f"{name}_label")
    if ax is None:
        fig, ax = figure(height=height)
    else:
        fig = ax.get_figure()
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if title:
        ax.set_title(title)
    return fig, ax


def _cells_of(matrix, x_labels: Sequence[Any], y_labels: Sequence[Any]) -> np.ndarray:
    matrix = np.asarray(matrix, dtype=float)
    if matrix.shape != (len(y_labels), len(x_labels)):
        raise ValueError(
            f"the matrix must be rows x columns = {len(y_labels)} x {len(x_labels)} as its labels say, "
            f"got shape {matrix.shape}; transpose it or fix the labels"
        )
    return matrix


def _limits(matrices: Iterable[np.ndarray], diverging: bool) -> tuple[float, float]:
    """Values at the two ends of the colours."""
    finite = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices])
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if diverging:
        high = max(abs(low), abs(high)) or 1.0
        return -high, high
    return (low, high) if low < high else (low, low + 1.0)


def _cells(ax, matrix: np.ndarray, x_labels, y_labels, limits: tuple[float, float], diverging: bool, fmt: str):
    """Coloured cells with their values in them, row 0 on top."""
    low, high = limits
    palette = mpl.colormaps["RdBu" if diverging else "cividis"].resampled(32)  # 32 steps: a small file, a smooth look
    mesh = ax.pcolormesh(matrix, cmap=palette, vmin=low, vmax=high, edgecolors="white", linewidth=1.5)
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value) and fmt:
            red, green, blue, _ = palette((value - low) / (high - low))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            text_colour = "white" if dark else "#222222"
            ax.text(j + 0.5, i + 0.5, format(value, fmt), ha="center", va="center", color=text_colour, fontsize=9)
    ax.set_xticks(np.arange(len(x_labels)) + 0.5, [str(label) for label in x_labels])
    ax.set_yticks(np.arange(len(y_labels)) + 0.5, [str(label) for label in y_labels])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.invert_yaxis()
    for spine in ax.spines.values():
        spine.set_visible(False)
    return mesh


def _colour_bar(fig, mesh, axes, label: str) -> None:
    bar = fig.colorbar(mesh, ax=axes, label=label)
    bar.outline.set_visible(False)
    bar.ax.grid(False)


def _need_unit(label: str, name: str) -> None:
    if not re.search(r"[\[(].+[\])]", label):
        raise ValueError(
            f'{name} must name the unit in brackets, got {label!r}; e.g. "loss [nats/token]", "layer [index]", '
            '"accuracy [fraction]", "ratio [1]"'
        )


def _rows(rows) -> list[Mapping[str, Any]]:
    rows = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)  # a pandas table, or rows as they are
    if not rows:
        raise ValueError("a curve needs at least one row, got none")
    return rows


def _given(value: Any) -> bool:
    return value is not None and value == value  # NaN, pandas' blank, differs from itself


def _baselines(ax, baselines: Mapping[str, float] | None) -> None:
    for i, (name, value) in enumerate((baselines or {}).items()):
        ax.axhline(value, color=colour(name, i + 3), linestyle=(0, (4, 3)), linewidth=1.3, label=str(name))
