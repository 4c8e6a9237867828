"""How time and memory of FreqFusion grow with pixels, channels, batch and threads."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from freqfusion.benchmarks.cases import BOTH, PEER, Case, Shape
from freqfusion.benchmarks.runner import BUDGET_SECONDS, Result, Settings, Step, measure_case, prefixed

NAME = "FreqFusion"
CHANNELS = 64


def _square(batch: int, channels: int, side: int) -> Shape:
    return Shape(batch, channels, (side // 2, side // 2), (side, side))


def _pixels(pixels: int) -> Shape:
    return _square(1, CHANNELS, math.isqrt(pixels))


@dataclass(frozen=True)
class Axis:
    """What grows, and the shape at each value."""

    name: str
    label: str
    values: tuple[int, ...]
    shape: Callable[[int], Shape]


AXES = (
    Axis(
        "pixels",
        f"pixels of the fine map (32x32 to 1024x1024; {CHANNELS} channels, batch 1)",
        tuple(side * side for side in (32, 64, 128, 256, 512, 1024)),
        _pixels,
    ),
    Axis(
        "channels",
        "channels (32x32 to 64x64, batch 1)",
        (32, 64, 128, 256),
        lambda channels: _square(1, channels, 64),
    ),
    Axis(
        "batch",
        f"images in the batch (32x32 to 64x64, {CHANNELS} channels)",
        (1, 2, 4, 8),
        lambda batch: _square(batch, CHANNELS, 64),
    ),
    Axis(
        "threads",
        f"threads (64x64 to 128x128, {CHANNELS} channels, batch 1)",
        tuple(2**power for power in range((os.cpu_count() or 1).bit_length())),
        lambda threads: _square(1, CHANNELS, 128),
    ),
)
"""``threads``: powers of two up to the processors of this machine."""


@dataclass(frozen=True)
class Point:
    """The results of all contestants at one value of an axis."""

    axis: Axis
    value: int
    results: list[Result]


def measure_scaling(
    contestants: Sequence[str], settings: Settings, step: Step = lambda what: None
) -> Iterator[Point]:
    """Measure FreqFusion along every axis; the peer leaves an axis where it would take too long.

    That is where the last value, and growth in proportion, let expect a pass longer than
    :data:`freqfusion.benchmarks.runner.BUDGET_SECONDS`. Threads are left out on other devices than the CPU.
    """
    for axis in AXES:
        if axis.name == "threads" and settings.device.type != "cpu":
            continue
        present = list(contestants)
        for value, following in zip(axis.values, (*axis.values[1:], None), strict=True):
            own = replace(settings, threads=value) if axis.name == "threads" else settings
            case = Case(NAME, axis.shape(value))
            results = measure_case(case, present, own, prefixed(step, f"{axis.name}: "))
            yield Point(axis, value, results)
            if following is not None and axis.name != "threads" and PEER in present:
                (last,) = (r for r in results if (r.contestant, r.pass_name) == (PEER, BOTH))
                if not last.samples or last.median * following / value > BUDGET_SECONDS:
                    present.remove(PEER)


def curve(
    points: Sequence[Point], axis: Axis, contestant: str, pass_name: str, quantity: str
) -> list[tuple[float, float]]:
    """``(value, seconds or bytes)`` of one contestant along one axis.

    Args:
        points: of :func:`measure_scaling`.
        axis: of the points.
        contestant: whose.
        pass_name: of :data:`freqfusion.benchmarks.cases.PASSES`.
        quantity: ``"time"`` or ``"memory"``.
    """
    found = []
    for point in points:
        for result in point.results:
            if (point.axis, result.contestant, result.pass_name) == (axis, contestant, pass_name):
                if quantity == "time" and result.samples:
                    found.append((float(point.value), result.median))
                if quantity == "memory" and result.peak_bytes:
                    found.append((float(point.value), float(result.peak_bytes)))
    return found


def growth_exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The power of x that y grows with: least squares in logarithms over the larger half, three points at least.

    1 is growth in proportion. The smaller half is left out, for constant costs hide the growth there. None for
    fewer than three points.

    >>> round(growth_exponent([(1, 90.0), (2, 90.0), (4, 160.0), (8, 640.0), (16, 2560.0)]), 6)
    2.0
    """
    if len(points) < 3:
        return None
    larger = sorted(points)[-max(3, math.ceil(len(points) / 2)) :]
    xs, ys = [math.log2(x) for x, _ in larger], [math.log2(y) for _, y in larger]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return slope / sum((x - x_mean) ** 2 for x in xs)
