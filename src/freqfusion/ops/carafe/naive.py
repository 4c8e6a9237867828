"""Reference of the reassembly: gathered maps for each row of taps, plain differentiable torch."""

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
    """Pad the last two axes of ``(B, C, h, w)`` by ``radius`` on every side."""
    if not reflect:
        return F.pad(x, [radius] * 4)
    rows = reflect_index(x.shape[-2], radius, x.device)
    columns = reflect_index(x.shape[-1], radius, x.device)
    return x.index_select(-2, rows).index_select(-1, columns)


def carafe_naive(
    x: Tensor, kernels: Tensor, kernel_size: int, groups: int = 1, padding_mode: str = "zeros"
) -> Tensor:
    """Reassembly as :func:`freqfusion.ops.carafe` defines it; the oracle of its kernels and the exported form.

    Arguments, shapes and result are those of :func:`freqfusion.ops.carafe`; nothing is checked.
    """
    (batch, channels, h, w), (height, width) = x.shape, kernels.shape[-2:]
    dtype = accumulation_dtype(x, kernels)
    padded = pad(x.to(dtype), kernel_size // 2, padding_mode == "reflect")
    taps = kernels.to(dtype).reshape(batch, groups, kernel_size, kernel_size, height, width)
    taps = taps.transpose(3, 4)  # a row of taps beside the columns that it reads
    rows = torch.div(torch.arange(height, device=x.device) * h, height, rounding_mode="floor")
    columns = torch.div(torch.arange(width, device=x.device) * w, width, rounding_mode="floor")
    columns = (columns + torch.arange(kernel_size, device=x.device)[:, None]).flatten()
    out = torch.zeros(batch, groups, channels // groups, height, width, dtype=dtype, device=x.device)
    for dy in range(kernel_size):
        values = padded.index_select(2, rows + dy).index_select(3, columns)
        values = values.reshape(batch, groups, channels // groups, height, kernel_size, width)
        out = out + (values * taps[:, :, None, dy]).sum(dim=4)
    return out.reshape(batch, channels, height, width).to(x.dtype)
