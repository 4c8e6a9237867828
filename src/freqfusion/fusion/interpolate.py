"""Fusions that interpolate: the baselines every method is compared with."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from freqfusion.fusion.base import FusedFeatures, Fusion


def resize(x: Tensor, size: Sequence[int], mode: str, align_corners: bool = False) -> Tensor:
    """Interpolate ``(B, C, h, w)`` to ``size``; the map itself where it has that size already."""
    size = tuple(size)
    if x.shape[-2:] == size:
        return x
    if mode == "nearest":
        return F.interpolate(x, size=size, mode="nearest")
    return F.interpolate(x, size=size, mode=mode, align_corners=align_corners)


class Nearest(Fusion):
    """Nearest-neighbour upsampling of the coarse map; the fine map passes unchanged."""

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        return FusedFeatures(None, hr_feat, resize(lr_feat, hr_feat.shape[-2:], "nearest"))


class Bilinear(Fusion):
    """Bilinear upsampling of the coarse map (half-pixel centres); the fine map passes unchanged."""

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        return FusedFeatures(None, hr_feat, resize(lr_feat, hr_feat.shape[-2:], "bilinear"))
