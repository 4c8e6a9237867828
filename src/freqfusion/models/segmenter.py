"""Segmentation networks made of an encoder and a decoder."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from freqfusion.decoders import FPN, ProgressiveConcat, UNet
from freqfusion.decoders._blocks import conv_norm_relu
from freqfusion.models.base import Segmenter
from freqfusion.models.encoders import WIDTHS, SmallEncoder, TimmEncoder

DECODERS: dict[str, Callable[..., nn.Module]] = {
    "fpn": partial(FPN, num_outputs=1),
    "unet": UNet,
    "progressive": ProgressiveConcat,
}


class DecoderHead(nn.Module):
    """A decoder whose finest map a 1x1 convolution classifies.

    The many channels of the progressive decoder are squeezed before by a 1x1 convolution with batch norm and
    ReLU. The decoder's parameters have its name: ``fpn``, ``unet`` or ``progressive``.

    Args:
        in_channels: channels of the maps, fine to coarse.
        num_classes: number of classes K.
        decoder: ``"fpn"``, ``"unet"`` or ``"progressive"``.
        channels: channels of the decoder.
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        fusion_options: further arguments of the fusion method.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        decoder: str,
        channels: int,
        fusion: str,
        fusion_options: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"unknown decoder {decoder!r}; choose one of {', '.join(DECODERS)}")
        self.decoder = decoder
        self.add_module(decoder, DECODERS[decoder](in_channels, channels, fusion, fusion_options))
        self.squeeze = (
            conv_norm_relu(channels * len(in_channels), channels, kernel_size=1)
            if decoder == "progressive"
            else nn.Identity()
        )
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """``(B, num_classes, H_0, W_0)`` at the size of the finest map."""
        joined = self.get_submodule(self.decoder)(features)
        finest = joined[0] if isinstance(joined, list) else joined
        return self.conv_seg(self.squeeze(finest))


class EncoderDecoder(Segmenter):
    """An encoder's maps joined by a decoder; the finest level is classified.

    Args:
        backbone: maps an image to feature maps ``(B, C_i, H_i, W_i)``, fine to coarse; its attribute
            ``out_channels`` names the C_i. :class:`~freqfusion.models.encoders.TimmEncoder`, for example.
        num_classes: number of classes K, at least 1.
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        decoder: ``"fpn"``, ``"unet"`` or ``"progressive"``.
        channels: channels of the decoder.
        fusion_options: further arguments of the fusion method.
        stem: another such encoder, whose maps are finer than the backbone's and guide them up; for a plain vision
            transformer, say. Not a part of the backbone: it has the head's learning rate and fresh weights.

    Raises:
        ValueError: for an unknown decoder or fusion, or a class count below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        fusion: str = "freqfusion",
        *,
        decoder: str = "fpn",
        channels: int = 128,
        fusion_options: Mapping[str, Any] | None = None,
        stem: nn.Module | None = None,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        encoders: list[Any] = [backbone] if stem is None else [stem, backbone]
        widths = [width for encoder in encoders for width in encoder.out_channels]
        super().__init__(
            backbone, DecoderHead(widths, num_classes, decoder, channels, fusion, fusion_options), num_classes
        )
        self.stem = stem

    def decode(self, image: Tensor) -> Tensor:
        """Class scores at the stride of the finest map: ``(B, num_classes, h, w)``."""
        fine = [] if self.stem is None else self.stem(image)
        return self.decode_head([*fine, *self.backbone(image)])


def build_segmenter(
    backbone: str,
    decoder: str = "fpn",
    fusion: str = "freqfusion",
    *,
    num_classes: int,
    channels: int = 128,
    finest_stride: int = 4,
    fusion_options: Mapping[str, Any] | None = None,
    backbone_options: Mapping[str, Any] | None = None,
) -> EncoderDecoder:
    """A segmentation network with fresh weights on a backbone of timm.

    To a backbone whose maps have one stride, a plain vision transformer, a stem of convolutions on the image
    (:class:`~freqfusion.models.encoders.SmallEncoder`) adds the finer maps, those of the strides ``finest_stride``,
    twice that, ... below the backbone's: 4 and 8 for patches of 14 or 16 pixels. So the decoder brings the tokens up
    in steps, with the image as guide. The idea to make a pyramid from one stride is that of ViTDet (Li et al., ECCV
    2022, arXiv 2203.16527), whose finer maps are made of the tokens by transposed convolutions.

    Args:
        backbone: a network of ``timm.list_models()``, see :class:`~freqfusion.models.encoders.TimmEncoder`.
        decoder: ``"fpn"`` (maps are added), ``"unet"`` (concatenated and convolved at each level) or
            ``"progressive"`` (concatenated into one growing map).
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        num_classes: number of classes K, at least 1.
        channels: channels of the decoder.
        finest_stride: smallest stride of a map that the decoder gets; 2 adds a level to networks that have it, and to
            plain vision transformers.
        fusion_options: further arguments of the fusion method.
        backbone_options: further arguments of ``timm.create_model``.

    Raises:
        ImportError: where timm is not installed.
        ValueError: for an unknown name, a class count below 1, a backbone without maps of two strides, or a
            ``finest_stride`` that leaves a stem nothing to add.
    """
    encoder = TimmEncoder(backbone, finest_stride, options=backbone_options)
    return EncoderDecoder(
        encoder,
        num_classes,
        fusion,
        decoder=decoder,
        channels=channels,
        fusion_options=fusion_options,
        stem=_build_stem(encoder, finest_stride) if encoder.is_plain else None,
    )


def _build_stem(encoder: TimmEncoder, finest_stride: int) -> SmallEncoder:
    """Maps at strides from ``finest_stride`` to below the encoder's."""
    strides = [2 ** (i + 1) for i in range(len(WIDTHS)) if 2 ** (i + 1) < encoder.strides[0]]
    skipped = sum(stride < finest_stride for stride in strides)
    if skipped == len(strides):
        raise ValueError(
            f"{encoder.name!r} gives maps of the stride {encoder.strides[0]} alone, and a stem adds the strides "
            f"{strides}, of which finest_stride={finest_stride} leaves none; lower it"
        )
    return SmallEncoder(WIDTHS[: len(strides)], skipped)
