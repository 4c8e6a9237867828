"""The sampling by torch's own sampler."""

from collections.abc import Sequence

import torch
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype, layout
from freqfusion.ops._sampling import grid_sample


def _grid(x: Tensor, offsets: Tensor, groups: int, unit_size: Sequence[int]) -> Tensor:
    """Where to read, ``(B * groups, H, W, 2)`` in [-1, 1] as torch's sampler counts; of a volume by x, y and z."""
    batch, size = x.shape[0], offsets.shape[2:]
    dims = len(size)
    dtype = accumulation_dtype(x, offsets)
    moves = offsets.to(dtype).reshape(batch, dims, groups, *size).unbind(1)
    grid = []
    for place, (move, side, unit) in enumerate(zip(moves, size[::-1], unit_size[::-1], strict=True)):
        centres = (torch.arange(side, dtype=dtype, device=x.device) + 0.5) * unit / side
        centres = centres.reshape(-1, *[1] * place)
        # this order of operations is the released code's: an algebraically equal one rounds differently
        grid.append(2 * (centres + move) / unit - 1)
    return torch.stack(grid, dim=-1).flatten(0, 1)


def resample(x: Tensor, offsets: Tensor, groups: int, unit_size: Sequence[int]) -> Tensor:
    """As :func:`freqfusion.ops.resample`."""
    batch, channels, *size = x.shape
    grid = _grid(x, offsets, groups, unit_size)
    planes = x.to(grid.dtype).reshape(batch * groups, channels // groups, *size)
    sampled = grid_sample(planes, grid, padding_mode="border")
    sampled = sampled.reshape(batch, channels, *offsets.shape[2:]).to(x.dtype)
    return sampled.contiguous(memory_format=layout(x))
