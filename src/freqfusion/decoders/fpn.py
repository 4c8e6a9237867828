"""Feature pyramid with top-down addition (Lin et al., CVPR 2017, arXiv 1612.03144)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.decoders._blocks import apply_laterals, build_laterals, init_xavier
from freqfusion.fusion.catalog import create_fitting_fusion

TopLevel = Literal["none", "pool", "fused"]


class FPN(nn.Module):
    """Joins backbone maps from coarse to fine by ``fine + upsampled coarse``.

    Each map passes a 1x1 convolution, the fusion method brings the coarser result to the size of the
    finer map (and may refine both), the two are added, and a 3x3 convolution makes each output.

    Args:
        in_channels: channels of the maps, fine to coarse.
        channels: channels of every output. Any number: where the groups of a fusion method's default do not
            divide it, there are fewer, the greatest common divisor.
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        fusion_options: further arguments of the fusion method.
        num_outputs: how many of the finest levels to return; all by default. The 3x3 convolutions of the
            others are not built, so that no parameter stays without a gradient.
        top_level: what is above the coarsest map, for detectors that look for large objects there. ``"pool"``:
            every second pixel of the coarsest output (Lin et al., section 4.1). ``"fused"``: a 3x3 convolution
            of stride 2 on the coarsest map makes a further level, which is fused into the one below like the
            others; so the released FreqFusion detectors.

    Raises:
        ValueError: for fewer than two maps, an unknown fusion, top level or an impossible ``num_outputs``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        fusion: str = "bilinear",
        fusion_options: Mapping[str, Any] | None = None,
        num_outputs: int | None = None,
        top_level: TopLevel = "none",
    ) -> None:
        super().__init__()
        if top_level not in get_args(TopLevel):
            raise ValueError(f"top_level must be one of {', '.join(get_args(TopLevel))}, got {top_level!r}")
        self.out_channels = channels
        self.top_level = top_level
        self.laterals = build_laterals(in_channels, channels)
        if top_level == "fused":
            self.laterals.append(nn.Conv2d(in_channels[-1], channels, 3, stride=2, padding=1))
        levels = len(self.laterals)
        num_outputs = levels if num_outputs is None else num_outputs
        if not 1 <= num_outputs <= levels:
            raise ValueError(f"num_outputs must be between 1 and {levels}, got {num_outputs}")
        options = fusion_options or {}
        self.fusions = nn.ModuleList(
            create_fitting_fusion(fusion, channels, channels, options) for _ in range(levels - 1)
        )
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_outputs))
        init_xavier(*self.laterals, *self.outputs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Pyramid levels, fine to coarse.

        Args:
            features: maps ``(B, in_channels[i], H_i, W_i)``, fine to coarse, any sizes.

        Returns:
            ``num_outputs`` maps ``(B, channels, H_i, W_i)``, and one of half the coarsest size, rounded up, with
            ``top_level="pool"`` (``num_outputs`` counts that of ``"fused"``).
        """
        if self.top_level == "fused":
            features = [*features, *features[-1:]]
        laterals = apply_laterals(self.laterals, features)
        merged = [laterals[-1]]
        for fusion, fine in zip(self.fusions, reversed(laterals[:-1]), strict=True):
            _, hr_feat, lr_feat = fusion(hr_feat=fine, lr_feat=merged[0])
            merged.insert(0, hr_feat + lr_feat)
        outputs = [output(x) for output, x in zip(self.outputs, merged[: len(self.outputs)], strict=True)]
        if self.top_level == "pool":
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return outputs
