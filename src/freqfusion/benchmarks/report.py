"""A benchmark's figures as rows of tables, as JSON and as a Markdown page."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from freqfusion.benchmarks.cases import BOTH, FORWARD, PASSES, PEER, Shape
from freqfusion.benchmarks.machine import Limits
from freqfusion.benchmarks.runner import BUDGET_SECONDS, Result
from freqfusion.benchmarks.scaling import NAME, Axis, Point, curve, growth_exponent
from freqfusion.benchmarks.training import LAYOUTS, Throughput

HEADER = ("case", "pass", "by", "ms", "times unfold", "over floor", "bound", "GFLOP/s", "GB/s", "peak MiB")
GROWTH_HEADER = ("with", "pass", "by", "from", "to", "time", "exponent", "memory", "exponent")
TRAINING_HEADER = ("network", "images", "layout", "by", "ms", "images/s", "times plain", "peak MiB")
TEXT_COLUMNS = ("case", "pass", "by", "bound", "with", "network", "images", "layout")
SHORT = {FORWARD: "fwd", BOTH: "f+b"}
EQUAL = 0.02
"""Times that differ by less, relative to each other, count as equal: a run cannot tell them apart."""


@dataclass
class Report:
    """All that one run measured."""

    conditions: dict[str, Any]
    """Machine, versions and settings, by name."""
    limits: Limits
    results: list[Result] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    training: list[Throughput] = field(default_factory=list)
    unbegun: list[str] = field(default_factory=list)
    """What the time did not suffice for."""

    def shapes(self) -> list[Shape]:
        """Every shape once, in order."""
        return list(dict.fromkeys(result.case.shape for result in self.results))

    def rows(self, shape: Shape) -> list[tuple[str, ...]]:
        """The cells of :data:`HEADER` for all that ran at a shape."""
        return [self._row(result) for result in self.results if result.case.shape == shape and result.samples]

    def _row(self, result: Result) -> tuple[str, ...]:
        seconds = result.median
        least, bound = self.limits.floor(result.work)
        return (
            result.case.name,
            SHORT[result.pass_name],
            result.contestant,
            _milliseconds(result),
            "-" if result.ratio is None else significant(result.ratio),
            significant(seconds / least),
            bound,
            significant(result.work.flops / seconds / 1e9),
            significant(result.work.bytes / seconds / 1e9),
            _mebibytes(result.peak_bytes),
        )

    def growth_rows(self) -> list[tuple[str, ...]]:
        """The cells of :data:`GROWTH_HEADER`; times and memory are those of the largest value."""
        rows = []
        for axis in self.axes():
            for pass_name in PASSES:
                for contestant in self.contestants(axis):
                    time = curve(self.points, axis, contestant, pass_name, "time")
                    memory = curve(self.points, axis, contestant, pass_name, "memory")
                    if time:
                        rows.append(_growth_row(axis, pass_name, contestant, time, memory))
        return rows

    def training_rows(self) -> list[tuple[str, ...]]:
        """The cells of :data:`TRAINING_HEADER` for all training steps that ran."""
        return [
            (
                run.network.name,
                f"{run.network.batch}x{'x'.join(map(str, run.network.size))}",
                LAYOUTS[run.channels_last],
                run.method,
                significant(1e3 * statistics.median(run.samples)),
                significant(run.images_per_second),
                "-" if run.cost is None else significant(run.cost),
                _mebibytes(run.peak_bytes),
            )
            for run in self.training
            if run.samples
        ]

    def axes(self) -> list[Axis]:
        """Along which cost was measured, in order."""
        return list(dict.fromkeys(point.axis for point in self.points))

    def contestants(self, axis: Axis) -> list[str]:
        """Who took part along an axis."""
        results = [result for point in self.points if point.axis == axis for result in point.results]
        return list(dict.fromkeys(result.contestant for result in results))

    def losses(self) -> list[str]:
        """Where one of ours is slower than the peer, or takes more memory, or the native backend lags torch's."""
        lines = []
        torch_medians = {
            (result.case, result.pass_name): result.median
            for result in self.results
            if result.contestant == "torch" and result.samples
        }
        peer_peaks = {
            (result.case, result.pass_name): result.peak_bytes
            for result in self.results
            if result.contestant == PEER
        }
        for result in self.results:
            if result.contestant == PEER or not result.samples:
                continue
            place = (result.case, result.pass_name)
            what = f"{result.case}, {result.pass_name}: {result.contestant}"
            if result.ratio is not None and result.ratio < 1 - EQUAL:
                lines.append(f"{what} runs at {significant(result.ratio)} times the speed of {PEER}")
            by_torch = torch_medians.get(place, math.inf)
            if result.contestant != "torch" and by_torch < (1 - EQUAL) * result.median:
                lines.append(
                    f"{what} runs at {significant(by_torch / result.median)} times the speed of torch"
                )
            peak, theirs = result.peak_bytes, peer_peaks.get(place)
            if peak is not None and theirs is not None and theirs + 2**20 < (1 - EQUAL) * peak:
                lines.append(f"{what} takes {_mebibytes(peak)} MiB, {PEER} {_mebibytes(theirs)}")
        return lines

    def absences(self) -> list[str]:
        """What did not run, or in fewer rounds, and why."""
        lines = [f"{what}: the time was up" for what in self.unbegun]
        for result in [*self.results, *(r for point in self.points for r in point.results)]:
            what = f"{result.case}: {result.contestant}"
            if result.note:
                lines.append(f"{what} did not run: {result.note}")
            elif len(result.samples) < self.conditions["rounds"]:
                rounds = f"{len(result.samples)} of {self.conditions['rounds']} rounds"
                lines.append(
                    f"{what}, {result.pass_name}: {rounds}; more would have taken over {BUDGET_SECONDS:g} s"
                )
        for run in self.training:
            if run.note:
                what = f"training {run.network.name}, {LAYOUTS[run.channels_last]}: {run.method}"
                lines.append(f"{what} did not run: {run.note}")
        return list(dict.fromkeys(lines))

    def json(self) -> str:
        """Every figure, samples included."""
        content = {
            "conditions": self.conditions,
            "limits": asdict(self.limits),
            "results": [self._record(result) for result in self.results],
            "training": [
                {
                    "network": run.network.name,
                    "batch": run.network.batch,
                    "size": run.network.size,
                    "layout": LAYOUTS[run.channels_last],
                    "method": run.method,
                    "seconds": run.samples,
                    "images_per_second": run.images_per_second if run.samples else None,
                    "times_plain": run.cost,
                    "peak_bytes": run.peak_bytes,
                    "note": run.note,
                }
                for run in self.training
            ],
            "left_out": self.absences(),
            "scaling": [
                {
                    "axis": point.axis.name,
                    "value": point.value,
                    "results": [self._record(r) for r in point.results],
                }
                for point in self.points
            ],
        }
        return json.dumps(content, indent=1) + "\n"

    def _record(self, result: Result) -> dict[str, Any]:
        least, bound = self.limits.floor(result.work)
        return {
            "case": result.case.name,
            "shape": asdict(result.case.shape),
            "contestant": result.contestant,
            "pass": result.pass_name,
            "seconds": result.samples,
            "median_seconds": result.median if result.samples else None,
            "times_unfold": result.ratio,
            "flops": result.work.flops,
            "bytes": result.work.bytes,
            "floor_seconds": least,
            "bound": bound,
            "peak_bytes": result.peak_bytes,
            "note": result.note,
        }

    def summary(self) -> str:
        """Conditions and limits, in a paragraph."""
        c = self.conditions
        return (
            f"{c['device_name']} ({c['device']}, {c['threads']} threads), {c['dtype']}, PyTorch {c['torch']}, "
            f"Python {c['python']}, freqfusion {c['freqfusion']}, {c['system']}; {c['date']}. Load average "
            f"before the run: {c['load']}. Measured limits: copy "
            f"{significant(self.limits.bytes_per_second / 1e9)} GB/s, matrix product "
            f"{significant(self.limits.flops_per_second / 1e9)} GFLOP/s. Median ± half the interquartile range "
            f"of up to {c['rounds']} interleaved rounds."
        )

    def markdown(self, pictures: Sequence[str]) -> str:
        """The page ``benchmark.md``.

        Args:
            pictures: file names of the plots, beside the page.
        """
        parts = ["# Benchmark", f"`{self.conditions['command']}`", self.summary()]
        for shape in self.shapes():
            parts += [f"## {shape}", _markdown_table(HEADER, self.rows(shape))]
        if self.training:
            parts += ["## Training steps", _markdown_table(TRAINING_HEADER, self.training_rows())]
        for title, lines in (("Losses", self.losses()), ("Left out", self.absences())):
            if self.results or lines:
                parts += [f"## {title}", "\n".join(f"- {line}" for line in lines) or "None."]
        if self.points:
            parts += [
                f"## How the cost of {NAME} grows",
                "Time (ms) and peak memory (MiB) at the largest value; exponent 1 is growth in proportion, fitted "
                "over the larger half of the values.",
                _markdown_table(GROWTH_HEADER, self.growth_rows()),
            ]
        parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures]
        return "\n\n".join(parts) + "\n"


