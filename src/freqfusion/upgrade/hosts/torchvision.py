"""torchvision: ``FeaturePyramidNetwork``, wherever it is."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host


@register_host
class UpgradedFeaturePyramidNetwork(Upgraded, FeaturePyramidNetwork):
    """Top-down pyramid whose levels are fused instead of upsampled by nearest neighbours and added.

    ``fusions.i`` joins level ``i`` with level ``i + 1``. ``BackboneWithFPN`` of Faster, Mask and Keypoint
    R-CNN, RetinaNet and FCOS holds one; their transforms pad images to multiples of 32, other sizes work too.
    """

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        channels = [_convolution(block).out_channels for block in module.inner_blocks]
        levels = reversed(range(len(channels) - 1))
        return [FusionPoint(str(i), channels[i], channels[i + 1]) for i in levels]

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        sizes = [-(-37 // 2**i) for i in range(len(module.inner_blocks))]
        channels = [_convolution(block).in_channels for block in module.inner_blocks]
        return (
            OrderedDict(
                (str(i), torch.randn(1, c, size, size + 3))
                for i, (c, size) in enumerate(zip(channels, sizes, strict=True))
            ),
        )

    def forward(self: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(x), list(x.values())
        top = self.get_result_from_inner_blocks(maps[-1], -1)
        results = [self.get_result_from_layer_blocks(top, -1)]
        for i in reversed(range(len(maps) - 1)):
            lateral = self.get_result_from_inner_blocks(maps[i], i)
            lateral, top = self.fusions[str(i)](lateral, top)
            top = lateral + top
            results.insert(0, self.get_result_from_layer_blocks(top, i))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


def _convolution(block: nn.Module) -> nn.Conv2d:
    """The convolution of a lateral block; in torchvision's own a norm follows it."""
    return next(module for module in block.modules() if isinstance(module, nn.Conv2d))
