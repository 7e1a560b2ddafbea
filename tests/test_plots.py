import math
import subprocess
import sys

import pytest

from jetlab import plots

ALL_PLOTS = """
import sys
from pathlib import Path
from jetlab import plots

rows = [{"step": i, "loss": 1 / (i + 1), "se": 0.01, "block": b} for b in ("jetblock", "gla") for i in range(5)]
figures = {
    "curve": plots.curve(rows, "step", "loss", x_label="step [index]", y_label="loss [nats/token]", group="block",
                         error="se", baselines={"chance": 0.25}),
    "bars": plots.bars(["a", "b"], [1, 2], [0.1, 0.2], x_label="block", y_label="accuracy [fraction]", fmt=".1f"),
    "dots": plots.dots({"gla": [0.1, 0.2], "retnet": [0.3]}, x_label="block", y_label="accuracy [fraction]"),
    "intervals": plots.intervals(["math", "code"], {"found": [0.1, None], "none": [0.2, 0.3]}, {"found": [0.1, None]},
                                 x_label="gap [accuracy]", y_label="task", baselines={"none": 0.0}),
    "bubbles": plots.bubbles([("a", 10, 0.5, 3), ("b", 90, 0.6, 1)], x_label="speed [1/s]", y_label="score [1]"),
    "waterfall": plots.waterfall(["a", "b", "c"], [0.5, 0.7, 0.6], [0.1, 0.1, 0.1], x_label="step", y_label="score [1]"),
    "heat_map": plots.heat_map([[1, 2], [3, 4]], [0, 1], ["math", "code"], x_label="layer [index]", y_label="family",
                               value_label="importance [nats]"),
    "heat_maps": plots.heat_maps({"gla": [[1, 2]], "retnet": [[3, 4]], "deltanet": [[5, 6]]}, [0, 1], ["a"],
                                 x_label="token", y_label="key", value_label="value read [1]"),
    "roofline": plots.roofline([{"op": "jetblock", "pass": "forward", "shape": "1x2", "dtype": "bf16", "ms": 0.5,
                                 "peer": "pytorch", "peer_ms": 2.0, "flops": 3e11, "bytes": 1e8}], 3e12, 7e14),
    "strip": plots.strip({"found": ["jetblock", "attention"], "uniform": ["attention", "jetblock"]}),
}
for name, figure in figures.items():
    plots.save(figure, Path(sys.argv[1]) / f"{name}.svg")
    (Path(sys.argv[1]) / f"{name}.png").write_bytes(figure._repr_png_())
"""


def test_two_processes_write_the_same_bytes_and_nothing_else(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        subprocess.run([sys.executable, "-c", ALL_PLOTS, str(tmp_path / folder)], check=True)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    drawn = "bars bubbles curve dots heat_map heat_maps intervals roofline strip waterfall".split()
    assert files == sorted(f"{name}.{kind}" for name in drawn for kind in ("svg", "png"))
    for name in files:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes(), name
        assert len(content) < (25_000 if name.endswith(".png") else 80_000), name  # a notebook embeds the PNG
    assert b"<dc:date>" not in (tmp_path / "a" / "curve.svg").read_bytes()


def test_every_axis_needs_a_label_and_every_number_a_unit():
    rows = [{"x": 1, "y": 2}]
    with pytest.raises(ValueError, match=r"y_label must name the unit in brackets, got 'loss'"):
        plots.curve(rows, "x", "y", x_label="step [index]", y_label="loss")
    with pytest.raises(ValueError, match=r"x_label must name the unit"):
        plots.curve(rows, "x", "y", x_label="", y_label="loss [nats/token]")
    with pytest.raises(ValueError, match=r"every axis needs a label, got none for x"):
        plots.bars(["a"], [1], y_label="accuracy [fraction]", x_label="")
    with pytest.raises(ValueError, match=r"value_label must name the unit"):
        plots.heat_map([[1]], ["a"], ["b"], x_label="layer", y_label="task", value_label="importance")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="got 2 labels and 1 values"):
        plots.bars(["a", "b"], [1], x_label="block", y_label="accuracy [fraction]")
    with pytest.raises(ValueError, match=r"rows x columns = 1 x 2.*got shape \(1, 1\)"):
        plots.heat_map([[1]], ["a", "b"], ["c"], x_label="layer", y_label="task", value_label="importance [nats]")
    with pytest.raises(ValueError, match="need at least one matrix, got none"):
        plots.heat_maps({}, ["a"], ["b"], x_label="token", y_label="key", value_label="value read [1]")
    with pytest.raises(ValueError, match="needs a row with 'x' and 'z'"):
        plots.curve([{"x": 1, "y": 2}], "x", "z", x_label="step [index]", y_label="loss [nats]")
    with pytest.raises(ValueError, match="at least one layer"):
        plots.strip([])


