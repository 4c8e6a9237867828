"""transformers: the feature pyramid of MaskFormer's pixel decoder."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.maskformer.modeling_maskformer import MaskFormerFPNLayer

from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host


@register_host
class UpgradedMaskFormerFPNLayer(Upgraded, MaskFormerFPNLayer):
    """A level of the pyramid; ``fusions.up`` replaces nearest neighbours. Levels are in the order coarse to fine."""

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        channels = module.proj[0].out_channels
        return [FusionPoint("up", channels, channels)]

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        lateral = module.proj[0]
        return torch.randn(1, lateral.out_channels, 5, 7), torch.randn(1, lateral.in_channels, 9, 13)

    def forward(self, down: Tensor, left: Tensor) -> Tensor:
        left, down = self.fusions["up"](self.proj(left), down)
        return self.block(left + down)
