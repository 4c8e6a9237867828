"""Windows that are larger than the map: their outer taps read nothing."""

import torch
from torch import Tensor


def reachable(window: int, dilation: int, height: int, width: int) -> tuple[int, int]:
    """The window and dilation, cut to where a tap may lie on the map; uncut where a compiler traces the sizes."""
    if torch.compiler.is_compiling():
        return window, dilation
    side = max(height, width, 1)
    dilation = min(dilation, side)
    return min(window, 2 * max(1, (side - 1) // dilation) + 1), dilation


def middle(inner: int, window: int, device: torch.device) -> Tensor:
    """Which taps of a ``window`` x ``window`` are its middle ``inner`` x ``inner`` ones, row by row."""
    line = torch.arange(inner, device=device) + (window - inner) // 2
    return (line[:, None] * window + line).flatten()


def spread(taps: Tensor, inner: int, window: int, axis: int) -> Tensor:
    """``inner**2`` taps along ``axis`` as the middle of ``window**2``; the others are zero."""
    if inner == window:
        return taps
    shape = (*taps.shape[:axis], window * window, *taps.shape[axis + 1 :])
    return taps.new_zeros(shape).index_copy(axis, middle(inner, window, taps.device), taps)
