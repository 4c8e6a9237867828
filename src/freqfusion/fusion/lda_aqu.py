"""LDA-AQU: local deformable attention of the coarse map to itself."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from freqfusion.fusion._points import attend
from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.fusion.sapa import ChannelNorm
from freqfusion.ops._checks import accumulation_dtype, check_groups, check_kernel_size, checked_options
from freqfusion.ops.resize import resize


def _norm(channels: int) -> nn.Sequential:
    """In a container only for the authors' key names."""
    return nn.Sequential(OrderedDict(norm=ChannelNorm(channels)))


class LDAAQU(Fusion):
    """Upsamples the coarse map by attention to a window of samples, moved by predicted offsets; no guide.

    The window and the offsets count in fine pixels; fine and coarse map meet at the centres of their corners.
    Samples outside the map are zero and keep their share of the softmax but for the position bias. A fine map one
    pixel high (wide) reads the first coarse row (column), whatever the offsets.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        reduction_factor: how many times fewer channels queries and keys have, rounded to a multiple of ``n_groups``.
        nh: heads of the attention; must divide ``lr_channels`` and the channels of queries.
        k_e: odd side of the convolution that predicts the offsets.
        k_u: odd side of the window.
        n_groups: groups of channels with offsets of their own; must divide ``lr_channels``.
        range_factor: largest offset, in fine pixels.
        rpb: learn a bias of each window position.

    Raises:
        ValueError: for an even kernel, or groups or heads that do not divide the channels.

    Source: Du et al., "LDA-AQU: Adaptive Query-guided Upsampling via Local Deformable Attention", ACM MM 2024; keys
    of the authors' code. Start: Xavier-uniform, offsets zero.
    """

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        reduction_factor: int = 4,
        nh: int = 1,
        k_e: int = 3,
        k_u: int = 3,
        n_groups: int = 2,
        range_factor: int = 11,
        rpb: bool = True,
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        check_kernel_size("k_e", k_e)
        check_kernel_size("k_u", k_u)
        check_groups("lr_feat (n_groups)", lr_channels, n_groups)
        width = max(1, lr_channels // (reduction_factor * n_groups))
        channels = n_groups * width
        if channels % nh or lr_channels % nh:
            raise ValueError(
                f"nh must divide the {channels} channels of queries and lr_channels = {lr_channels}, got {nh}"
            )
        self.nh = nh
        self.k_u = k_u
        self.n_groups = n_groups
        self.range_factor = range_factor
        self.relative_position_bias_table = (
            nn.Parameter(torch.empty(1, nh, 1, k_u**2, channels // nh)) if rpb else None
        )
        self.proj_q = nn.Conv2d(lr_channels, channels, 1, bias=False)
        self.proj_k = nn.Conv2d(lr_channels, channels, 1, bias=False)
        last = nn.Conv2d(width, 2 * k_u**2, k_e, padding=k_e // 2)
        self.conv_offset = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), _norm(width), nn.GELU(), last
        )
        self.layer_norm = _norm(lr_channels)
        if self.relative_position_bias_table is not None:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        x, size = self.layer_norm(lr_feat), hr_feat.shape[-2:]
        query = resize(self.proj_q(x), size, "bilinear", align_corners=True)
        rows, columns = self._places(query, lr_feat)
        bias, table = None, self.relative_position_bias_table
        if table is not None:
            heads = query.unflatten(1, (self.nh, -1))
            bias = torch.einsum("bmdij,mpd->bpmij", heads, table[0, :, 0])
        scale = (query.shape[1] // self.nh) ** -0.5
        upsampled = attend(query, self.proj_k(x), lr_feat, rows, columns, self.nh, scale, bias)
        return FusedFeatures(None, hr_feat, upsampled)

    def _places(self, query: Tensor, lr_feat: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of all samples, each ``(B, k_u**2, n_groups, H, W)``, in coarse pixels."""
        shifts = self.conv_offset(query.unflatten(1, (self.n_groups, -1)).flatten(0, 1))
        shifts = self.range_factor * shifts.to(accumulation_dtype(shifts)).tanh()
        shifts = shifts.unflatten(0, (-1, self.n_groups)).unflatten(2, (self.k_u**2, 2)).transpose(1, 2)
        down, right = shifts.unbind(3)
        place = torch.arange(self.k_u, device=query.device) - self.k_u // 2
        rows, columns = (
            torch.arange(side, device=query.device, dtype=shifts.dtype) for side in query.shape[-2:]
        )
        rows = rows[:, None] + place.repeat_interleave(self.k_u)[:, None, None, None]
        columns = columns + place.repeat(self.k_u)[:, None, None, None]
        down, right = down + rows, right + columns
        (height, width), (h, w) = query.shape[-2:], lr_feat.shape[-2:]
        return down * (h - 1) / max(height - 1, 1), right * (w - 1) / max(width - 1, 1)
