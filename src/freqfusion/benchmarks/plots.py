"""Plots of a benchmark: times over their floors, and how time and memory grow."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from freqfusion.benchmarks.cases import BOTH, PASSES, Case
from freqfusion.benchmarks.report import Report
from freqfusion.benchmarks.scaling import NAME, Axis, curve
from freqfusion.drawing.figures import plot_curves

Points = Sequence[tuple[float, float]]
GUIDE = "#777777"


def draw(report: Report) -> dict[str, Figure]:
    """Every plot for which there are figures, by file name."""
    figures = {}
    for pass_name in PASSES:
        if any(result.samples and result.pass_name == pass_name for result in report.results):
            name = f"over_floor_{pass_name.replace('+', '_')}.png"
            figures[name] = plot_over_floor(report, pass_name)
    for axis in report.axes():
        for quantity, label in (("time", "time, ms"), ("memory", "peak memory, MiB")):
            curves = _curves(report, axis, quantity)
            if any(len(points) > 1 for points in curves.values()):
                title = f"{NAME}, forward and backward pass"
                figures[f"{quantity}_by_{axis.name}.png"] = plot_growth(curves, axis, title, label)
    return figures


def _curves(report: Report, axis: Axis, quantity: str) -> dict[str, Points]:
    if quantity == "memory" and axis.name == "threads":
        return {}  # threads share it
    unit = {"time": 1e-3, "memory": 2**20}[quantity]
    curves: dict[str, Points] = {}
    for contestant in report.contestants(axis):
        points = curve(report.points, axis, contestant, BOTH, quantity)
        if points:
            curves[contestant] = [(x, y / unit) for x, y in points]
    return curves


def plot_over_floor(report: Report, pass_name: str) -> Figure:
    """Time over its floor for every case, a mark a contestant; the axis is logarithmic.

    Args:
        report: of a run.
        pass_name: of :data:`freqfusion.benchmarks.cases.PASSES`.
    """
    results = [result for result in report.results if result.samples and result.pass_name == pass_name]
    rows: dict[Case, int] = {}
    marks: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        row = rows.setdefault(result.case, len(rows))
        ratio = result.median / report.limits.floor(result.work)[0]
        marks.setdefault(result.contestant, []).append((ratio, row))
    figure = plot_curves(
        marks,
        title=f"Time over the machine's floor, {pass_name}",
        x_label="times the floor",
        size=(8.0, 1.6 + 0.3 * len(rows)),
    )
    axes = figure.axes[0]
    for line, marker in zip(axes.lines, "os^Dv" * len(marks), strict=False):
        line.set(linestyle="none", marker=marker, markersize=6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=GUIDE, linestyle=":", linewidth=1.6)
    axes.set_yticks(range(len(rows)), [str(case) for case in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _legend_below(figure)
    return figure


def plot_growth(curves: Mapping[str, Points], axis: Axis, title: str, y_label: str) -> Figure:
    """Curves on logarithmic axes beside a dotted line of growth in proportion (for threads: of ideal division).

    Args:
        curves: for each contestant its points, in rising order and positive.
        axis: what grows.
        title: set above, on the left.
        y_label: of the vertical axis.
    """
    figure = plot_curves(curves, title=title, x_label=axis.label, y_label=y_label, size=(6.4, 4.4))
    axes = figure.axes[0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = sorted({x for points in curves.values() for x, _ in points})
    labels = [f"{math.isqrt(int(x))}²" if axis.name == "pixels" else f"{x:g}" for x in values]
    axes.set_xticks(values, labels)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    for direction in (axes.xaxis, axes.yaxis):
        direction.set_minor_locator(NullLocator())
    power, anchor = (-1, 0) if axis.name == "threads" else (1, -1)
    # through one end of the lowest curve: where the work is largest, or where one thread does it
    x, y = min((points[anchor] for points in curves.values()), key=lambda point: point[1] / point[0])
    guide = [y * (value / x) ** power for value in values]
    label = "ideal" if axis.name == "threads" else "in proportion"
    axes.plot(values, guide, color=GUIDE, linestyle=":", linewidth=1.6, label=label, zorder=1)
    _legend_below(figure)
    return figure


def _legend_below(figure: Figure) -> None:
    (axes,) = figure.axes
    handles, labels = axes.get_legend_handles_labels()
    axes.legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
