"""Fusions that interpolate: the baselines every method is compared with."""

from torch import Tensor

from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.ops._checks import checked_options
from freqfusion.ops.resize import resize


class Nearest(Fusion):
    """Nearest-neighbour upsampling of the coarse map; the fine map passes unchanged."""

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        return FusedFeatures(None, hr_feat, resize(lr_feat, hr_feat.shape[2:], "nearest"))


class Nearest3d(Nearest):
    """:class:`Nearest` for volumes ``(B, C, D, H, W)``."""

    spatial_dims = 3


class Bilinear(Fusion):
    """Bilinear upsampling of the coarse map; the fine map passes unchanged.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        align_corners: let the centres of the corner pixels coincide, instead of the maps' borders.
    """

    @checked_options
    def __init__(self, hr_channels: int, lr_channels: int, align_corners: bool = False) -> None:
        super().__init__(hr_channels, lr_channels)
        self.align_corners = align_corners

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        size = hr_feat.shape[2:]
        return FusedFeatures(None, hr_feat, resize(lr_feat, size, "bilinear", self.align_corners))


class Trilinear(Bilinear):
    """Trilinear upsampling of a coarse volume ``(B, C, d, h, w)``; the fine one passes unchanged.

    Arguments as of :class:`Bilinear`.
    """

    spatial_dims = 3
