"""torch's linear sampler, kept from coordinates that are not finite."""

import torch
import torch.nn.functional as F
from torch import Tensor


def finite(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates that torch's sampler may get, and what its samples must be multiplied by.

    The derivative of torch's CPU sampler at a NaN writes outside its memory and ends the process. So a NaN reads
    the first row or column, and the factor is NaN there, which brings it back into the samples and all gradients.

    Args:
        grid: ``(B, H, W, 2)`` or ``(B, D, H, W, 3)``, in [-1, 1] on the map.

    Returns:
        The grid, infinities replaced by places beyond the border, and ``(B, 1, H, W)`` or ``(B, 1, D, H, W)`` of
        ones and NaN.
    """
    unknown = grid.isnan().any(dim=-1)[:, None]
    return grid.nan_to_num(nan=-1.0, posinf=3.0, neginf=-3.0), one_unless(unknown, grid.dtype)


def one_unless(unknown: Tensor, dtype: torch.dtype) -> Tensor:
    """One where a position is known, else NaN. As 0 / 0, for torch 2.8 cannot save a program with a NaN in it."""
    known = (~unknown).to(dtype)
    return known / known


def grid_sample(x: Tensor, grid: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Bilinear samples ``(B, C, H, W)`` of ``x`` ``(B, C, h, w)`` at ``grid`` ``(B, H, W, 2)``, of one dtype.

    Of a volume ``(B, C, d, h, w)`` trilinear ones, at ``(B, D, H, W, 3)``.
    As :func:`torch.nn.functional.grid_sample` without aligned corners, but safe: where a coordinate is NaN, so are
    the samples, the gradients of both coordinates and those of the pixels beside the place.
    """
    grid, factor = finite(grid)
    return F.grid_sample(x, grid, padding_mode=padding_mode, align_corners=False) * factor
