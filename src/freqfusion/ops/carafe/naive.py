"""Reference of the reassembly: gathered maps for each row of taps, plain differentiable torch."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype


def reflect_index(length: int, radius: int, device: torch.device) -> Tensor:
    """Source rows of a reflect-padded axis, ``(length + 2 * radius,)``; defined for any length, 1 included."""
    index = torch.arange(-radius, length + radius, device=device)
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    index = index % period
    return torch.minimum(index, period - index)


def pad(x: Tensor, radius: int, reflect: bool) -> Tensor:
    """Pad the spatial axes of ``(B, C, h, w)`` or ``(B, C, d, h, w)`` by ``radius`` on every side."""
    if not reflect:
        return F.pad(x, [radius] * 2 * (x.ndim - 2))
    for axis in range(2, x.ndim):
        x = x.index_select(axis, reflect_index(x.shape[axis], radius, x.device))
    return x


def carafe_naive(
    x: Tensor, kernels: Tensor, kernel_size: int, groups: int = 1, padding_mode: str = "zeros"
) -> Tensor:
    """Reassembly as :func:`freqfusion.ops.carafe` defines it; the oracle of its kernels and the exported form.

    Arguments, shapes and result are those of :func:`freqfusion.ops.carafe`; nothing is checked.
    """
    (batch, channels, *coarse), fine = x.shape, kernels.shape[2:]
    dtype = accumulation_dtype(x, kernels)
    padded = pad(x.to(dtype), kernel_size // 2, padding_mode == "reflect")
    taps = kernels.to(dtype).reshape(
        batch, groups, kernel_size ** (len(fine) - 1), kernel_size, *fine
    )  # by rows
    *centres, columns = (
        torch.div(torch.arange(side, device=x.device) * length, side, rounding_mode="floor")
        for side, length in zip(fine, coarse, strict=True)
    )
    columns = (columns + torch.arange(kernel_size, device=x.device)[:, None]).flatten()
    out = torch.zeros(batch, groups, channels // groups, *fine, dtype=dtype, device=x.device)
    for row, places in enumerate(product(range(kernel_size), repeat=len(centres))):
        values = padded
        for axis, (centre, place) in enumerate(zip(centres, places, strict=True), 2):
            values = values.index_select(axis, centre + place)
        values = values.index_select(-1, columns)
        values = values.reshape(batch, groups, channels // groups, *fine[:-1], kernel_size, fine[-1])
        out = out + (values * taps[:, :, None, row].movedim(3, -2)).sum(dim=-2)  # beside the columns it reads
    return out.reshape(batch, channels, *fine).to(x.dtype)
