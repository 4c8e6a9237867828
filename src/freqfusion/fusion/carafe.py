"""CARAFE: content-aware reassembly with kernels predicted from the coarse map."""

from typing import Any

from torch import Tensor, nn

from freqfusion.fusion.base import FusedFeatures, Fusion, convolution
from freqfusion.ops import carafe, normalize_kernels
from freqfusion.ops._checks import check_groups, check_kernel_size, checked_options
from freqfusion.ops.resize import resize, shuffle


class CARAFE(Fusion):
    """Upsamples the coarse map with kernels predicted from it; the fine map passes unchanged.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        up_kernel: odd side of the reassembly kernels.
        up_group: groups of channels with kernels of their own; must divide ``lr_channels``.
        encoder_kernel: odd side of the predicting convolution.
        encoder_dilation: its dilation.
        compressed_channels: channels it works on.
        scale_factor: sub-pixels per side that a coarse pixel predicts kernels for; at another ratio of the two
            maps the nearest sub-pixel's kernel serves.

    Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019; keys and start of mmcv's
    CARAFEPack.
    """

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
        scale_factor: int = 2,
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        check_kernel_size("up_kernel", up_kernel)
        check_kernel_size("encoder_kernel", encoder_kernel)
        check_groups("lr_feat (up_group)", lr_channels, up_group)
        self.up_kernel = up_kernel
        self.up_group = up_group
        self.scale_factor = scale_factor
        conv, dims = convolution(self.spatial_dims), self.spatial_dims
        self.channel_compressor = conv(lr_channels, compressed_channels, 1)
        self.content_encoder = conv(
            compressed_channels,
            up_group * up_kernel**dims * scale_factor**dims,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        for layer in (self.channel_compressor, self.content_encoder):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        logits = shuffle(self.content_encoder(self.channel_compressor(lr_feat)), self.scale_factor)
        logits = resize(logits, hr_feat.shape[2:], "nearest")
        kernels = normalize_kernels(logits, self.up_kernel, self.up_group)
        return FusedFeatures(kernels, hr_feat, carafe(lr_feat, kernels, self.up_kernel, self.up_group))


class CARAFE3d(CARAFE):
    """:class:`CARAFE` for volumes ``(B, C, D, H, W)``, with smaller defaults; the same formulas along one axis more.

    Strides may differ by axis: a coarse voxel predicts kernels for ``scale_factor**3`` sub-voxels, and along an axis
    without a stride the first of them serves.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        up_kernel: odd side of the reassembly kernels, of ``up_kernel**3`` taps.
        compressed_channels: channels that kernels are predicted from.
        options: further arguments of :class:`CARAFE`.

    Source: this package. The authors of CARAFE published no form for volumes.
    """

    spatial_dims = 3

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        up_kernel: int = 3,
        compressed_channels: int = 32,
        **options: Any,
    ) -> None:
        options |= {"up_kernel": up_kernel, "compressed_channels": compressed_channels}
        super().__init__(hr_channels, lr_channels, **options)
