"""MSCAN, the backbone of SegNeXt (Guo et al., NeurIPS 2022, https://arxiv.org/abs/2209.08575, section 3.1).

Module and parameter names follow the authors' state dicts, so that their weights load as they are.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MSCANVariant:
    """Sizes of one variant (SegNeXt paper, Table 2)."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    drop_path: float


MSCAN_VARIANTS: dict[str, MSCANVariant] = {
    "t": MSCANVariant((32, 64, 160, 256), (3, 3, 5, 2), 0.1),
    "s": MSCANVariant((64, 128, 320, 512), (2, 2, 4, 2), 0.1),
    "b": MSCANVariant((64, 128, 320, 512), (3, 3, 12, 3), 0.1),
    "l": MSCANVariant((64, 128, 320, 512), (3, 5, 27, 3), 0.3),
}
MLP_RATIOS = (8, 8, 4, 4)
LAYER_SCALE_INIT = 1e-2


def depthwise(channels: int, kernel_size: int | tuple[int, int]) -> nn.Conv2d:
    """A depthwise convolution that keeps the map's size (odd kernel sides)."""
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return nn.Conv2d(channels, channels, sides, padding=(sides[0] // 2, sides[1] // 2), groups=channels)


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a sample's residual branch with probability ``rate``.

    The kept branches are divided by ``1 - rate``. Source: Huang et al., ECCV 2016, arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``(B, ...)``; the same shape comes back."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * (mask.bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Stem(nn.Module):
    """Two stride-2 3x3 convolutions: ``(B, 3, H, W)`` to ``(B, width, H/4, W/4)``, sides rounded up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class PatchEmbed(nn.Module):
    """A stride-2 3x3 convolution with batch norm between two stages."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class SpatialGate(nn.Module):
    """Multi-scale convolutional attention: a map made by strip convolutions multiplies its input.

    SegNeXt paper, equations 1 and 2: a 5x5 depthwise convolution, three branches of strips of length
    7, 11 and 21 summed with it, and a 1x1 convolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = depthwise(channels, 5)
        self.conv0_1 = depthwise(channels, (1, 7))
        self.conv0_2 = depthwise(channels, (7, 1))
        self.conv1_1 = depthwise(channels, (1, 11))
        self.conv1_2 = depthwise(channels, (11, 1))
        self.conv2_1 = depthwise(channels, (1, 21))
        self.conv2_2 = depthwise(channels, (21, 1))
        self.conv3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        base = self.conv0(x)
        attention = base + self.conv0_2(self.conv0_1(base))
        attention = attention + self.conv1_2(self.conv1_1(base))
        attention = attention + self.conv2_2(self.conv2_1(base))
        return self.conv3(attention) * x


class Attention(nn.Module):
    """The gate between two 1x1 convolutions, with a shortcut of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = SpatialGate(channels)
        self.proj_2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x))))


class DepthwiseConv(nn.Module):
    """The 3x3 depthwise convolution of the MLP; a module of its own only for the authors' key names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = depthwise(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class Mlp(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, GELU, 1x1 reduction."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = DepthwiseConv(hidden)
        self.activation = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    """Attention and MLP, each with batch norm before it and a scaled residual branch."""

    def __init__(self, channels: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attn = Attention(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = Mlp(channels, channels * mlp_ratio)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), LAYER_SCALE_INIT))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), LAYER_SCALE_INIT))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class MSCAN(nn.Module):
    """Multi-scale convolutional attention network.

    Fresh weights follow the authors' rule: convolutions normal with variance ``2 / fan_out``, biases zero.

    Args:
        variant: ``"t"``, ``"s"``, ``"b"`` or ``"l"``.

    Attributes:
        out_channels: channels of the four maps.

    Raises:
        ValueError: for an unknown variant.
    """

    def __init__(self, variant: str = "t") -> None:
        super().__init__()
        if variant not in MSCAN_VARIANTS:
            raise ValueError(f"unknown MSCAN variant {variant!r}; choose one of {', '.join(MSCAN_VARIANTS)}")
        sizes = MSCAN_VARIANTS[variant]
        self.out_channels = sizes.widths
        # Stochastic depth grows linearly from 0 in the first block to the full rate in the last.
        rates = [rate.item() for rate in torch.linspace(0, sizes.drop_path, sum(sizes.depths), device="cpu")]
        for stage, (width, depth, ratio) in enumerate(
            zip(sizes.widths, sizes.depths, MLP_RATIOS, strict=True)
        ):
            embed = Stem(width) if stage == 0 else PatchEmbed(sizes.widths[stage - 1], width)
            first = sum(sizes.depths[:stage])
            blocks = nn.ModuleList(Block(width, ratio, rate) for rate in rates[first : first + depth])
            setattr(self, f"patch_embed{stage + 1}", embed)
            setattr(self, f"block{stage + 1}", blocks)
            setattr(self, f"norm{stage + 1}", nn.LayerNorm(width))
        self.apply(_init_convolution)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Four maps, fine to coarse.

        Args:
            image: ``(B, 3, H, W)``, floating point, ``H, W >= 1``.

        Returns:
            Maps ``(B, out_channels[i], ceil(H / 2**(i+2)), ceil(W / 2**(i+2)))``, at strides 4, 8, 16, 32.
        """
        x = image
        maps = []
        for stage in ("1", "2", "3", "4"):
            x = self.get_submodule("patch_embed" + stage)(x)
            for block in self.get_submodule("block" + stage).children():
                x = block(x)
            norm = self.get_submodule("norm" + stage)
            x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps.append(x)
        return maps


def _init_convolution(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
