"""U-Net decoder (Ronneberger et al., MICCAI 2015, arXiv 1505.04597) with a fusion method at every skip."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freqfusion.decoders._blocks import (
    apply_laterals,
    build_laterals,
    conv_norm_relu,
    init_xavier,
)
from freqfusion.fusion.catalog import create_fitting_fusion


class UNet(nn.Module):
    """Joins backbone maps from coarse to fine by concatenation and convolution.

    Each map passes a 1x1 convolution to ``channels`` = c. At each level the fusion method brings the deeper
    result to the size of the skip map (and may refine both), the two are concatenated (2 c), and two 3x3
    convolutions with batch norm and ReLU bring them back to c.

    Args:
        in_channels: channels of the maps, fine to coarse.
        channels: c. Any number: where the groups of a fusion method's default do not divide the channels,
            there are fewer, the greatest common divisor.
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        fusion_options: further arguments of the fusion method.

    Attributes:
        out_channels: channels of the output, c.

    Raises:
        ValueError: for fewer than two maps or an unknown fusion.

    Source: the second usage pattern of the FreqFusion authors' README.
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
        self.out_channels = channels
        self.laterals = build_laterals(in_channels, channels)
        steps = range(len(in_channels) - 1)
        self.fusions = nn.ModuleList(
            create_fitting_fusion(fusion, channels, channels, options) for _ in steps
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_norm_relu(2 * channels, channels), conv_norm_relu(channels, channels))
            for _ in steps
        )
        init_xavier(*self.laterals)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The result of the finest level.

        Args:
            features: maps ``(B, in_channels[i], H_i, W_i)``, fine to coarse, any sizes.

        Returns:
            ``(B, channels, H_0, W_0)``.
        """
        *skips, x = apply_laterals(self.laterals, features)
        for fusion, block, skip in zip(self.fusions, self.blocks, reversed(skips), strict=True):
            _, hr_feat, lr_feat = fusion(hr_feat=skip, lr_feat=x)
            x = block(torch.cat([hr_feat, lr_feat], dim=1))
        return x
