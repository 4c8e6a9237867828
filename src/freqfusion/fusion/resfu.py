"""ReSFU: kernels from paired differences of aligned queries and keys, and a window centred between coarse pixels."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.fusion._norms import GroupNorm
from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.ops import carafe, normalize_kernels
from freqfusion.ops._checks import accumulation_dtype, check_groups, check_kernel_size, checked_options
from freqfusion.ops.resize import resize

_SCORE_CHANNELS = 128
_GAUSSIAN = (math.exp(-0.5) / (1 + 2 * math.exp(-0.5)), 1 / (1 + 2 * math.exp(-0.5)))
"""Weights of a neighbour and of the pixel itself, along one axis: standard deviation 1."""


class GuidedFilter(nn.Module):
    """Locally linear estimate of a map from a guide, as He et al., "Guided Image Filtering", TPAMI 2013.

    ``kernel`` is not used: the authors' files hold it.
    """

    kernel: Tensor

    def __init__(self, channels: int, radius: int, eps: float, scale: int) -> None:
        super().__init__()
        self.radius = radius // scale
        self.eps = eps
        self.scale = scale
        self.register_buffer("kernel", torch.ones(channels, 1, 1, 2 * self.radius + 1))

    def forward(self, guide: Tensor, x: Tensor) -> Tensor:
        """``x`` as a linear function of ``guide``, both ``(B, C, H, W)``, fitted on each ``scale``-th row and column.

        In float32 at least: variances are differences of close numbers.
        """
        like, dtype = x.dtype, accumulation_dtype(guide, x)
        fine, guide, x = guide.to(dtype), self._thin(guide.to(dtype)), self._thin(x.to(dtype))
        mean, mean_x = self._box(guide), self._box(x)
        slope = self._box(guide * x) - mean * mean_x
        slope = slope / (self._box(guide * guide) - mean * mean + self.eps)
        intercept = mean_x - slope * mean
        slope, intercept = (
            resize(self._box(part), fine.shape[-2:], "bilinear") for part in (slope, intercept)
        )
        return (slope * fine + intercept).to(like)

    def _thin(self, x: Tensor) -> Tensor:
        if self.scale == 1:
            return x
        rows, columns = (
            torch.arange(max(1, side // self.scale), device=x.device) * self.scale for side in x.shape[-2:]
        )
        return x.index_select(-2, rows).index_select(-1, columns)

    def _box(self, x: Tensor) -> Tensor:
        """Mean over the part of the box that lies on the map."""
        side, radius = 2 * self.radius + 1, self.radius
        x = F.avg_pool2d(x, (1, side), 1, (0, radius), count_include_pad=False)
        return F.avg_pool2d(x, (side, 1), 1, (radius, 0), count_include_pad=False)


class PairedDifferences(nn.Module):
    """Scores of a pixel's neighbours from their differences to the pixel in another map.

    The convolution of all differences is that of the neighbours less the sum of its weights times the pixel.
    """

    def __init__(self, channels: int, groups: int, kernel_size: int, spacing: int, norm_groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.spacing = spacing
        shape = (_SCORE_CHANNELS, channels // groups, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(1, _SCORE_CHANNELS, 1, 1))
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.channel_compressor = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(_SCORE_CHANNELS, _SCORE_CHANNELS, 1, groups=groups),
            nn.ReLU(inplace=True),
            nn.GroupNorm(norm_groups, _SCORE_CHANNELS),
            nn.Conv2d(_SCORE_CHANNELS, kernel_size**2, 1),
        )
        nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def forward(self, neighbours: Tensor, centre: Tensor) -> Tensor:
        """Of two maps ``(B, C, H, W)``: ``(B, kernel_size**2, H, W)``."""
        reach = self.spacing * (self.weight.shape[-1] // 2)
        padded = F.pad(self._normalised(neighbours), [reach] * 4, mode="replicate")
        # the norm's bias cancels in a difference; it only gets its gradient here, zero
        bias = self.bias.flatten() + 0 * self.norm.bias.sum()
        around = F.conv2d(padded, self.weight, bias, dilation=self.spacing, groups=self.groups)
        whole = self.weight.sum((2, 3), keepdim=True)
        return self.channel_compressor(around - F.conv2d(self._normalised(centre), whole, groups=self.groups))

    def _normalised(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.norm.num_groups, self.norm.weight, eps=self.norm.eps)


class ReSFU(Fusion):
    """Upsamples the coarse map by kernels from both maps, in a window centred on each fine pixel's exact position.

    Made for high ratios in one step. The window's places lie between coarse pixels and are sampled bilinearly; here
    the kernels take that in, so that one reassembly with a side of ``kernel_size + 2`` does it.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map; may differ.
        groups: of the convolutions that score; must divide ``embedding_dim`` and 128.
        kernel_size: odd side of the window.
        scale_factor: spacing of the neighbours that are compared, in fine pixels; the authors take the ratio of the
            maps. The size of the fine map decides that of the result.
        embedding_dim: channels of queries and keys.
        qkv_bias: whether their projections have a bias.
        normx: normalise the coarse map (32 groups, or as many as divide the channels) before its projection.
        normy: normalise the fine map in the same way.
        gn_dim: groups of the norms of the scores; must divide ``embedding_dim`` and 128.
        radius: of the guided filter that aligns queries to keys, in fine pixels.
        eps: smoothness of that filter.
        gf_scale: every how many-th row and column it is fitted on.

    Raises:
        ValueError: for an even kernel, groups that do not divide, or an ``eps`` that is not positive.

    Source: Zhou et al., "A Refreshed Similarity-based Upsampler for Direct High-Ratio Feature Upsampling", arXiv
    2407.02283, 2024; keys of the authors' code. They train the two blocks of scores with gradients times 500
    (``lr_mult``), which is the optimiser's business here. Start: normal with std 0.02, Kaiming-normal for the
    differences, biases zero.
    """

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        groups: int = 4,
        kernel_size: int = 3,
        scale_factor: int = 2,
        embedding_dim: int = 32,
        qkv_bias: bool = True,
        normx: bool = True,
        normy: bool = True,
        gn_dim: int = 8,
        radius: int = 8,
        eps: float = 0.001,
        gf_scale: int = 2,
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        check_kernel_size("kernel_size", kernel_size)
        for channels in (embedding_dim, _SCORE_CHANNELS):
            check_groups("queries and scores (groups)", channels, groups)
            check_groups("queries and scores (gn_dim)", channels, gn_dim)
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.kernel_size = kernel_size
        self.scale_factor = scale_factor

        def normalisation(channels: int, wanted: bool) -> nn.Module:
            return GroupNorm(channels) if wanted else nn.Identity()

        self.norm_x = normalisation(lr_channels, normx)
        self.norm_y = normalisation(hr_channels, normy)
        self.GF = GuidedFilter(embedding_dim, radius, eps, gf_scale)
        self.q = nn.Conv2d(hr_channels, embedding_dim, 1, bias=qkv_bias)
        self.k = nn.Conv2d(lr_channels, embedding_dim, 1, bias=qkv_bias)
        scores = embedding_dim, groups, kernel_size, scale_factor, gn_dim
        self.semantic_scores = PairedDifferences(*scores)
        self.detail_scores = PairedDifferences(*scores)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        size = hr_feat.shape[-2:]
        query = self.q(self.norm_y(hr_feat))
        key = resize(self.k(self.norm_x(lr_feat)), size, "bilinear")
        scores = self.semantic_scores(key, self.GF(query, key))
        scores = scores + self.detail_scores(_smoothed(query), query)
        kernels = self._kernels(scores, lr_feat.shape[-2:])
        return FusedFeatures(kernels, hr_feat, carafe(lr_feat, kernels, self.kernel_size + 2))

    def _kernels(self, scores: Tensor, coarse: Sequence[int]) -> Tensor:
        """Reassembly kernels ``(B, (kernel_size + 2)**2, H, W)`` of scores ``(B, kernel_size**2, H, W)``."""
        size, dtype = self.kernel_size, accumulation_dtype(scores)
        (rows, on_row), (columns, on_column) = (
            self._axis(fine, side, dtype, scores.device)
            for fine, side in zip(scores.shape[-2:], coarse, strict=True)
        )
        on_map = (on_row[:, None, :, None] & on_column[None, :, None, :]).flatten(0, 1)
        # neighbours outside the map take no share
        kernels = scores.to(dtype).masked_fill(~on_map, torch.finfo(dtype).min)
        kernels = normalize_kernels(kernels, size).unflatten(1, (size, size))
        kernels = (kernels[:, :, None] * rows[:, :, None, :, None]).sum(1)
        kernels = (kernels[:, :, :, None] * columns[:, :, None, :]).sum(2)
        return kernels.flatten(1, 2).to(scores.dtype)

    def _axis(
        self, fine: int, coarse: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Of ``fine`` rows: the bilinear weights by which places of the window, ``(kernel_size, kernel_size + 2,
        fine)``, read the rows of the reassembly's window, and whether the compared neighbours, ``(kernel_size,
        fine)``, are on the map."""
        row = torch.arange(fine, device=device)
        shift = torch.arange(self.kernel_size, device=device)[:, None] - self.kernel_size // 2
        neighbour = row + self.scale_factor * shift
        place = (row.to(dtype) + 0.5) * coarse / fine - 0.5 + shift
        place = place.clamp(0, coarse - 1)
        window = torch.arange(self.kernel_size + 2, device=device)[:, None] - self.kernel_size // 2 - 1
        window = window + torch.div(row * coarse, fine, rounding_mode="floor")
        return (1 - (place[:, None] - window).abs()).clamp_min(0), (neighbour >= 0) & (neighbour < fine)


def _smoothed(x: Tensor) -> Tensor:
    """A 3 x 3 Gaussian of ``(B, C, H, W)``; beyond the border lies the border."""
    beside, middle = _GAUSSIAN
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = middle * x[..., 1:-1, :] + beside * (x[..., :-2, :] + x[..., 2:, :])
    return middle * x[..., 1:-1] + beside * (x[..., :-2] + x[..., 2:])