def _growth_row(
    axis: Axis,
    pass_name: str,
    contestant: str,
    time: Sequence[tuple[float, float]],
    memory: Sequence[tuple[float, float]],
) -> tuple[str, ...]:
    def exponent(points: Sequence[tuple[float, float]]) -> str:
        fitted = growth_exponent(points)
        return "-" if fitted is None else f"{fitted:.2f}"

    return (
        axis.name,
        SHORT[pass_name],
        contestant,
        f"{time[0][0]:,.0f}",
        f"{time[-1][0]:,.0f}",
        significant(1e3 * time[-1][1]),
        exponent(time),
        _mebibytes(int(memory[-1][1])) if memory else "-",
        exponent(memory),
    )


def significant(value: float) -> str:
    """Three significant digits, but no fraction finer than a thousandth.

    >>> [significant(value) for value in (0.0, 0.01234, 1.234, 56.78, 12345.6)]
    ['0.000', '0.012', '1.23', '56.8', '12,346']
    """
    rounded = float(f"{value:.3g}")
    digits = 3 if rounded < 1 else max(0, 2 - math.floor(math.log10(rounded)))
    return f"{value:,.{digits}f}"


def _milliseconds(result: Result) -> str:
    median = significant(1e3 * result.median)
    return f"{median} ± {significant(1e3 * result.spread)}" if len(result.samples) > 1 else median


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f}"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---" if name in TEXT_COLUMNS else "---:" for name in header]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
