"""MONAI: the expanding paths of its U-Nets with ``spatial_dims=2``.

Most upsample the coarse map by learned weights; :mod:`freqfusion.upgrade.learned` says what becomes of those.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from monai.networks.blocks.dynunet_block import UnetUpBlock
from monai.networks.blocks.unetr_block import UnetrUpBlock
from monai.networks.blocks.upsample import SubpixelUpsample
from monai.networks.nets.basic_unet import UpCat
from monai.networks.nets.segresnet import SegResNet
from torch import Tensor, nn

from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host
from freqfusion.upgrade.learned import averaged, fitted


def _point(name: str, hr_channels: int, lr_channels: int, upsample: Any, after: nn.Module) -> FusionPoint:
    """``upsample`` is the module that upsamples, ``after`` a convolution that follows it."""
    interpolation = getattr(upsample, "upsample_non_trainable", None)
    skipped = ""
    if not isinstance(after, nn.Conv2d):
        skipped = f"fusions are for 2D, this is a {type(after).__name__}; build the model with spatial_dims=2"
    elif any(
        isinstance(module, nn.ConvTranspose2d) and set(module.stride) == {1} for module in upsample.modules()
    ):
        skipped = "both maps have the same size"
    elif not lr_channels:
        skipped = "cannot tell how many channels come from the coarse map"
    if interpolation is None:
        return FusionPoint(name, hr_channels, lr_channels, "learned", skipped=skipped)
    corners = bool(interpolation.align_corners)
    return FusionPoint(name, hr_channels, lr_channels, interpolation.mode, corners, skipped)


def _enlarge(upsample: Any, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Callable[[], Tensor]]:
    """The coarse map that a fusion upsamples, and how the host upsamples it."""
    if hasattr(upsample, "upsample_non_trainable"):
        coarse = upsample.preconv(x) if hasattr(upsample, "preconv") else x
        return coarse, lambda: fitted(upsample.upsample_non_trainable(coarse), size)
    enlarged = upsample(x)
    return averaged(enlarged, x.shape[-2:]), partial(fitted, enlarged, size)


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
        return torch.randn(1, in_channels, 5, 6), torch.randn(1, hr_channels, 10 + odd, 12)

    def forward(self: Any, x: Tensor, x_e: Any) -> Tensor:
        coarse, plain = _enlarge(self.upsample, x, x_e.shape[-2:])
        return self.convs(torch.cat(self.fusions["up"](x_e, coarse, plain), dim=1))


def _block_points(module: Any) -> list[FusionPoint]:
    conv = module.transp_conv.conv
    return [
        _point("up", conv.out_channels, conv.out_channels, module.transp_conv, module.conv_block.conv1.conv)
    ]


def _block_example(module: Any) -> tuple[Any, ...]:
    conv = module.transp_conv.conv
    size = [4 * stride for stride in conv.stride]
    return torch.randn(1, conv.in_channels, 4, 4), torch.randn(1, conv.out_channels, *size)


def _block_forward(module: Any, inp: Tensor, skip: Tensor) -> Tensor:
    coarse, plain = _enlarge(module.transp_conv, inp, skip.shape[-2:])
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
        return (torch.randn(1, module.in_channels, side, side + side // 2),)

    def decode(self: Any, x: Tensor, down_x: list[Tensor]) -> Tensor:
        for i, ((conv, upsample), layers) in enumerate(zip(self.up_samples, self.up_layers, strict=True)):
            fine = down_x[i + 1]
            coarse, plain = _enlarge(upsample, conv(x), fine.shape[-2:])
            fine, x = self.fusions[str(i)](fine, coarse, plain)
            x = layers(x + fine)
        return self.conv_final(x) if self.use_conv_final else x
