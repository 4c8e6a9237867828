"""Grouped bilinear sampling at displaced positions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype, check_groups, check_map, check_pair


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
    column = ((columns + dx) * in_width / unit_width - 0.5).clamp(0, in_width - 1)
    row = ((rows[:, None] + dy) * in_height / unit_height - 0.5).clamp(0, in_height - 1)
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
    return out.reshape(batch, channels, height, width).to(x.dtype)


def resample(x: Tensor, offsets: Tensor, groups: int = 1, unit_size: tuple[int, int] | None = None) -> Tensor:
    """Sample ``x`` bilinearly at the output grid's own positions plus ``offsets``.

    The output grid ``(H, W)`` covers the same area as ``x``: with zero offsets the result is ``x`` itself
    where the sizes agree, and its bilinear interpolation (half-pixel centres) where they do not. Positions
    beyond the border read the border.

    Args:
        x: ``(B, C, h, w)``, floating point.
        offsets: ``(B, 2 * groups, H, W)``; first the ``groups`` displacements along x (columns, to the right),
            then those along y (rows, downwards).
        groups: channel ``c`` of ``x`` moves by offsets ``c // (C // groups)``.
        unit_size: ``(height, width)`` of the pixel grid in whose pixels offsets are counted; None for the
            grid of ``x``. FreqFusion samples an already upsampled map by offsets in coarse pixels.

    Returns:
        ``(B, C, H, W)`` of the dtype of ``x``. Positions and weights are at least float32: a bfloat16
        position would miss by more than a pixel on a map of a few hundred.

    Raises:
        TypeError: for integer tensors.
        ValueError: for wrong rank, channels, groups, batch or device.

    Source: Liu et al., "Learning to Upsample by Learning to Sample" (DySample), ICCV 2023, equation 1;
    Chen et al., TPAMI 2024, offset generator.

    >>> x = torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]])
    >>> offsets = torch.tensor([0.5, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 4)
    >>> resample(x, offsets)
    tensor([[[[0.5000, 1.5000, 2.5000, 3.0000]]]])
    """
    check_map("x", x)
    check_map("offsets", offsets)
    check_pair("x", x, "offsets", offsets)
    check_groups("x", x.shape[1], groups)
    if offsets.shape[1] != 2 * groups:
        raise ValueError(f"offsets must have 2 * groups = {2 * groups} channels, got {offsets.shape[1]}")
    (batch, channels, in_height, in_width), (height, width) = x.shape, offsets.shape[-2:]
    unit_height, unit_width = unit_size or (in_height, in_width)
    dtype = accumulation_dtype(x, offsets)
    dx, dy = offsets.to(dtype).reshape(batch, 2, groups, height, width).unbind(1)
    columns = (torch.arange(width, dtype=dtype, device=x.device) + 0.5) * unit_width / width
    rows = (torch.arange(height, dtype=dtype, device=x.device) + 0.5) * unit_height / height
    # this order of operations is the released code's: an algebraically equal one rounds differently
    grid_x = 2 * (columns + dx) / unit_width - 1
    grid_y = 2 * (rows[:, None] + dy) / unit_height - 1
    grid = torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1)
    sampled = F.grid_sample(
        x.to(dtype).reshape(batch * groups, channels // groups, in_height, in_width),
        grid,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled.reshape(batch, channels, height, width).to(x.dtype)
