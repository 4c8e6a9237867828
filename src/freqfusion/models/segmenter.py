"""Segmentation networks made of an encoder and a decoder."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from freqfusion.decoders import FPN, ProgressiveConcat, UNet
from freqfusion.decoders._blocks import conv_norm_relu
from freqfusion.models.base import Segmenter
from freqfusion.models.encoders import TimmEncoder

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
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        widths: Any = backbone.out_channels
        super().__init__(
            backbone, DecoderHead(widths, num_classes, decoder, channels, fusion, fusion_options), num_classes
        )

    def decode(self, image: Tensor) -> Tensor:
        """Class scores at the stride of the finest map: ``(B, num_classes, h, w)``."""
        return self.decode_head(self.backbone(image))


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
    """A segmentation network with fresh weights on any timm backbone whose maps have different strides.

    Args:
        backbone: a network of ``timm.list_models()``, see :class:`~freqfusion.models.encoders.TimmEncoder`.
        decoder: ``"fpn"`` (maps are added), ``"unet"`` (concatenated and convolved at each level) or
            ``"progressive"`` (concatenated into one growing map).
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        num_classes: number of classes K, at least 1.
        channels: channels of the decoder.
        finest_stride: smallest stride of a map that the decoder gets; 2 adds a level to networks that have it.
        fusion_options: further arguments of the fusion method.
        backbone_options: further arguments of ``timm.create_model``.

    Raises:
        ImportError: where timm is not installed.
        ValueError: for an unknown name, a class count below 1, or a backbone without maps of two strides.
    """
    encoder = TimmEncoder(backbone, finest_stride, options=backbone_options)
    return EncoderDecoder(
        encoder, num_classes, fusion, decoder=decoder, channels=channels, fusion_options=fusion_options
    )
