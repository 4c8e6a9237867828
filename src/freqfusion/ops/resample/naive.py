"""Reference of the sampling."""

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype
from freqfusion.ops._sampling import one_unless


def resample_naive(
    x: Tensor, offsets: Tensor, groups: int = 1, unit_size: Sequence[int] | None = None
) -> Tensor:
    """The four (of a volume eight) neighbours gathered and weighted by hand: the oracle; nothing is checked."""
    (batch, channels, *size), out_size = x.shape, offsets.shape[2:]
    dims = len(size)
    dtype = accumulation_dtype(x, offsets)
    moves = offsets.to(dtype).reshape(batch, dims, groups, *out_size).unbind(1)[::-1]
    # positions in pixels of x by axis, whose first centre is 0; clamped to the centres of the border pixels
    positions = []
    for axis, (move, side, unit, length) in enumerate(
        zip(moves, out_size, unit_size or size, size, strict=True)
    ):
        centres = (torch.arange(side, dtype=dtype, device=x.device) + 0.5) * unit / side
        centres = centres.reshape(-1, *[1] * (dims - 1 - axis))
        positions.append((centres + move) * length / unit - 0.5)
    unknown = torch.stack([position.isnan() for position in positions]).any(0).unsqueeze(2)
    positions = [_clamped(position, length - 1) for position, length in zip(positions, size, strict=True)]
    lows = [position.detach().floor().long() for position in positions]
    flat = x.to(dtype).reshape(batch, groups, channels // groups, prod(size))
    out = torch.zeros(batch, groups, channels // groups, *out_size, dtype=dtype, device=x.device)
    for corner in product((0, 1), repeat=dims):
        index, weight = torch.zeros_like(lows[0]), torch.ones_like(positions[0])
        for upper, low, position, length in zip(corner, lows, positions, size, strict=True):
            index = index * length + (low + upper).clamp_max(length - 1)
            share = position - low
            weight = weight * (share if upper else 1 - share)
        places = index.flatten(2)[:, :, None].expand(-1, -1, channels // groups, -1)
        out = out + flat.gather(3, places).reshape(out.shape) * weight.unsqueeze(2)
    out = out * one_unless(unknown, dtype)
    return out.reshape(batch, channels, *out_size).to(x.dtype)


def _clamped(position: Tensor, last: int) -> Tensor:
    """In [0, last], 0 for NaN. The derivative is a product, unlike that of ``clamp``, so that a NaN shows in it."""
    inside = (position > 0) & (position < last)
    return position.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * inside + (position >= last) * last
