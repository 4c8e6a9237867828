"""Progressive concatenation: a cascade from coarse to fine whose coarse map grows with every step."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freqfusion.decoders._blocks import apply_laterals, build_laterals, init_xavier
from freqfusion.fusion.catalog import create_fitting_fusion


def cascade_channels(in_channels: Sequence[int]) -> list[tuple[int, int]]:
    """``(hr_channels, lr_channels)`` of each fusion of a cascade over maps of these channels, fine to coarse.

    >>> cascade_channels([64, 128, 320, 512])
    [(320, 512), (128, 832), (64, 960)]
    """
    steps = []
    lr_channels = in_channels[-1]
    for hr_channels in reversed(in_channels[:-1]):
        steps.append((hr_channels, lr_channels))
        lr_channels += hr_channels
    return steps


def fuse_cascade(fusions: Iterable[nn.Module], features: Sequence[Tensor], groups: int = 1) -> Tensor:
    """Join maps from coarse to fine; each step concatenates the fine map and the upsampled coarser ones.

    Args:
        fusions: a fusion a step, built for :func:`cascade_channels`.
        features: maps ``(B, C_i, H_i, W_i)``, fine to coarse.
        groups: concatenate group by group: group 0 of the fine map, group 0 of the coarse one, group 1 of the
            fine map, ...; must divide the channels of every map.

    Returns:
        ``(B, sum of C_i, H_0, W_0)``.
    """
    x = features[-1]
    for fusion, fine in zip(fusions, reversed(features[:-1]), strict=True):
        _, hr_feat, lr_feat = fusion(hr_feat=fine, lr_feat=x)
        split = (1, (groups, -1))
        x = torch.cat([hr_feat.unflatten(*split), lr_feat.unflatten(*split)], dim=2).flatten(1, 2)
    return x


class ProgressiveConcat(nn.Module):
    """Joins backbone maps from coarse to fine by concatenation; nothing is added or squeezed on the way.

    Each map passes a 1x1 convolution to ``channels`` = c. The coarsest is fused with the next finer one and
    the two are concatenated (2 c), the result is fused with the next (3 c), and so on.

    Args:
        in_channels: channels of the maps, fine to coarse.
        channels: c. Any number: where the groups of a fusion method's default do not divide the channels,
            there are fewer, the greatest common divisor.
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        fusion_options: further arguments of the fusion method.

    Attributes:
        out_channels: channels of the output, c times the number of maps.

    Raises:
        ValueError: for fewer than two maps or an unknown fusion.

    Source: the first usage pattern of the FreqFusion authors' README, as in their SegNeXt head.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        fusion: str = "bilinear",
        fusion_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = fusion_options or {}
        self.out_channels = channels * len(in_channels)
        self.laterals = build_laterals(in_channels, channels)
        self.fusions = nn.ModuleList(
            create_fitting_fusion(fusion, hr_channels, lr_channels, options)
            for hr_channels, lr_channels in cascade_channels([channels] * len(in_channels))
        )
        init_xavier(*self.laterals)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """All maps in one, the finest first.

        Args:
            features: maps ``(B, in_channels[i], H_i, W_i)``, fine to coarse, any sizes.

        Returns:
            ``(B, out_channels, H_0, W_0)``.
        """
        return fuse_cascade(self.fusions, apply_laterals(self.laterals, features))
