from collections.abc import Callable
from typing import Any

import segmentation_models_pytorch as smp
from segmentation_models_pytorch.encoders import encoders
from segmentation_models_pytorch.encoders._base import EncoderMixin
from torch import Tensor, nn

from host_cases import HostCase


class _Encoder(nn.Module, EncoderMixin):
    """One convolution a level; levels of stride 2 have no channels where ``placeholder``, as in transformers."""

    def __init__(self, out_channels: list[int], depth: int, output_stride: int) -> None:
        super().__init__()
        self._depth, self._in_channels, self._output_stride = depth, 3, output_stride
        self._out_channels = out_channels
        channels = [c or 8 for c in out_channels]
        strides = [min(2**i, output_stride) for i in range(depth + 1)]
        self.stages = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, strides[i + 1] // strides[i], 1) for i in range(depth)
        )

    def make_dilated(self, output_stride: int) -> None:
        pass

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [x]
        for stage, channels in zip(self.stages, self._out_channels[1 : self._depth + 1], strict=True):
            x = stage(x).relu()
            maps.append(x[:, :channels])
        return maps


for _name, _channels in (
    ("tiny", [3, 8, 16, 16, 32, 32]),
    ("tiny-wide", [3, 16, 32, 32, 64, 64]),
    ("tiny-no-stride-2", [3, 0, 32, 32, 32, 64]),
):
    encoders[_name] = {"encoder": _Encoder, "pretrained_settings": {}, "params": {"out_channels": _channels}}


def build(cls: type[nn.Module], encoder: str = "tiny", **options: Any) -> Callable[[], nn.Module]:
    return lambda: cls(encoder, encoder_weights=None, classes=3, **options)


LIFTED: dict[str, Any] = {"limit": "Expected image height and width divisible"}
_THREE: dict[str, Any] = {"encoder_depth": 3, "decoder_channels": (32, 16, 16)}

CASES = [
    HostCase("Unet", build(smp.Unet, **_THREE), sites=2),
    HostCase("UnetPlusPlus", build(smp.UnetPlusPlus, **_THREE), sites=3, **LIFTED),
    HostCase("MAnet", build(smp.MAnet, decoder_pab_channels=8, **_THREE), sites=2, **LIFTED),
    HostCase("Linknet", build(smp.Linknet, "tiny-wide", encoder_depth=3), sites=2, **LIFTED),
    HostCase(
        "FPN",
        build(smp.FPN, decoder_pyramid_channels=16, decoder_segmentation_channels=32),
        sites=3,
        **LIFTED,
    ),
    HostCase(
        "PAN",
        build(smp.PAN, decoder_channels=16),
        size=(128, 160),
        odd_size=(131, 165),
        sites=2,
        skipped=1,
        **LIFTED,
    ),
    HostCase("UPerNet", build(smp.UPerNet, decoder_channels=16), sites=3, **LIFTED),
    HostCase("Segformer", build(smp.Segformer, decoder_segmentation_channels=16), sites=3, **LIFTED),
    HostCase("DeepLabV3Plus", build(smp.DeepLabV3Plus, decoder_channels=16), sites=1, **LIFTED),
]
