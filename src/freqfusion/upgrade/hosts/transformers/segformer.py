"""transformers: the all-MLP head of ``SegformerForSemanticSegmentation``."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

from freqfusion.decoders.progressive import cascade_channels
from freqfusion.ops.resize import resize
from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host


@register_host
class UpgradedSegformerDecodeHead(Upgraded, SegformerDecodeHead):
    """SegFormer head whose levels are joined from coarse to fine instead of resized directly to 1/4.

    ``fusions.i`` joins level ``i`` with the concatenation of all coarser ones, so the coarse map grows to 3
    times the channels, as in the concatenating example of the FreqFusion authors' README. One gate blends the
    result with the host's own resized levels.
    """

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        levels = len(module.config.hidden_sizes)
        steps = cascade_channels([module.config.decoder_hidden_size] * levels)
        return [
            FusionPoint(str(levels - 2 - step), hr_channels, lr_channels, "bilinear", gated=False)
            for step, (hr_channels, lr_channels) in enumerate(steps)
        ]

    @staticmethod
    def gate_channels(module: Any) -> int:
        return module.config.decoder_hidden_size * len(module.config.hidden_sizes)

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        channels = module.config.hidden_sizes
        sizes = [-(-37 // 2**i) for i in range(len(channels))]
        return (tuple(torch.randn(1, c, n, n + 3) for c, n in zip(channels, sizes, strict=True)),)

    def forward(self, encoder_hidden_states: Any, **kwargs: Any) -> Tensor:
        # called linear_c up to transformers 5.8 at least
        projections: Any = self.linear_projections if hasattr(self, "linear_projections") else self.linear_c
        maps = [_project(level, mlp) for level, mlp in zip(encoder_hidden_states, projections, strict=True)]
        x = maps[-1]
        for i in reversed(range(len(maps) - 1)):
            x = torch.cat(self.fusions[str(i)](maps[i], x), dim=1)
        x = x.unflatten(1, (len(maps), -1)).flip(1).flatten(1, 2)  # the host concatenates the coarsest first
        if "gate" in self.fusions:
            size = maps[0].shape[-2:]
            x = self.gate(torch.cat([resize(y, size, "bilinear") for y in reversed(maps)], dim=1), x)
        return self.classifier(self.dropout(self.activation(self.batch_norm(self.linear_fuse(x)))))


def _project(level: Tensor, mlp: Any) -> Tensor:
    """``(B, C, H, W)`` with the head's channels; tokens ``(B, N, C)`` of a square image become a map."""
    if level.ndim == 3:  # the coarsest, with config.reshape_last_stage=False
        level = level.transpose(1, 2).unflatten(2, (math.isqrt(level.shape[1]), -1))
    return mlp(level).transpose(1, 2).unflatten(2, level.shape[-2:])
