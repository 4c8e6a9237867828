"""Reference of the sampling."""

import torch
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype
from freqfusion.ops._sampling import one_unless


def resample_naive(
    x: Tensor, offsets: Tensor, groups: int = 1, unit_size: tuple[int, int] | None = None
) -> Tensor:
    """The four neighbours gathered and weighted by hand: the oracle; nothing is checked."""
    (batch, channels, in_height, in_width), (height, width) = x.shape, offsets.shape[-2:]
    unit_height, unit_width = unit_size or (in_height, in_width)
    dtype = accumulation_dtype(x, offsets)
    dx, dy = offsets.to(dtype).reshape(batch, 2, groups, height, width).unbind(1)
    columns = (torch.arange(width, dtype=dtype, device=x.device) + 0.5) * unit_width / width
    rows = (torch.arange(height, dtype=dtype, device=x.device) + 0.5) * unit_height / height
    # positions in pixels of x, whose first centre is 0; clamped to the centres of the border pixels
    column = (columns + dx) * in_width / unit_width - 0.5
    row = (rows[:, None] + dy) * in_height / unit_height - 0.5
    unknown = (column.isnan() | row.isnan()).unsqueeze(2)
    column, row = _clamped(column, in_width - 1), _clamped(row, in_height - 1)
    left, top = column.detach().floor().long(), row.detach().floor().long()
    right, bottom = (left + 1).clamp_max(in_width - 1), (top + 1).clamp_max(in_height - 1)
    weight_x, weight_y = (column - left).unsqueeze(2), (row - top).unsqueeze(2)
    flat = x.to(dtype).reshape(batch, groups, channels // groups, in_height * in_width)

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        index = (
            (rows * in_width + columns).reshape(batch, groups, 1, -1).expand(-1, -1, channels // groups, -1)
        )
        return flat.gather(3, index).reshape(batch, groups, channels // groups, height, width)

    upper = at(top, left) * (1 - weight_x) + at(top, right) * weight_x
    lower = at(bottom, left) * (1 - weight_x) + at(bottom, right) * weight_x
    out = upper * (1 - weight_y) + lower * weight_y
    out = out * one_unless(unknown, dtype)
    return out.reshape(batch, channels, height, width).to(x.dtype)


def _clamped(position: Tensor, last: int) -> Tensor:
    """In [0, last], 0 for NaN. The derivative is a product, unlike that of ``clamp``, so that a NaN shows in it."""
    inside = (position > 0) & (position < last)
    return position.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * inside + (position >= last) * last
