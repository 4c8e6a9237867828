"""What all kernels share: tuning, the launch, and a first kernel to see whether any runs."""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._checks import is_channels_last
from freqfusion.ops._triton import INTERPRETED


def tuned(
    configurations: Sequence[tuple[int, ...]], key: Sequence[str], names: Sequence[str]
) -> Callable[..., Any]:
    """Let Triton choose among tile sizes by measurement, once for each ``key``; it keeps the choice on disk.

    Args:
        configurations: the tile sizes, and last the number of warps; the interpreter gets small tiles.
        key: arguments of the kernel whose values a choice holds for, besides the dtypes of its tensors.
        names: of the tile sizes.
    """
    choices = [
        triton.Config(dict(zip(names, sizes, strict=True)), num_warps=warps)
        for *sizes, warps in configurations
    ]
    if INTERPRETED:
        choices = [triton.Config(dict.fromkeys(names, 8))]
    return triton.autotune(choices, key=list(key), cache_results=True)


def tuning(x: Tensor, channels: int) -> int:
    """Maps that a choice of tile sizes is kept for: of about this width and number of channels, in this layout."""
    return (channels.bit_length() * 64 + x.shape[-1].bit_length()) * 2 + is_channels_last(x)


def launch(
    kernel: Any, programs: Callable[[dict[str, int]], int], out: Tensor, *args: Any, **sizes: Any
) -> None:
    """Run a kernel on the device of ``out``.

    All programs lie on the first axis of the grid, the only one that may be longer than 65535. Products are added
    in one rounding, which newer releases of Triton do on request alone.
    """
    with torch.cuda.device_of(out):
        kernel[lambda chosen: (programs(chosen),)](*args, **sizes, enable_fp_fusion=True)


@triton.jit
def _one(out):
    tl.store(out, 1.0)


def probe(device: torch.device) -> None:
    out = torch.zeros(1, device=device)
    launch(_one, lambda _: 1, out, out)
    if float(out) != 1:
        raise RuntimeError(f"it wrote {float(out)} instead of 1")
