"""SAPA-D: similarity to a few points of the coarse map that move freely."""

import torch
from torch import Tensor, nn

from freqfusion.fusion._norms import GroupNorm
from freqfusion.fusion._points import attend
from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.ops._checks import accumulation_dtype, check_groups, checked_options
from freqfusion.ops.resize import resize, shuffle


class SAPAD(Fusion):
    """Upsamples the coarse map by similarity to points around each pixel's coarse parent, found by predicted offsets.

    All points start near the centre of the parent, so this starts near nearest interpolation. Points outside the map
    have similarity zero, take their share of the softmax and contribute nothing.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map; may differ.
        up_factor: sub-pixels per side that a coarse pixel predicts offsets for; at another ratio of the two maps the
            nearest sub-pixel's offset serves.
        num_point: points per pixel and group.
        groups: groups of channels with points of their own; must divide ``lr_channels``.
        embedding_dim: channels of queries and keys in each group.
        qkv_bias: whether their projections and the offsets' have a bias.
        high_offset: offsets for each sub-pixel, rather than one for all of a coarse pixel.
        norm: normalise both maps (32 groups, or as many as divide the channels) before the projections.

    Raises:
        ValueError: for groups that do not divide the channels.

    Source: Liu et al., "On Point Affiliation in Feature Upsampling", arXiv 2307.08198, 2023; keys of the authors'
    code. Start: normal with std 0.02, biases zero.
    """

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        up_factor: int = 2,
        num_point: int = 9,
        groups: int = 4,
        embedding_dim: int = 32,
        qkv_bias: bool = True,
        high_offset: bool = True,
        norm: bool = False,
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        check_groups("lr_feat (groups)", lr_channels, groups)
        self.up_factor = up_factor if high_offset else 1
        self.num_point = num_point
        self.groups = groups

        def normalisation(channels: int) -> nn.Module:
            return GroupNorm(channels) if norm else nn.Identity()

        self.norm_y = normalisation(hr_channels)
        self.norm_x = normalisation(lr_channels)
        self.q = nn.Conv2d(hr_channels, groups * embedding_dim, 1, bias=qkv_bias)
        self.k = nn.Conv2d(lr_channels, groups * embedding_dim, 1, bias=qkv_bias)
        self.offset = nn.Conv2d(lr_channels, groups * num_point * 2 * self.up_factor**2, 1, bias=qkv_bias)
        for projection in (self.q, self.k, self.offset):
            nn.init.normal_(projection.weight, std=0.02)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        x, size = self.norm_x(lr_feat), hr_feat.shape[-2:]
        offsets = resize(shuffle(self.offset(x), self.up_factor), size, "nearest")
        offsets = offsets.to(accumulation_dtype(offsets)).unflatten(1, (self.groups, self.num_point, 2))
        right, down = offsets.transpose(1, 2).unbind(3)
        row, column = (
            torch.div(torch.arange(fine, device=x.device) * coarse, fine, rounding_mode="floor")
            for fine, coarse in zip(size, lr_feat.shape[-2:], strict=True)
        )
        query = self.q(self.norm_y(hr_feat))
        upsampled = attend(query, self.k(x), lr_feat, down + row[:, None], right + column, self.groups)
        return FusedFeatures(None, hr_feat, upsampled)
