"""MONAI: the expanding paths of its U-Nets, for images and volumes.

Most upsample the coarse map by learned weights; :mod:`freqfusion.upgrade.learned` says what becomes of those.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from monai.networks.blocks.dynunet_block import UnetUpBlock
from monai.networks.blocks.unetr_block import UnetrUpBlock
from monai.networks.blocks.upsample import SubpixelUpsample
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets.basic_unet import UpCat
from monai.networks.nets.segresnet import SegResNet
from torch import Tensor, nn

from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host
from freqfusion.upgrade.learned import averaged, fitted

_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)


def _point(name: str, hr_channels: int, lr_channels: int, upsample: Any, after: nn.Module) -> FusionPoint:
    """``upsample`` is the module that upsamples, ``after`` a convolution that follows it."""
    interpolation = getattr(upsample, "upsample_non_trainable", None)
    skipped = ""
    if not isinstance(after, (nn.Conv2d, nn.Conv3d)):
        kind = type(after).__name__
        skipped = f"fusions are for 2D and 3D, this is a {kind}; build the model with spatial_dims=2 or 3"
    elif any(isinstance(module, _TRANSPOSED) and set(module.stride) == {1} for module in upsample.modules()):
        skipped = "both maps have the same size"
    elif not lr_channels:
        skipped = "cannot tell how many channels come from the coarse map"
    dims = 3 if isinstance(after, nn.Conv3d) else 2
    if interpolation is None:
        return FusionPoint(name, hr_channels, lr_channels, "learned", skipped=skipped, spatial_dims=dims)
    mode, corners = interpolation.mode, bool(interpolation.align_corners)
    return FusionPoint(name, hr_channels, lr_channels, mode, corners, skipped, spatial_dims=dims)


def _enlarge(upsample: Any, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Callable[[], Tensor]]:
    """The coarse map that a fusion upsamples, and how the host upsamples it."""
    if hasattr(upsample, "upsample_non_trainable"):
        coarse = upsample.preconv(x) if hasattr(upsample, "preconv") else x
        return coarse, lambda: fitted(upsample.upsample_non_trainable(coarse), size)
    enlarged = upsample(x)
    return averaged(enlarged, x.shape[2:]), partial(fitted, enlarged, size)


def _is_volume(conv: nn.Module) -> bool:
    return isinstance(conv, nn.Conv3d)


class _InNet(NamedTuple):
    module: Any
    enlarged_channels: int
    """Channels of the map that is concatenated with the encoder's; 0 if unknown."""


@register_host
class UpgradedUpCat(Upgraded, UpCat):
    """``fusions.up`` joins a map with the encoder's, in BasicUNet, BasicUNetPlusPlus and FlexibleUNet."""

    @staticmethod
    def context(module: Any, parent: Any) -> _InNet:
        first = module.upsample[0]
        if isinstance(first, SubpixelUpsample):
            channels = getattr(first.conv_block, "out_channels", 0) // first.scale_factor**first.dimensions
        elif hasattr(first, "out_channels"):
            channels = first.out_channels
        else:  # only interpolation, as in level 0 of the basic networks: what comes from level 1 keeps its channels
            below = getattr(parent, "upcat_2", None) or getattr(parent, "upcat_1_1", None)
            channels = below.convs.conv_1.conv.out_channels if below is not None else 0
        return _InNet(module, channels)

    @staticmethod
    def points(context: _InNet) -> list[FusionPoint]:
        conv = context.module.convs.conv_0.conv
        hr_channels = conv.in_channels - context.enlarged_channels
        return (
            [_point("up", hr_channels, context.enlarged_channels, context.module.upsample, conv)]
            if hr_channels
            else []
        )

    @staticmethod
    def example(context: _InNet) -> tuple[Any, ...]:
        convs = [part for part in context.module.upsample.modules() if hasattr(part, "in_channels")]
        in_channels = convs[0].in_channels if convs else context.enlarged_channels
        hr_channels = context.module.convs.conv_0.conv.in_channels - context.enlarged_channels
        odd = int(context.module.is_pad)
        depth = _is_volume(context.module.convs.conv_0.conv)
        return torch.randn(1, in_channels, *[2] * depth, 5, 6), torch.randn(
            1, hr_channels, *[4] * depth, 10 + odd, 12
        )

    def forward(self: Any, x: Tensor, x_e: Any) -> Tensor:
        coarse, plain = _enlarge(self.upsample, x, x_e.shape[2:])
        return self.convs(torch.cat(self.fusions["up"](x_e, coarse, plain), dim=1))


