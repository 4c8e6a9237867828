"""What Python and torch take to launch FreqFusion in half precision, which on a fast GPU is longer than it computes.

No GPU is needed: the maps are tiny ones on the CPU, and Triton's kernels are prepared and not run. What is left of
torch's own computation is a few of the microseconds. ``python benchmarks/launching.py``, beside nothing else.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from freqfusion.fusion import FreqFusion, _nhwc
from freqfusion.ops import _triton, use_backend
from freqfusion.ops._triton import launch

ROUNDS = 300


class Computing(TorchDispatchMode):
    """Counts operators that compute: neither views nor allocations."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        views = any(value.alias_info is not None for value in function._schema.returns)
        allocates = "empty" in function._schema.name or "_unsafe_view" in function._schema.name
        self.count += not (views or allocates)
        return function(*args, **(kwargs or {}))


def measure(layout: torch.memory_format) -> tuple[dict[str, float], dict[str, int]]:
    """Medians in microseconds, and operators that compute, of both passes."""
    fusion = FreqFusion(16, 16, compressed_channels=16).bfloat16().to(memory_format=layout)
    hr, lr = (
        torch.zeros(1, 16, *size, dtype=torch.bfloat16).contiguous(memory_format=layout).requires_grad_()
        for size in ((4, 8), (2, 4))
    )
    leaves = [hr, lr, *fusion.parameters()]

    def forward() -> tuple[Tensor, Tensor]:
        return fusion(hr, lr)[1:]

    def backward(results: tuple[Tensor, Tensor]) -> object:
        return torch.autograd.grad(results, leaves, [x.detach() for x in results])

    def timed(run: Callable[[], Any], times: list[float]) -> Any:
        began = time.perf_counter()
        out = run()
        times.append(1e6 * (time.perf_counter() - began))
        return out

    times: dict[str, list[float]] = {"inference": [], "forward": [], "backward": []}
    for _ in range(ROUNDS):
        with torch.no_grad():
            timed(forward, times["inference"])
        results = timed(forward, times["forward"])
        timed(partial(backward, results), times["backward"])
    with Computing() as computing:
        results = forward()
    with Computing() as both:
        backward(results)
    medians = {name: statistics.median(found[ROUNDS // 10 :]) for name, found in times.items()}
    return medians, {"forward": computing.count, "backward": both.count}


def _nothing(device: torch.device) -> str:
    return ""


def _always(x: Tensor) -> bool:
    return True


def _prepared(*how: object) -> Callable[..., None]:
    return lambda *tensors: None


def main() -> None:
    torch.set_num_threads(1)
    with (
        # functions, for a call of a mock takes as long as some launches
        mock.patch.object(_triton, "cannot_run_on", _nothing),
        mock.patch.object(_nhwc, "wanted", _always),
        mock.patch.object(launch, "_first_run", _prepared),
        use_backend("triton"),
    ):
        for name, layout in (("NHWC", torch.channels_last), ("NCHW", torch.contiguous_format)):
            medians, operators = measure(layout)
            print(name, {key: round(value) for key, value in medians.items()}, "us; operators", operators)


if __name__ == "__main__":
    main()
