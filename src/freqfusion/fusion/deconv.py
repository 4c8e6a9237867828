"""Transposed convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.ops._checks import checked_options
from freqfusion.ops.resize import fit


class Deconv(Fusion):
    """Learned x2 upsampling of the coarse map by a transposed convolution; the fine map passes unchanged.

    Parameters are ``weight`` ``(C, C, k, k)`` and ``bias`` ``(C,)``, as of
    :class:`torch.nn.ConvTranspose2d`. Sizes other than exactly x2 are cropped or interpolated, see
    :func:`~freqfusion.ops.resize.fit`.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels C of the coarse map.
        kernel_size: 2 (no padding), 3 (padding and output padding 1) or 4 (padding 1), which give x2.

    Raises:
        ValueError: for another kernel size.

    Source: mmdetection's FPN_CARAFE neck, ``upsample_cfg`` type ``deconv``; Xavier-uniform start.
    """

    @checked_options
    def __init__(self, hr_channels: int, lr_channels: int, kernel_size: int = 3) -> None:
        super().__init__(hr_channels, lr_channels)
        if kernel_size not in (2, 3, 4):
            raise ValueError(f"kernel_size must be 2, 3 or 4, which upsample by exactly 2, got {kernel_size}")
        self.padding = (kernel_size - 1) // 2
        self.output_padding = kernel_size % 2
        self.weight = nn.Parameter(torch.empty(lr_channels, lr_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(lr_channels))
        nn.init.xavier_uniform_(self.weight)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        upsampled = F.conv_transpose2d(lr_feat, self.weight, self.bias, 2, self.padding, self.output_padding)
        return FusedFeatures(None, hr_feat, fit(upsampled, hr_feat.shape[-2:]))
