"""What the machine can do at best: the floor under every measured time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from freqfusion.benchmarks.cases import Work

COPY_BYTES = 2**28
MATRIX_SIDE = 2048
REPEATS = 10


@dataclass(frozen=True)
class Limits:
    """Best of several runs; see :func:`measure_limits`."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, work: Work) -> tuple[float, str]:
        """The least seconds that ``work`` can take here, and which limit says so.

        >>> Limits(bytes_per_second=10.0, flops_per_second=100.0).floor(Work(flops=300, bytes=20))
        (3.0, 'FMA')
        """
        memory, arithmetic = work.bytes / self.bytes_per_second, work.flops / self.flops_per_second
        return (memory, "memory") if memory >= arithmetic else (arithmetic, "FMA")


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the limits with the threads that torch has now.

    Bandwidth: a copy of 256 MiB, each byte counted as read and as written. Arithmetic: a large matrix product,
    which stands for the peak of fused multiply-adds (it comes close to it), 2 a multiply-add; float64 for
    ``dtype`` float64, else float32, for half precision is summed in float32 here.
    """
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    side = MATRIX_SIDE if device.type == "cpu" else 4 * MATRIX_SIDE
    matrix = torch.ones(side, side, device=device, dtype=torch.promote_types(dtype, torch.float32))
    product = torch.empty_like(matrix)
    return Limits(
        2 * COPY_BYTES / best_seconds(lambda: target.copy_(source), device),
        2 * side**3 / best_seconds(lambda: torch.mm(matrix, matrix, out=product), device),
    )


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs of ``call``, with the device's work in it, in seconds."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
