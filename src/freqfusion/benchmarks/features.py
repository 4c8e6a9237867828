"""Time and memory of the upsamplers of frozen features, beside what has been published."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from freqfusion.benchmarks.memory import STATUS, Meter, run_apart, status_bytes
from freqfusion.features import create_upsampler, describe_upsamplers

CHANNELS = 384
PATCH = 16
SIDES = (224, 448, 1024)
_REPEATS = 3
_LONG = 2.0
"""Seconds; what takes longer is run once."""


@dataclass(frozen=True)
class Published:
    """Costs of a method that the authors of NAF print, for 384 channels and 28 x 28 coarse pixels.

    Source: the repository of NAF (CVPR 2026); its GPU is not named, and its GFLOPs leave out NAF's attention.
    """

    parameters: int
    gflops: tuple[float, float]
    """Of x4 and x16; so are all pairs."""
    milliseconds: tuple[float, float]
    megabytes: tuple[float, float]
    backward_megabytes: float
    """Of x16."""


PUBLISHED = {
    "featup_jbu": Published(173_540, (4.9, 83), (10, 57), (180, 2674), 4929),
    "anyup": Published(878_080, (23, 329), (18, 182), (400, 6163), 18675),
    "jafar": Published(628_480, (23, 366), (59, 108), (604, 5411), 18613),
    "naf": Published(662_528, (17, 265), (40, 56), (605, 1787), 6016),
}


@dataclass(frozen=True)
class Figures:
    """What upsampling features of one image, without gradients, took."""

    name: str
    side: int
    seconds: float | None
    """The best of a few runs; of one where it takes seconds. None where it does not run."""
    peak_bytes: int | None
    """Above the weights and inputs, the result included; None where the system does not tell."""
    process_bytes: int | None
    """The same of the whole process, on a CPU under Linux."""
    problem: str = ""
    """Why it does not run."""


def measure_features(
    names: Sequence[str],
    sides: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    chunk: int | None,
) -> Iterator[Figures]:
    """Measure upsamplers with fresh weights, each in a fresh process on a CPU.

    Args:
        names: of :func:`freqfusion.features.list_upsamplers`.
        sides: of the square image and the result, in pixels; the features have one for 16 of them.
        device: where.
        dtype: of features, image and weights.
        threads: of the CPU.
        chunk: rows of the result that are computed at a time; None for all.
    """
    for side in sides:
        for name in names:
            try:
                yield run_apart(_measure, (name, side, device, dtype, chunk), device, threads)
            except RuntimeError as error:
                yield Figures(name, side, None, None, None, str(error))


def _measure(name: str, side: int, device: torch.device, dtype: torch.dtype, chunk: int | None) -> Figures:
    torch.manual_seed(0)
    info = next(info for info in describe_upsamplers() if info.name == name)
    options: dict[str, Any] = {"patch_size": PATCH} if name == "uplift" else {}
    upsampler = create_upsampler(name, CHANNELS if info.per_encoder else None, **options).to(device, dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def inputs(side: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.randn(1, CHANNELS, side // PATCH, side // PATCH, device=device, dtype=dtype)
        return features, torch.rand(1, 3, side, side, device=device, dtype=dtype)

    with torch.no_grad():
        upsampler(*inputs(10 * PATCH), chunk=chunk)  # loads the code
        features, image = inputs(side)
        meter, seconds = Meter(device), [float("inf")]
        while len(seconds) <= _REPEATS and (len(seconds) == 1 or min(seconds) < _LONG):
            wait()
            start = time.perf_counter()
            upsampler(features, image, chunk=chunk)
            wait()
            seconds.append(time.perf_counter() - start)
    process = status_bytes("VmHWM") if device.type == "cpu" and STATUS.exists() else None
    return Figures(name, side, min(seconds), meter.peak(), process)
