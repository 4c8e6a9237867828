"""Sub-pixel convolution."""

from torch import Tensor, nn

from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.ops._checks import check_kernel_size, checked_options
from freqfusion.ops.resize import fit, shuffle


class PixelShuffle(Fusion):
    """Learned upsampling of the coarse map by a convolution and pixel shuffle; the fine map passes unchanged.

    Sizes other than exactly ``scale_factor`` times the coarse ones are cropped or interpolated, see
    :func:`~freqfusion.ops.resize.fit`.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        scale_factor: upsampling of the shuffle.
        upsample_kernel: odd side of the convolution.

    Source: Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel
    Convolutional Neural Network", CVPR 2016; keys and Xavier-uniform start of mmcv's PixelShufflePack.
    """

    @checked_options
    def __init__(
        self, hr_channels: int, lr_channels: int, scale_factor: int = 2, upsample_kernel: int = 3
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        check_kernel_size("upsample_kernel", upsample_kernel)
        self.scale_factor = scale_factor
        self.upsample_conv = nn.Conv2d(
            lr_channels, lr_channels * scale_factor**2, upsample_kernel, padding=upsample_kernel // 2
        )
        nn.init.xavier_uniform_(self.upsample_conv.weight)
        if self.upsample_conv.bias is not None:
            nn.init.zeros_(self.upsample_conv.bias)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        upsampled = shuffle(self.upsample_conv(lr_feat), self.scale_factor)
        return FusedFeatures(None, hr_feat, fit(upsampled, hr_feat.shape[-2:]))
