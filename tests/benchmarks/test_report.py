"""Tables, page, JSON and plots of known figures."""

import json

import pytest

from freqfusion.benchmarks.cases import BOTH, FORWARD, PASSES, Case, Shape, Work
from freqfusion.benchmarks.machine import Limits
from freqfusion.benchmarks.plots import draw, plot_over_floor
from freqfusion.benchmarks.report import GROWTH_HEADER, HEADER, Report, significant
from freqfusion.benchmarks.runner import Result
from freqfusion.benchmarks.scaling import AXES, Point, curve, growth_exponent
from freqfusion.drawing.figures import figure_bytes

MIB = 2**20
CASE = Case("carafe k5 x2", Shape(1, 256, (32, 32), (64, 64)))
OTHER = Case("resample", Shape(1, 256, (29, 43), (57, 85)))
WORK = Work(flops=3_000_000_000, bytes=20_000_000)
CONDITIONS = {
    "device_name": "a processor",
    "device": "cpu",
    "threads": 2,
    "torch": "2.15.0",
    "python": "3.11",
    "system": "Linux",
    "freqfusion": "0.1.0",
    "dtype": "float32",
    "rounds": 3,
    "date": "2026-11-22",
    "load": "0.1 0.1 0.1",
    "command": "freqfusion benchmark",
}


def result(contestant, seconds, ratio, peak, case=CASE, pass_name=FORWARD, note=""):
    return Result(case, contestant, pass_name, WORK, seconds, ratio, peak, note)


@pytest.fixture
def report():
    """0.1 s is the least time of a pass: 20 MB at 200 MB/s, against 3 GFLOP at 60 GFLOP/s."""
    growth = {"unfold": (4.0, 1.0), "native": (0.5, 1.0)}
    points = [
        Point(
            axis,
            value,
            [
                Result(
                    Case("FreqFusion", axis.shape(value)),
                    contestant,
                    pass_name,
                    WORK,
                    (factor * (value**power if axis.name != "threads" else 1 / value),) * 3,
                    1.0,
                    None if axis.name == "threads" else int(8 * MIB * factor * value),
                )
                for pass_name in PASSES
                for contestant, (factor, power) in growth.items()
            ],
        )
        for axis in AXES
        for value in axis.values
    ]
    results = [
        result("unfold", (2.0, 2.2, 2.4), 1.0, 100 * MIB),
        result("torch", (0.5, 0.5, 0.5), 4.4, 50 * MIB),
        result("native", (0.2, 0.2, 0.2), 11.0, 10 * MIB),
        result("unfold", (0.4, 0.4, 0.4), 1.0, 10 * MIB, OTHER),
        result("torch", (0.401, 0.4, 0.4), 0.999, 10 * MIB, OTHER),
        result("native", (0.5, 0.5, 0.5), 0.8, 40 * MIB, OTHER),
        result("unfold", (30.0,), 1.0, None, OTHER, BOTH),
        result("native", (), None, None, OTHER, BOTH, note="[no] kernel"),
    ]
    return Report(dict(CONDITIONS), Limits(200e6, 60e9), results, points)


def test_rows(report):
    assert report.shapes() == [CASE.shape, OTHER.shape]
    rows = report.rows(CASE.shape)
    assert all(len(row) == len(HEADER) for row in rows)
    assert rows[0] == (
        "carafe k5 x2",
        "fwd",
        "unfold",
        "2,200 ± 100",
        "1.00",
        "22.0",
        "memory",
        "1.36",
        "0.009",
        "100.0",
    )
    assert rows[2][3:6] == ("200 ± 0.000", "11.0", "2.00")
    assert report.rows(OTHER.shape)[-1][3] == "30,000"  # one round has no spread
    assert [row[2] for row in report.rows(OTHER.shape)] == ["unfold", "torch", "native", "unfold"]


def test_losses_are_told(report):
    place = "resample, 1x256x29x43 to 57x85, forward: native"
    assert report.losses() == [
        f"{place} runs at 0.800 times the speed of unfold",
        f"{place} runs at 0.800 times the speed of torch",
        f"{place} takes 40.0 MiB, unfold 10.0",
    ]


