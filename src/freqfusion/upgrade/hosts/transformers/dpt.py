"""transformers: the fusion stages of DPT, Depth Anything, Prompt Depth Anything and ZoeDepth."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.models.depth_anything.modeling_depth_anything import DepthAnythingFeatureFusionStage
from transformers.models.dpt.modeling_dpt import DPTFeatureFusionStage
from transformers.models.prompt_depth_anything.modeling_prompt_depth_anything import (
    PromptDepthAnythingFeatureFusionStage,
)
from transformers.models.zoedepth.modeling_zoedepth import ZoeDepthFeatureFusionStage

from freqfusion.ops.resize import resize
from freqfusion.upgrade.base import STEM_WIDTHS, FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host


class _Stage(Upgraded):
    """The fusion layers of a DPT-like decoder: what a layer upsamples is fused with what the next one adds to it.

    A layer upsamples its map last, so ``fusions.i`` replaces the interpolation of layer ``i`` and is guided by the
    map that layer ``i + 1`` adds, after that layer's first residual unit. The last layer upsamples once more,
    where no finer map is; that stays the host's, unless the image is a guide: then ``fusions.image_2`` does it by the
    image's map of stride 2, at the size that the host gives.
    """

    doubles = True
    """Whether a finer map is resized to twice the coarser one's size, not the coarser to the finer one's."""

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        points = []
        for i, layer in enumerate(module.layers[:-1]):
            channels = layer.projection.in_channels
            corners = getattr(layer, "align_corners", True)
            points.append(FusionPoint(str(i), channels, channels, "bilinear", corners))
        return points

    @staticmethod
    def image_points(module: Any, patch: int) -> list[FusionPoint]:
        layer = module.layers[-1]
        channels, corners = layer.projection.in_channels, getattr(layer, "align_corners", True)
        return [FusionPoint("image_2", STEM_WIDTHS[2], channels, "bilinear", corners, stride=2)]

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        channels = module.layers[0].projection.in_channels
        sizes = [-(-20 // 2**i) for i in range(len(module.layers))]
        return ([torch.randn(1, channels, n, n + 2) for n in sizes],)

    def forward(
        self: Any, hidden_states: Sequence[Tensor], size: Any = None, prompt_depth: Tensor | None = None
    ) -> list[Tensor]:
        maps = hidden_states[::-1]
        x, outputs = maps[0], []
        for i, (layer, finer) in enumerate(pairwise(self.layers)):
            x = layer.residual_layer2(x)
            if prompt_depth is not None:
                x = x + layer.prompt_depth_layer(resize(prompt_depth, x.shape[-2:], "bilinear"))
            fine = maps[i + 1]
            if self.doubles:
                fine = resize(fine, [2 * side for side in x.shape[-2:]], "bilinear")
            fine, x = self.fusions[str(i)](finer.residual_layer1(fine), x)
            outputs.append(layer.projection(x))
            x = outputs[-1] + fine
        last = self.layers[-1]
        guides = self.fusions["stem"]() if "stem" in self.fusions else None
        if guides is None:
            prompt = {} if prompt_depth is None else {"prompt_depth": prompt_depth}
            return [*outputs, last(x, **prompt)]
        x = last.residual_layer2(x)
        if prompt_depth is not None:
            x = x + last.prompt_depth_layer(resize(prompt_depth, x.shape[-2:], "bilinear"))
        guide = resize(guides[2], [2 * side for side in x.shape[-2:]], "bilinear")
        _, x = self.fusions["image_2"](guide, x)
        return [*outputs, last.projection(x)]


@register_host
class UpgradedDPTFeatureFusionStage(_Stage, DPTFeatureFusionStage):
    """The fusion layers of DPT."""


@register_host
class UpgradedZoeDepthFeatureFusionStage(_Stage, ZoeDepthFeatureFusionStage):
    """The fusion layers of ZoeDepth."""


@register_host
class UpgradedDepthAnythingFeatureFusionStage(_Stage, DepthAnythingFeatureFusionStage):
    """The fusion layers of Depth Anything."""

    doubles = False


@register_host
class UpgradedPromptDepthAnythingFeatureFusionStage(_Stage, PromptDepthAnythingFeatureFusionStage):
    """The fusion layers of Prompt Depth Anything; a layer adds the prompt before it upsamples, as in the host."""

    doubles = False
