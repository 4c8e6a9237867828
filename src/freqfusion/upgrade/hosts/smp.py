"""segmentation_models_pytorch: the decoders that join coarse and fine maps, and the models around them.

The decoders do not know the encoder's channels and strides, so they are upgraded inside their models. The models
change along with them: they take images of any size then (as far as the encoder does), since no decoder counts on a
factor of two any more.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.linknet.decoder import LinknetDecoder
from segmentation_models_pytorch.decoders.manet.decoder import MAnetDecoder
from segmentation_models_pytorch.decoders.pan.decoder import PANDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from freqfusion.decoders.progressive import cascade_channels
from freqfusion.ops.resize import resize
from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host
from freqfusion.upgrade.learned import averaged, fitted


class _InModel(NamedTuple):
    """A decoder and the maps that its model's encoder gives it, from the image on; none without a model."""

    decoder: Any
    channels: Sequence[int]
    strides: Sequence[int]

    def joined(self) -> list[tuple[str, Any, int]]:
        """Name and block of every step of a U-shaped decoder, with the channels of its skip connection."""
        blocks = zip(
            self.decoder.blocks, self.channels[-2:0:-1], strict=False
        )  # the last has no skip connection
        return [(str(i), block, channels) for i, (block, channels) in enumerate(blocks) if channels]

    def features(self, height: int, width: int) -> list[Tensor]:
        return [
            torch.randn(1, channels, height // stride, width // stride)
            for channels, stride in zip(self.channels, self.strides, strict=True)
        ]


class _Decoder(Upgraded):
    """What all decoders share. ``points(context)`` may count on an encoder: it is not asked without one."""

    @staticmethod
    def context(module: Any, parent: nn.Module | None) -> _InModel:
        encoder: Any = getattr(parent, "encoder", None)
        if not hasattr(encoder, "output_stride"):
            return _InModel(module, [], [])
        channels = encoder.out_channels
        return _InModel(module, channels, [min(2**i, encoder.output_stride) for i in range(len(channels))])

    @staticmethod
    def example(context: _InModel) -> tuple[Any, ...]:
        return (context.features(64, 96),)


class _AnySize(Upgraded):
    """A model whose upgraded decoder takes any size."""

    requires_divisible_input_shape = False


class _Model(_AnySize):
    """One whose decoder stops at a coarser map, which the head brings to the size of the image."""

    @staticmethod
    def decoder_stride(model: Any) -> int:
        """Image size over the size of the decoder's map."""
        return 4

    def forward(self: Any, x: Tensor) -> Any:
        features = self.encoder(x)
        decoded = self.decoder(features)
        masks = self.segmentation_head(decoded)
        sides = tuple(self.decoder_stride(self) * side for side in decoded.shape[-2:])
        # a head of the user's own may make anything else, which stays as it is
        if isinstance(masks, Tensor) and masks.ndim == 4 and masks.shape[-2:] == sides:
            height, width = x.shape[-2:]
            masks = resize(masks[..., :height, :width], (height, width), "bilinear")
        if self.classification_head is None:
            return masks
        return masks, self.classification_head(features[-1])


@register_host
class UpgradedUnetDecoder(_Decoder, UnetDecoder):
    """``fusions.i`` joins the map that enters ``blocks[i]`` with that block's skip connection."""

    @staticmethod
    def points(context: _InModel) -> list[FusionPoint]:
        return [
            FusionPoint(name, channels, block.conv1[0].in_channels - channels, block.interpolation_mode)
            for name, block, channels in context.joined()
        ]

    def forward(self: Any, features: list[Tensor]) -> Tensor:
        x = self.center(features[-1])
        for i, block in enumerate(self.blocks):
            fine = features[-2 - i]
            skip = fine if i + 2 < len(features) else None
            if str(i) in self.fusions:
                skip, x = self.fusions[str(i)](fine, x)
            x = block(x, *fine.shape[-2:], skip_connection=skip)
        return x


@register_host
class UpgradedUnetPlusPlusDecoder(_Decoder, UnetPlusPlusDecoder):
    """``fusions.x_i_j`` joins the map that enters ``blocks["x_i_j"]`` with all maps of that level so far."""

    @staticmethod
    def points(context: _InModel) -> list[FusionPoint]:
        decoder, points = context.decoder, []
        for level in range(decoder.depth if context.channels else 0):
            for start in range(level, -1, -1):
                block = decoder.blocks[f"x_{start}_{level}"]
                if block.conv1 is None:
                    continue
                lr_channels = decoder.skip_channels[level - 1] if start else decoder.in_channels[level]
                hr_channels = block.conv1[0].in_channels - lr_channels
                if hr_channels:
                    points.append(
                        FusionPoint(f"x_{start}_{level}", hr_channels, lr_channels, block.interpolation_mode)
                    )
        return points

    def forward(self: Any, features: list[Tensor]) -> Tensor:
        nodes: dict[int, Tensor] = {}  # of the level before, by where their chain started
        for level in range(self.depth):
            nodes[level] = features[-1 - level]
            here = [features[-2 - level]]
            for start in range(level, -1, -1):
                name = f"x_{start}_{level}"
                nodes[start] = self._node(name, nodes[start], torch.cat(here, dim=1))
                here.insert(0, nodes[start])
        return self._node(f"x_0_{self.depth}", nodes[0], features[0], joined=False)

    def _node(self: Any, name: str, x: Tensor, fine: Tensor, joined: bool = True) -> Tensor:
        block = self.blocks[name]
        if block.conv1 is None:  # a level without channels
            return fine[:, :0]
        if name in self.fusions:
            fine, x = self.fusions[name](fine, x)
        x = resize(x, fine.shape[-2:], block.interpolation_mode)
        if joined:
            x = block.attention1(torch.cat((x, fine), dim=1))
        return block.attention2(block.conv2(block.conv1(x)))


@register_host
class UpgradedMAnetDecoder(_Decoder, MAnetDecoder):
    """``fusions.i`` joins what ``blocks[i].hl_conv`` makes of the coarse map with the skip connection."""

    @staticmethod
    def points(context: _InModel) -> list[FusionPoint]:
        return [
            FusionPoint(name, channels, channels, block.interpolation_mode)
            for name, block, channels in context.joined()
        ]

    def forward(self: Any, features: list[Tensor]) -> Tensor:
        x = self.center(features[-1])
        for i, block in enumerate(self.blocks):
            fine = features[-2 - i]
            if str(i) in self.fusions:
                fine, x = self.fusions[str(i)](fine, block.hl_conv(x))
                x = torch.cat((x * (block.SE_hl(x) + block.SE_ll(fine)), fine), dim=1)
            else:
                x = resize(x, fine.shape[-2:], block.interpolation_mode)
            x = block.conv2(block.conv1(x))
        return x


@register_host
class UpgradedLinknetDecoder(_Decoder, LinknetDecoder):
    """``fusions.i`` takes the place of the transposed convolution of ``blocks[i]``, guided by the skip connection.

    :mod:`freqfusion.upgrade.learned` says what becomes of its weights. Its normalization and activation follow
    as before.
    """

    @staticmethod
    def points(context: _InModel) -> list[FusionPoint]:
        return [
            FusionPoint(name, channels, block.block[1][0].out_channels, "learned")
            for name, block, channels in context.joined()
        ]

    def forward(self: Any, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for i, block in enumerate(self.blocks):
            fine = features[-2 - i]
            reduce, (conv, norm, activation), expand = block.block
            x = reduce(x)
            enlarged = conv(x)
            plain = partial(fitted, enlarged, fine.shape[-2:])
            if str(i) in self.fusions:
                fine, x = self.fusions[str(i)](fine, averaged(enlarged, x.shape[-2:]), plain)
                x = expand(activation(norm(x))) + fine
            else:
                x = expand(activation(norm(plain())))
        return x


@register_host
class UpgradedFPNDecoder(_Decoder, FPNDecoder):
    """``fusions.p4``, ``p3`` and ``p2`` join the pyramid's levels."""

    @staticmethod
    def points(context: _InModel) -> list[FusionPoint]:
        names = ("p4", "p3", "p2") if context.channels else ()
        channels = context.decoder.p5.out_channels
        return [
            FusionPoint(name, channels, channels, getattr(context.decoder, name).interpolation_mode)
            for name in names
        ]

    def forward(self: Any, features: list[Tensor]) -> Tensor:
        pyramid = [self.p5(features[-1])]
        for name, fine in zip(("p4", "p3", "p2"), features[-2:-5:-1], strict=True):
            lateral, x = self.fusions[name](getattr(self, name).skip_conv(fine), pyramid[-1])
            pyramid.append(lateral + x)
        maps = [block(x) for block, x in zip(self.seg_blocks, pyramid, strict=True)]
        height, width = maps[-1].shape[-2:]
        maps = [resize(x[..., :height, :width], (height, width), "bilinear") for x in maps]
        return self.dropout(self.merge(maps))


@register_host
class UpgradedPANDecoder(_Decoder, PANDecoder):
    """``fusions.gau3``, ``gau2`` and ``gau1`` join the attended fine map with the coarse one before their sum."""

    @staticmethod
    def points(context: _InModel) -> list[FusionPoint]:
        points = []
        for level in range(len(context.channels) - 2, 1, -1):
            block = getattr(context.decoder, f"gau{level - 1}")
            stride = context.strides[level]
            dilated = f"both maps have stride {stride}, since the encoder is dilated"
            skipped = dilated if context.strides[level + 1] == stride else ""
            channels = block.conv2.conv.out_channels
            mode = block.interpolation_mode
            points.append(
                FusionPoint(f"gau{level - 1}", channels, channels, mode, mode == "bilinear", skipped)
            )
        return points

    @staticmethod
    def example(context: _InModel) -> tuple[Any, ...]:
        return (context.features(256, 288),)  # the coarsest map is halved three times

    def forward(self: Any, features: list[Tensor]) -> Tensor:
        x = self.fpa(features[-1])
        for level in range(len(features) - 2, 1, -1):
            block = getattr(self, f"gau{level - 1}")
            fine = block.conv2(features[level]) * block.conv1(x)
            fine, x = self.fusions[f"gau{level - 1}"](fine, x)
            x = x + fine
        return x


@register_host
class UpgradedUPerNetDecoder(_Decoder, UPerNetDecoder):
    """``fusions.i`` joins the lateral map of ``fpn_lateral_blocks[i]`` with the coarser one.

    The last step, which resizes all levels to the finest and concatenates them, stays the host's.
    """

    @staticmethod
    def points(context: _InModel) -> list[FusionPoint]:
        channels = context.decoder.psp.out_conv[0].out_channels
        levels = len(context.decoder.fpn_lateral_blocks) if context.channels else 0
        return [FusionPoint(str(i), channels, channels, "bilinear") for i in range(levels)]

    def forward(self: Any, features: list[Tensor]) -> Tensor:
        maps = [norm(x) for norm, x in zip(self.feature_norms, features[2:], strict=True)]
        x = self.psp(maps[-1])
        outputs = [x]
        for i, (block, smooth) in enumerate(zip(self.fpn_lateral_blocks, self.fpn_conv_blocks, strict=True)):
            lateral, x = self.fusions[str(i)](block.conv_norm_relu(maps[-2 - i]), x)
            x = lateral + x
            outputs.append(smooth(x))
        size = outputs[-1].shape[-2:]
        return self.fusion_block(torch.cat([resize(x, size, "bilinear") for x in reversed(outputs)], dim=1))


@register_host
class UpgradedSegformerDecoder(_Decoder, SegformerDecoder):
    """Levels up to stride 4 are joined from coarse to fine instead of resized directly.

    ``fusions.i`` joins the level of stride ``2 ** i`` with the concatenation of all coarser ones, as in the
    concatenating example of the FreqFusion authors' README. One gate blends the result with the host's own resized
    levels. A map of stride 2, which convolutional encoders have, is made smaller as before.
    """

    @staticmethod
    def points(context: _InModel) -> list[FusionPoint]:
        channels = context.decoder.fuse_stage[0].out_channels
        levels = range(2, len(context.channels))
        return [
            FusionPoint(str(level), hr_channels, lr_channels, "bilinear", gated=False)
            for level, (hr_channels, lr_channels) in zip(
                levels[-2::-1], cascade_channels([channels] * len(levels)) if levels else (), strict=True
            )
        ]

    @staticmethod
    def gate_channels(context: _InModel) -> int:
        return context.decoder.fuse_stage[0].out_channels * (len(context.channels) - 2)

    def forward(self: Any, features: list[Tensor]) -> Tensor:
        levels = len(features)
        coarsest_first = features[::-1][: len(self.mlp_stage)]
        maps = [mlp(x) for mlp, x in zip(self.mlp_stage, coarsest_first, strict=True)]
        coarse, finer = maps[: levels - 2], maps[levels - 2 :]
        size = coarse[-1].shape[-2:]
        plain = torch.cat([resize(x, size, "bilinear") for x in coarse], dim=1)
        x = coarse[0]
        for level, fine in zip(range(levels - 2, 1, -1), coarse[1:], strict=True):
            x = torch.cat(self.fusions[str(level)](fine, x), dim=1)
        x = x.unflatten(1, (len(coarse), -1)).flip(1).flatten(1, 2)  # coarsest first
        finer = [resize(x, size, "bilinear") for x in finer]
        return self.fuse_stage(torch.cat([self.gate(plain, x), *finer], dim=1))


@register_host
class UpgradedDeepLabV3PlusDecoder(_Decoder, DeepLabV3PlusDecoder):
    """``fusions.up`` joins the output of the atrous pyramid (stride 8 or 16) with the map of stride 4."""

    @staticmethod
    def points(context: _InModel) -> list[FusionPoint]:
        decoder = context.decoder
        if not context.channels:
            return []
        return [
            FusionPoint(
                "up", decoder.block1[0].out_channels, decoder.aspp[1][-1].out_channels, "bilinear", True
            )
        ]

    def forward(self: Any, features: list[Tensor]) -> Tensor:
        fine, x = self.fusions["up"](self.block1(features[2]), self.aspp(features[-1]))
        return self.block2(torch.cat((x, fine), dim=1))


@register_host
class UpgradedUnetPlusPlus(_AnySize, smp.UnetPlusPlus):
    """Takes images of any size."""


@register_host
class UpgradedMAnet(_AnySize, smp.MAnet):
    """Takes images of any size."""


@register_host
class UpgradedLinknet(_AnySize, smp.Linknet):
    """Takes images of any size."""


@register_host
class UpgradedFPN(_Model, smp.FPN):
    """Takes images of any size."""

    @staticmethod
    def decoder_stride(model: Any) -> int:
        return 2 ** (len(model.encoder.out_channels) - 4)


@register_host
class UpgradedPAN(_Model, smp.PAN):
    """Takes images of any size; the coarsest map must have at least 8 pixels per side."""


@register_host
class UpgradedUPerNet(_Model, smp.UPerNet):
    """Takes images of any size."""


@register_host
class UpgradedSegformer(_Model, smp.Segformer):
    """Takes images of any size."""


@register_host
class UpgradedDeepLabV3Plus(_Model, smp.DeepLabV3Plus):
    """Takes images of any size."""
