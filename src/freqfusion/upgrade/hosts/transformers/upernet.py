"""transformers: the UPerNet heads of ``UperNet...``, ``Beit...`` and ``Data2VecVisionForSemanticSegmentation``."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.beit.modeling_beit import BeitUperHead
from transformers.models.data2vec.modeling_data2vec_vision import Data2VecVisionUperHead
from transformers.models.upernet.modeling_upernet import UperNetHead

from freqfusion.ops.resize import resize
from freqfusion.upgrade.base import STEM_WIDTHS, FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host


class _Head(Upgraded):
    """UPerNet head; its top-down additions are fused.

    ``fusions.i`` joins level ``i`` with level ``i + 1``, from coarse to fine. The concatenation of all levels
    at the finest size, after the output convolutions, stays the host's. Over a plain vision transformer, whose
    levels have one stride, nothing is upsampled; the fusions then filter and resample at that size.
    """

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        levels = reversed(range(len(module.lateral_convs)))
        return [FusionPoint(str(i), module.channels, module.channels, "bilinear") for i in levels]

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        sizes = [-(-37 // 2**i) for i in range(len(module.in_channels))]
        return ([torch.randn(1, c, n, n + 3) for c, n in zip(module.in_channels, sizes, strict=True)],)

    def forward(self: Any, encoder_hidden_states: Any) -> Tensor:
        top = self.psp_forward(encoder_hidden_states)
        maps = [top]
        for i in reversed(range(len(self.lateral_convs))):
            lateral, top = self.fusions[str(i)](self.lateral_convs[i](encoder_hidden_states[i]), top)
            top = lateral + top
            maps.insert(0, self.fpn_convs[i](top))
        maps = [resize(x, maps[0].shape[-2:], "bilinear") for x in maps]
        return self.scores(self.fpn_bottleneck(torch.cat(maps, dim=1)))

    def scores(self: Any, x: Tensor) -> Tensor:
        """Class scores of the joined map; of the map brought up, at the size of the image, where that is a guide."""
        plain = self.classifier(x)
        guides = self.fusions["stem"]() if "stem" in self.fusions else None
        if guides is None:
            return plain
        for stride in sorted(guides, reverse=True):
            if f"image_{stride}" in self.fusions:
                _, x = self.fusions[f"image_{stride}"](guides[stride], x)
        size = self.fusions["stem"].image.shape[-2:]
        return self.gate(resize(plain, size, "bilinear"), resize(self.classifier(x), size, "bilinear"))


@register_host
class UpgradedUperNetHead(_Head, UperNetHead):
    """The head of UperNet, over any backbone.

    Over a plain vision transformer the image can be a guide: ``fusions.image_8`` and ``fusions.image_4`` then
    bring the joined map to a quarter of the image before it is classified. The classes have a gate.
    """

    @staticmethod
    def image_points(module: Any, patch: int) -> list[FusionPoint]:
        channels = module.channels
        return [
            FusionPoint(
                f"image_{stride}", STEM_WIDTHS[stride], channels, "bilinear", gated=False, stride=stride
            )
            for stride in (8, 4)
            if stride < patch
        ]

    @staticmethod
    def gate_channels(module: Any) -> int:
        return module.classifier.out_channels


@register_host
class UpgradedBeitUperHead(_Head, BeitUperHead):
    """The head of BEiT, whose neck has given the levels strides of 4, 8, 16 and 32."""


@register_host
class UpgradedData2VecVisionUperHead(_Head, Data2VecVisionUperHead):
    """The head of Data2Vec, whose neck has given the levels strides of 4, 8, 16 and 32."""
