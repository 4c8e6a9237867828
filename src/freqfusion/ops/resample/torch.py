"""The sampling by torch's own sampler."""

import torch
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype
from freqfusion.ops._sampling import grid_sample


def _grid(x: Tensor, offsets: Tensor, groups: int, unit_height: int, unit_width: int) -> Tensor:
    """Where to read, ``(B * groups, H, W, 2)`` in [-1, 1] as torch's sampler counts."""
    batch, (height, width) = x.shape[0], offsets.shape[-2:]
    dtype = accumulation_dtype(x, offsets)
    dx, dy = offsets.to(dtype).reshape(batch, 2, groups, height, width).unbind(1)
    columns = (torch.arange(width, dtype=dtype, device=x.device) + 0.5) * unit_width / width
    rows = (torch.arange(height, dtype=dtype, device=x.device) + 0.5) * unit_height / height
    # this order of operations is the released code's: an algebraically equal one rounds differently
    grid_x = 2 * (columns + dx) / unit_width - 1
    grid_y = 2 * (rows[:, None] + dy) / unit_height - 1
    return torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1)


def resample(x: Tensor, offsets: Tensor, groups: int, unit_height: int, unit_width: int) -> Tensor:
    """As :func:`freqfusion.ops.resample`."""
    (batch, channels, in_height, in_width), (height, width) = x.shape, offsets.shape[-2:]
    grid = _grid(x, offsets, groups, unit_height, unit_width)
    planes = x.to(grid.dtype).reshape(batch * groups, channels // groups, in_height, in_width)
    sampled = grid_sample(planes, grid, padding_mode="border")
    return sampled.reshape(batch, channels, height, width).to(x.dtype)