def _block_points(module: Any) -> list[FusionPoint]:
    conv = module.transp_conv.conv
    return [
        _point("up", conv.out_channels, conv.out_channels, module.transp_conv, module.conv_block.conv1.conv)
    ]


def _block_example(module: Any) -> tuple[Any, ...]:
    conv = module.transp_conv.conv
    size = [4 * stride for stride in conv.stride]
    return torch.randn(1, conv.in_channels, *[4] * len(size)), torch.randn(1, conv.out_channels, *size)


def _block_forward(module: Any, inp: Tensor, skip: Tensor) -> Tensor:
    coarse, plain = _enlarge(module.transp_conv, inp, skip.shape[2:])
    skip, x = module.fusions["up"](skip, coarse, plain)
    return module.conv_block(torch.cat((x, skip), dim=1))


@register_host
class UpgradedUnetUpBlock(Upgraded, UnetUpBlock):
    """``fusions.up`` joins a map with the encoder's, in DynUNet."""

    points = staticmethod(_block_points)
    example = staticmethod(_block_example)
    forward = _block_forward


@register_host
class UpgradedUnetrUpBlock(Upgraded, UnetrUpBlock):
    """``fusions.up`` joins a map with the encoder's, in UNETR and SwinUNETR."""

    points = staticmethod(_block_points)
    example = staticmethod(_block_example)
    forward = _block_forward


@register_host
class UpgradedSegResNet(Upgraded, SegResNet):
    """``fusions.i`` joins what ``up_samples[i]`` upsamples with the map of the encoder that is added to it."""

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        points = []
        for i, (conv, upsample) in enumerate(module.up_samples):
            channels = conv.conv.out_channels
            points.append(_point(str(i), channels, channels, upsample, conv.conv))
        return points

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        side = 4 * 2 ** len(module.up_samples)
        depth = _is_volume(module.convInit.conv)
        return (torch.randn(1, module.in_channels, *[side] * depth, side, side + side // 2),)

    def decode(self: Any, x: Tensor, down_x: list[Tensor]) -> Tensor:
        for i, ((conv, upsample), layers) in enumerate(zip(self.up_samples, self.up_layers, strict=True)):
            fine = down_x[i + 1]
            coarse, plain = _enlarge(upsample, conv(x), fine.shape[2:])
            fine, x = self.fusions[str(i)](fine, coarse, plain)
            x = layers(x + fine)
        return self.conv_final(x) if self.use_conv_final else x


def _layers(module: Any, kinds: tuple[type[nn.Module], ...]) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, kinds)]


def _is_level(module: Any) -> bool:
    """Whether a skip connection spans a level of UNet: down, what is below, and up by a transposed convolution."""
    level = module.submodule
    if module.mode != "cat" or type(level) is not nn.Sequential or len(level) != 3:
        return False
    first_up = next(iter(_layers(level[2], (*_TRANSPOSED, nn.Conv2d, nn.Conv3d))), None)
    return isinstance(level[1], SkipConnection) and isinstance(first_up, _TRANSPOSED)


@register_host
class UpgradedSkipConnection(Upgraded, SkipConnection):
    """``fusions.up`` joins a map with what comes up from the level below, in UNet."""

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        if not _is_level(module):
            return []
        down, _, up = module.submodule
        first = _layers(down, (nn.Conv2d, nn.Conv3d))[0]
        return [_point("up", first.in_channels, _layers(up, _TRANSPOSED)[0].out_channels, up, first)]

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        first = _layers(module.submodule[0], (nn.Conv2d, nn.Conv3d))[0]
        sides = torch.full((len(first.stride),), 2)
        for conv in _layers(module, _TRANSPOSED):
            sides = sides * torch.tensor(conv.stride)
        return (torch.randn(1, first.in_channels, *sides.tolist()),)

    def forward(self: Any, x: Tensor) -> Tensor:
        if "up" not in self.fusions:
            return super().forward(x)
        enlarged = self.submodule(x)
        stride = _layers(self.submodule[2], _TRANSPOSED)[0].stride
        coarse = averaged(enlarged, [side // s for side, s in zip(enlarged.shape[2:], stride, strict=True)])
        fused = self.fusions["up"](x, coarse, partial(fitted, enlarged, x.shape[2:]))
        return torch.cat(fused, dim=self.dim)