def test_what_is_left_out_is_told(report):
    place = "resample, 1x256x29x43 to 57x85"
    assert report.absences() == [
        f"{place}: unfold, forward+backward: 1 of 3 rounds; more would have taken over 10 s",
        f"{place}: native did not run: [no] kernel",
    ]


def test_growth(report):
    rows = {row[:3]: row[3:] for row in report.growth_rows()}
    assert len(next(iter(rows.values()))) == len(GROWTH_HEADER) - 3
    assert rows["pixels", "f+b", "native"][:4] == ("1,024", "1,048,576", "524,288,000", "1.00")
    assert rows["channels", "fwd", "unfold"][3:] == ("1.00", "8,192.0", "1.00")
    assert rows["threads", "fwd", "unfold"][4:] == ("-", "-")


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponents(power):
    constant = [(x, 3.0 * x**power) for x in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)]
    assert growth_exponent(constant) == pytest.approx(power)
    floor = [(x, max(y, 3.0 * 8.0**power)) for x, y in constant]  # constant costs hide the smaller half
    assert growth_exponent(floor) == pytest.approx(power)
    assert growth_exponent(constant[:2]) is None


def test_curves_skip_what_was_not_measured(report):
    axis = AXES[1]
    empty = Result(Case("FreqFusion", axis.shape(64)), "native", BOTH, WORK, note="gone")
    points = [Point(axis, 64, [empty])]
    assert curve(points, axis, "native", BOTH, "time") == curve(points, axis, "native", BOTH, "memory") == []
    assert curve(report.points, axis, "native", BOTH, "time")[0] == (32.0, 16.0)


def test_json_holds_every_figure(report):
    content = json.loads(report.json())
    assert content["conditions"]["threads"] == 2
    assert content["limits"] == {"bytes_per_second": 200e6, "flops_per_second": 60e9}
    first, *_, last = content["results"]
    assert first["seconds"] == [2.0, 2.2, 2.4]
    assert (first["median_seconds"], first["floor_seconds"], first["bound"]) == (2.2, 0.1, "memory")
    assert first["shape"] == {"batch": 1, "channels": 256, "coarse": [32, 32], "fine": [64, 64]}
    assert (last["median_seconds"], last["note"]) == (None, "[no] kernel")
    assert len(content["scaling"]) == sum(len(axis.values) for axis in AXES)


def test_page(report):
    page = report.markdown(["a_b.png"])
    assert (
        "| carafe k5 x2 | fwd | native | 200 ± 0.000 | 11.0 | 2.00 | memory | 15.0 | 0.100 | 10.0 |" in page
    )
    assert "copy 0.200 GB/s, matrix product 60.0 GFLOP/s" in page
    assert page.index("## Losses") < page.index("runs at 0.800") < page.index("## Left out")
    assert "![a b](a_b.png)" in page
    report.results = report.results[:3]
    assert "## Losses\n\nNone." in report.markdown([])


def test_plots(report):
    figures = draw(report)
    names = {"over_floor_forward.png", "over_floor_forward_backward.png", "time_by_pixels.png"}
    assert names < set(figures)
    assert "memory_by_pixels.png" in figures
    assert "memory_by_threads.png" not in figures
    assert all(len(figure_bytes(figure)) > 1000 for figure in figures.values())
    (axes,) = figures["time_by_pixels.png"].axes
    *_, guide = axes.lines
    xs, ys = guide.get_data()
    assert ys[-1] / ys[0] == pytest.approx(xs[-1] / xs[0])
    assert ys[-1] == pytest.approx(0.5e3 * 2**20)  # through the end of the lower curve
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "32²",
        "64²",
        "128²",
        "256²",
        "512²",
        "1024²",
    ]


def test_marks_over_the_floor(report):
    (axes,) = plot_over_floor(report, FORWARD).axes
    marks = {line.get_label(): line.get_xydata().tolist() for line in axes.lines[:3]}
    assert marks["native"] == [[pytest.approx(2.0), 0.0], [pytest.approx(5.0), 1.0]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [str(CASE), str(OTHER)]


def test_a_report_without_figures_has_no_plots():
    assert draw(Report(dict(CONDITIONS), Limits(1.0, 1.0))) == {}


def test_digits():
    assert significant(999.6) == "1,000"
    assert significant(99.99) == "100"
    assert significant(0.99) == "0.990"
