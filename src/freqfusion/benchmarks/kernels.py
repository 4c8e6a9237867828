"""What the Triton kernels take of a GPU, and what a first step compiles; no GPU is needed for either."""

from collections.abc import Iterator
from unittest import mock

import torch

from freqfusion.fusion import FreqFusion, _nhwc
from freqfusion.ops import _triton, use_backend
from freqfusion.ops._triton.registry import Case, Usage, cases, compile_case

HEADING = f"{'registers':>9} {'spilled':>8} {'shared':>8} {'warps':>5} {'seconds':>7}  kernel, case"


def first_step(
    capability: int, dtype: torch.dtype, memory_format: torch.memory_format, size: tuple[int, int] = (50, 84)
) -> list[Usage]:
    """The kernels that a first forward and backward pass of FreqFusion launches, in their order.

    Args:
        capability: compute capability of a GPU, 90 for 9.0.
        dtype: of the maps, with 256 channels, and of the parameters.
        memory_format: layout of the maps.
        size: height and width of the coarse map; the fine one has twice that.
    """
    fusion = FreqFusion(256, 256).to(dtype)
    height, width = size

    def run() -> None:
        hr, lr = (
            torch.zeros(2, 256, *sides, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
            for sides in ((2 * height, 2 * width), size)
        )
        with use_backend("triton"):
            _, fine, coarse = fusion(hr, lr)
            torch.autograd.backward((fine, coarse), (torch.ones_like(fine), torch.ones_like(coarse)))

    with (  # as if the maps were on a GPU
        mock.patch.object(_triton, "cannot_run_on", return_value=""),
        mock.patch.object(_nhwc, "wanted", return_value=dtype in _nhwc.HALF),
    ):
        return compile_case(Case("FreqFusion, forward and backward", run), capability)


def table(capability: int) -> Iterator[tuple[str, bool]]:
    """Lines of a table of every kernel of every representative call, and whether each spills registers."""
    seen = set()
    for case in cases():
        for usage in compile_case(case, capability):
            if usage.key not in seen:
                seen.add(usage.key)
                yield _line(usage), usage.stack > 0


def _line(usage: Usage) -> str:
    return (
        f"{usage.registers:>9} {usage.stack:>8} {usage.shared:>8} {usage.warps:>5} {usage.seconds:>7.1f}  "
        f"{usage.kernel}, {usage.case}"
    )


def first_steps(capability: int) -> Iterator[tuple[str, bool]]:
    """How many kernels a first step compiles, for each dtype and layout, and whether one spills registers."""
    for dtype in (torch.bfloat16, torch.float32):
        for layout, memory_format in (("NHWC", torch.channels_last), ("NCHW", torch.contiguous_format)):
            usages = first_step(capability, dtype, memory_format)
            kernels = {usage.key for usage in usages}
            spilling = {usage.key for usage in usages if usage.stack}
            yield (
                f"a first step of FreqFusion, {str(dtype).removeprefix('torch.')} {layout}: {len(usages)} "
                f"launches of {len(kernels)} kernels, {len(spilling) or 'none'} of them with spilled registers",
                bool(spilling),
            )
