"""Windows that are larger than the map: their outer taps read nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor


def part(x: Tensor, starts: Sequence[int], size: Sequence[int]) -> Tensor:
    """The view of the last axes from ``starts`` on, of ``size``."""
    for axis, (start, side) in enumerate(zip(starts, size, strict=True), x.ndim - len(size)):
        x = x.narrow(axis, start, side)
    return x


def reachable(window: int, dilation: int, *sides: int) -> tuple[int, int]:
    """The window and dilation, cut to where a tap may lie on the map; uncut where a compiler traces the sizes."""
    if torch.compiler.is_compiling():
        return window, dilation
    side = max(*sides, 1)
    dilation = min(dilation, side)
    return min(window, 2 * max(1, (side - 1) // dilation) + 1), dilation


def middle(inner: int, window: int, device: torch.device, dims: int = 2) -> Tensor:
    """Which taps of a window of side ``window`` are its middle ones of side ``inner``, row by row."""
    line = torch.arange(inner, device=device) + (window - inner) // 2
    taps = line
    for _ in range(dims - 1):
        taps = (taps[:, None] * window + line).flatten()
    return taps


def spread(taps: Tensor, inner: int, window: int, axis: int, dims: int = 2) -> Tensor:
    """``inner**dims`` taps along ``axis`` as the middle of ``window**dims``; the others are zero."""
    if inner == window:
        return taps
    shape = (*taps.shape[:axis], window**dims, *taps.shape[axis + 1 :])
    return taps.new_zeros(shape).index_copy(axis, middle(inner, window, taps.device, dims), taps)
