"""transformers: the top-down half of the hybrid encoders of RT-DETR and RT-DETRv2."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.rt_detr.modeling_rt_detr import RTDetrCSPRepLayer
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2CSPRepLayer

from freqfusion.ops.resize import resize
from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host


class TopDownBlock(Upgraded):
    """A block of a hybrid encoder's ``fpn_blocks``; its ``pan_blocks``, of the same class, join equal sizes.

    The encoder gives it the coarse map, doubled by nearest neighbours, and the fine one, concatenated. Every
    second pixel of every second row of the doubled map is the coarse map itself, so the encoder's forward can
    stay as it is.
    """

    @staticmethod
    def context(module: Any, parent: nn.Module | None) -> Any:
        return module if module in getattr(parent, "fpn_blocks", ()) else None

    @staticmethod
    def points(context: Any) -> list[FusionPoint]:
        if context is None:
            return []
        channels = context.conv1.conv.in_channels // 2
        return [FusionPoint("up", channels, channels)]

    @staticmethod
    def example(context: Any) -> tuple[Any, ...]:
        channels = context.conv1.conv.in_channels // 2
        coarse, fine = torch.randn(1, channels, 5, 7), torch.randn(1, channels, 10, 14)
        return (torch.cat((resize(coarse, (10, 14), "nearest"), fine), dim=1),)

    def forward(self, doubled_and_fine: Tensor) -> Tensor:
        doubled, fine = doubled_and_fine.chunk(2, dim=1)
        fine, coarse = self.fusions["up"](fine, doubled[..., ::2, ::2])
        return super().forward(torch.cat((coarse, fine), dim=1))


@register_host
class UpgradedRTDetrCSPRepLayer(TopDownBlock, RTDetrCSPRepLayer):
    """A top-down block of RT-DETR."""


@register_host
class UpgradedRTDetrV2CSPRepLayer(TopDownBlock, RTDetrV2CSPRepLayer):
    """A top-down block of RT-DETRv2."""
