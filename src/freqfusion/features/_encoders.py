"""Parts of the image encoders that several upsamplers share."""

import math

import torch
from torch import Tensor, nn

from freqfusion.features._rows import Rows
from freqfusion.ops._checks import accumulation_dtype

GROUPS = 8
"""Of every group norm."""


def convolution(inputs: int, outputs: int, kernel_size: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size; larger kernels see the map reflected at its border."""
    return nn.Conv2d(
        inputs, outputs, kernel_size, padding=kernel_size // 2, padding_mode="reflect", bias=bias
    )


def check_widths(width: int, heads: int) -> None:
    """Of queries and keys of AnyUp and JAFAR."""
    if width % GROUPS or width % heads:
        raise ValueError(
            f"qk_dim must be divisible by {GROUPS} and by num_heads, got {width} for {heads} heads"
        )


def check_image(image: Tensor, kernel_size: int) -> None:
    """That the border of an image can be reflected for a convolution."""
    reach = kernel_size // 2
    if min(image.shape[-2:]) <= reach:
        raise ValueError(
            f"image must have more than {reach} rows and columns, got {tuple(image.shape[-2:])}; give a larger one"
        )


class NamedBlock(nn.Module):
    """Twice a group norm, SiLU and a convolution, under the names of NAF and JAFAR."""

    def __init__(
        self, channels: int, kernel_size: int = 1, bias: bool = False, residual: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = convolution(channels, channels, kernel_size, bias)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = convolution(channels, channels, kernel_size, bias)
        self.residual = residual

    def rows(self, x: Rows) -> Rows:
        x = x.kept() if self.residual else x
        y = x.through(self.norm1).each(nn.functional.silu).through(self.conv1)
        y = y.through(self.norm2).each(nn.functional.silu).through(self.conv2)
        return y.joined(x, torch.add) if self.residual else y


class AxisRotation(nn.Module):
    """Turns channels by angles that grow along rows and columns; AnyUp's and JAFAR's.

    Channel c and its partner half the channels on have angles of their own, so it is no rotation of the pair
    once the frequencies are learned.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 4
        # on the CPU: not every device has doubles
        steps = torch.arange(quarter, dtype=torch.float64, device="cpu") / max(quarter - 1, 1)
        ones = (2 * math.pi * 100.0**-steps).to(torch.get_default_device(), torch.get_default_dtype())
        none = torch.zeros_like(ones)
        self.freqs = nn.Parameter(
            torch.stack([torch.cat([ones, ones, none, none]), torch.cat([none, none, ones, ones])])
        )

    def rows(self, x: Rows) -> Rows:
        height = x.height
        return x.placed(lambda part, lo, hi: self.turn(part, lo, hi, height))

    def turn(self, x: Tensor, lo: int, hi: int, height: int) -> Tensor:
        """Rows ``lo`` to ``hi - 1`` of a map of ``height`` rows."""
        dtype = accumulation_dtype(self.freqs)  # half precision does not count the rows of a large map
        y = torch.arange(lo, hi, device=x.device, dtype=dtype) / max(height - 1, 1)
        z = torch.arange(x.shape[3], device=x.device, dtype=dtype) / max(x.shape[3] - 1, 1)
        down, across = self.freqs.to(dtype)[..., None, None]
        angle = down * y[:, None] + across * z
        partner = torch.cat([-x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1)
        return x * angle.cos().to(x.dtype) + partner * angle.sin().to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """Of length 1 over the channels; zeros stay zeros, in half precision too."""
    return nn.functional.normalize(x.to(accumulation_dtype(x)), dim=1).to(x.dtype)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm over the last axis, applied over the channels of ``(B, C, H, W)``."""
    return norm(x.movedim(1, -1)).movedim(-1, 1)


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map of the channels of ``(B, C, H, W)``."""
    return nn.functional.conv2d(x, weight[..., None, None], bias)