def test_blank_values_are_left_out_of_a_curve():
    rows = [{"x": 0, "y": 1.0}, {"x": 1, "y": None}, {"x": 2, "y": math.nan}, {"x": 3, "y": 0.5}]
    figure = plots.curve(rows, "x", "y", x_label="step [index]", y_label="loss [nats]")
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 3]


def test_a_helper_draws_into_given_axes():
    figure, axes = plots.figure(1, 2)
    assert plots.strip(["attention"], ax=axes[0]) is figure
    assert plots.bars(["a"], [1], x_label="block", y_label="accuracy [fraction]", ax=axes[1]) is figure
    assert len(figure.axes) == 2


def test_heat_maps_side_by_side_share_their_colours_and_leave_no_empty_frame():
    labels = {"x_label": "token", "y_label": "key", "value_label": "value read [1]"}
    figure = plots.heat_maps({"gla": [[0, 1]], "retnet": [[2, 3]], "deltanet": [[4, 9]]}, [0, 1], ["a"], **labels)
    *maps, empty, bar = figure.axes
    assert [ax.get_title(loc="left") for ax in maps] == ["gla", "retnet", "deltanet"]
    assert {ax.collections[0].get_clim() for ax in maps} == {(0.0, 9.0)}
    assert not empty.axison
    assert bar.get_ylabel() == "value read [1]"
    assert [ax.get_xlabel() for ax in maps] == ["", "token", "token"]  # the lowest map of each column says it


def test_each_block_and_placement_has_a_colour_of_its_own():
    for palette in (plots.LAYER_COLOURS, plots.PLACEMENT_COLOURS, plots.OP_COLOURS):
        assert len(set(palette.values())) == len(palette)
    assert plots.colour("jetblock", 3) == plots.LAYER_COLOURS["jetblock"]
    assert plots.colour("something else", 7) == plots.OTHER_COLOURS[1]


def test_importing_jetlab_needs_neither_papermill_nor_matplotlib():
    code = "import sys, jetlab.run, jetlab.track; print({'papermill', 'matplotlib', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_waterfall_floats_each_step_on_the_one_before():
    fig = plots.waterfall(["a", "b", "c"], [0.5, 0.7, 0.6], x_label="step", y_label="score [1]")
    bars = fig.axes[0].patches
    assert [round(bar.get_y(), 9) for bar in bars] == [0.0, 0.5, 0.7]
    assert [round(bar.get_height(), 9) for bar in bars] == [0.5, 0.2, -0.1]
    assert [text.get_text() for text in fig.axes[0].texts] == ["0.500", "+0.200", "-0.100"]


def test_the_area_of_a_bubble_is_its_size():
    fig = plots.bubbles([("a", 10, 0.5, 4.0), ("b", 90, 0.6, 1.0)], x_label="speed [1/s]", y_label="score [1]")
    large, small = (dots.get_sizes()[0] for dots in fig.axes[0].collections)
    assert large == 4 * small


def test_intervals_leave_out_what_is_not_known():
    fig = plots.intervals(["math", "code"], {"": [0.1, None]}, x_label="gap [accuracy]", y_label="task")
    (dots,) = fig.axes[0].containers
    assert len(dots.lines[0].get_xdata()) == 1
    with pytest.raises(ValueError, match="each dot needs a label, got 1 labels and 2 values"):
        plots.intervals(["math"], {"": [0.1, 0.2]}, x_label="gap [accuracy]", y_label="task")


def kernels(op, passes, ms, peers, flops, n_bytes, shape="1x2"):
    """Rows as benchmarks/kernels.py writes them, one a peer."""
    case = {"op": op, "pass": passes, "shape": shape, "dtype": "bfloat16", "ms": ms, "flops": flops, "bytes": n_bytes}
    return [case | {"peer": peer, "peer_ms": peer_ms} for peer, peer_ms in peers.items()]


def drawn(ax):
    """Points of each line by its label."""
    return {line.get_label(): list(map(tuple, line.get_xydata().round(9).tolist())) for line in ax.lines}


