"""An FPN segmentation network on a small encoder of ours, or on any of timm's."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from freqfusion._optional import require
from freqfusion.decoders.fpn import FPN
from freqfusion.models.base import Segmenter

WIDTHS = (32, 48, 64, 96)
FPN_CHANNELS = 48
FREQFUSION_OPTIONS: dict[str, Any] = {"compressed_channels": 16}


def _conv_norm(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class SmallEncoder(nn.Module):
    """Stages of 3x3 convolutions with batch norm and ReLU, each halving the size (rounded up).

    Args:
        widths: channels of the stages' maps, at strides 2, 4, 8, ...
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.out_channels = tuple(widths)
        self.stages = nn.ModuleList()
        previous = 3
        for width in widths:
            self.stages.append(nn.Sequential(_conv_norm(previous, width, stride=2), _conv_norm(width, width)))
            previous = width

    def forward(self, image: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` to maps ``(B, widths[i], ceil(H / 2**(i+1)), ceil(W / 2**(i+1)))``."""
        maps = []
        x = image
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class TimmEncoder(nn.Module):
    """The four coarsest maps of a timm network, at strides 4, 8, 16 and 32 as a rule, with fresh weights.

    Args:
        name: a network of ``timm.list_models()`` that gives feature maps, such as ``resnet18``.

    Raises:
        ImportError: where timm is not installed.
        ValueError: for an unknown name, or a network with fewer than four maps in (B, C, H, W).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        timm = require("timm", "vision")
        if not timm.is_model(name):
            raise ValueError(f"timm has no network {name!r}; timm.list_models() lists what there is")
        self.network = timm.create_model(name, pretrained=False, features_only=True)
        channels = self.network.feature_info.channels()
        layout = getattr(self.network, "output_fmt", "NCHW")
        layout = getattr(layout, "value", layout)  # an enumeration in timm
        if len(channels) < 4 or layout != "NCHW":
            raise ValueError(
                f"{name!r} gives {len(channels)} maps in {layout}; an FPN here needs at "
                "least four in NCHW: take a convolutional network such as resnet18"
            )
        self.out_channels = tuple(channels[-4:])

    def forward(self, image: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` to four maps, fine to coarse."""
        return list(self.network(image)[-4:])


class FPNHead(nn.Module):
    """An FPN of which the finest level is classified by a 1x1 convolution."""

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int,
        fusion: str,
        fusion_options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.fpn = FPN(in_channels, channels, fusion, fusion_options, num_outputs=1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """``(B, num_classes, H_0, W_0)`` at the size of the finest map."""
        return self.conv_seg(self.fpn(features)[0])


class FPNSegmenter(Segmenter):
    """An encoder of four maps and an FPN that adds; the finest level is classified.

    Args:
        num_classes: number of classes K.
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        encoder: ``"small"``: convolutions with maps at strides 2, 4, 8 and 16; else a name of timm, see
            :class:`TimmEncoder`.
        channels: channels of the FPN.
        fusion_options: arguments of the fusion method. On the small encoder FreqFusion gets
            ``compressed_channels=16`` unless told otherwise.

    Raises:
        ImportError: for an encoder of timm where timm is not installed.
        ValueError: for an unknown fusion or encoder.
    """

    def __init__(
        self,
        num_classes: int,
        fusion: str = "freqfusion",
        *,
        encoder: str = "small",
        channels: int = FPN_CHANNELS,
        fusion_options: Mapping[str, Any] | None = None,
    ) -> None:
        backbone = SmallEncoder() if encoder == "small" else TimmEncoder(encoder)
        defaults = FREQFUSION_OPTIONS if (encoder, fusion) == ("small", "freqfusion") else {}
        options = {**defaults, **(fusion_options or {})}
        head = FPNHead(backbone.out_channels, num_classes, channels, fusion, options)
        super().__init__(backbone, head, num_classes)

    def decode(self, image: Tensor) -> Tensor:
        """Class scores at the stride of the finest map, 2 on the small encoder: ``(B, num_classes, h, w)``."""
        return self.decode_head(self.backbone(image))