def test_a_roofline_has_its_roof_and_each_operation_where_it_was_measured():
    rows = kernels("gated_delta_rule", "forward", 1.0, {"pytorch": 20.0, "fla": 2.0}, 2e11, 2e9)
    rows += kernels("gated_delta_rule", "forward", 0.5, {"pytorch": math.nan, "fla": 4.0}, 2e11, 1e9, shape="other")
    rows += kernels("jetblock_step", "decode", 0.1, {"pytorch": 1.0}, 1e8, 1e8)
    rows += kernels("gated_delta_rule", "forward+backward", 4.0, {"pytorch": 60.0, "fla": 8.0}, 6e11, 5e9)
    figure = plots.roofline(rows, bytes_per_s=2e12, flops_per_s=6e14, title="a machine")
    forward, backward = figure.axes
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["forward, decode", "forward+backward"]

    roof = dict(drawn(forward)["roof"])
    assert roof.pop(300.0) == 600.0  # FLOP/B and TFLOP/s where the two ceilings meet
    (left, slope), (right, level) = sorted(roof.items())
    assert left < 1.0 and slope == pytest.approx(2 * left) and right > 300.0 and level == 600.0

    points = drawn(forward)
    assert points["gated_delta_rule, ours"] == [(100.0, 200.0), (200.0, 400.0)]
    assert points["gated_delta_rule, fla"] == [(100.0, 100.0), (200.0, 50.0)]
    assert points["gated_delta_rule, pytorch"] == [(100.0, 10.0)]  # no time of the other
    assert points["jetblock_step, ours"] == [(1.0, 1.0)]
    assert drawn(backward)["gated_delta_rule, ours"] == [(120.0, 150.0)]
    joined = [segment.round(9).tolist() for lines in forward.collections for segment in lines.get_segments()]
    assert joined == [[[100, 10], [100, 200]], [[200, 50], [200, 400]], [[1, 0.1], [1, 1]]]
    for ax in figure.axes:
        for line in ax.lines[1:]:
            hollow = line.get_markerfacecolor() == "white"
            assert hollow == (not line.get_label().endswith("ours"))


def test_a_roofline_leaves_out_what_has_no_products_or_missed_its_check():
    rows = kernels("gated_rms_norm", "forward", 0.1, {"pytorch": 1.0}, 0.0, 1e9)
    rows += kernels("gated_delta_rule", "forward", math.nan, {"fla": 2.0}, 2e11, 2e9)
    with pytest.raises(ValueError, match="needs a row with flops above 0 and with ms"):
        plots.roofline(rows, 2e12, 6e14)
    figure = plots.roofline([*rows, *kernels("jetblock", "forward", 1.0, {"pytorch": 2.0}, 3e11, 1e8)], 2e12, 6e14)
    assert set(drawn(figure.axes[0])) == {"roof", "jetblock, ours", "jetblock, pytorch"}


def test_the_names_in_a_roofline_cover_neither_each_other_nor_a_dot():
    rows = kernels("gated_delta_rule", "forward", 1.0, {"pytorch": 20.0}, 2e11, 2e9)
    rows += kernels("gated_linear_attention", "forward", 1.2, {"pytorch": 18.0}, 2e11, 2.4e9)
    rows += kernels("dynamic_conv", "forward", 0.5, {"pytorch": 9.0}, 2e11, 1.6e9)
    figure = plots.roofline(rows, 2e12, 6e14)
    figure.draw_without_rendering()
    (ax,) = figure.axes
    boxes = {text.get_text().replace("\n", " "): text.get_window_extent() for text in ax.texts}
    dots = [ax.transData.transform(line.get_xydata()) for line in ax.lines[1:]]
    assert {"gated delta rule", "gated linear attention", "dynamic conv"} < set(boxes)
    for name, box in boxes.items():
        assert not box.count_overlaps([other for key, other in boxes.items() if key != name]), name
        assert not any(box.count_contains(points) for points in dots), name


def test_factors_start_at_one_and_show_what_the_floors_say():
    fig = plots.factors(["first", "second"], [4.0, 0.9], [3.0, 1.1], title="chain")
    (ax,) = fig.axes
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert bars == [(1, 3.0), (1, pytest.approx(-0.1))]
    assert list(ax.lines[0].get_xdata()) == [3.0, 1.1]
    assert [text.get_text() for text in ax.texts] == ["4.00 ×", "0.90 ×"]
    assert ax.get_xscale() == "log" and ax.yaxis_inverted()


@pytest.mark.parametrize(
    ("values", "floors", "message"),
    [([1.0], [1.0, 2.0], "got 2, 1 and 2"), ([1.0, 0.0], [1.0, 1.0], "must be positive")],
)
def test_factors_refuse_what_does_not_multiply(values, floors, message):
    with pytest.raises(ValueError, match=message):
        plots.factors(["first", "second"], values, floors)


def test_columns_of_one_group_share_a_colour():
    rows = [{"x": x, "g": g, "a": x, "b": 2 * x} for x in (1, 2) for g in ("one", "other")]
    fig = plots.curve(rows, "x", ["a", "b"], group="g", x_label="x [1]", y_label="y [1]")
    colours = [line.get_color() for line in fig.axes[0].lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
