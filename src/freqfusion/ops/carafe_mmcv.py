"""CARAFE under the names and with the arguments of ``mmcv.ops.carafe``, for code that is written for it.

Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019; arguments and keys of mmcv.
"""

from torch import Tensor, nn

from freqfusion.ops._checks import (
    NotScriptable,
    check_groups,
    check_kernel_size,
    check_map,
    checked_options,
    refuse_torchscript,
)
from freqfusion.ops.carafe.op import carafe as _carafe
from freqfusion.ops.normalize_kernels.op import normalize_kernels
from freqfusion.ops.resize import shuffle


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Reassembly at a whole ratio; outside the map is zero.

    Args:
        features: ``(B, C, H, W)``.
        masks: normalised kernels ``(B, group_size * kernel_size**2, scale_factor * H, scale_factor * W)``.
        kernel_size: odd side of the kernels.
        group_size: groups of channels with kernels of their own; must divide ``C``.
        scale_factor: whole ratio of the sides.

    Returns:
        ``(B, C, scale_factor * H, scale_factor * W)``.

    Raises:
        ValueError: for shapes that do not fit.
        RuntimeError: under TorchScript; the message says what to use.
    """
    refuse_torchscript()
    check_map("features", features)
    check_map("masks", masks)
    height, width = (scale_factor * side for side in features.shape[-2:])
    if masks.shape[-2:] != (height, width):
        raise ValueError(
            f"masks must have the sides {height}x{width}, scale_factor = {scale_factor} times those of features, "
            f"got {masks.shape[-2]}x{masks.shape[-1]}"
        )
    return _carafe(features, masks, kernel_size, group_size)


class CARAFE(NotScriptable, nn.Module):
    """:func:`carafe` as a module, without parameters."""

    @checked_options
    def __init__(self, kernel_size: int, group_size: int, scale_factor: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.group_size = group_size
        self.scale_factor = scale_factor

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """See :func:`carafe`."""
        return carafe(features, masks, self.kernel_size, self.group_size, self.scale_factor)


class CARAFEPack(NotScriptable, nn.Module):
    """Upsamples by kernels that it predicts from the map itself.

    Args:
        channels: of the map.
        scale_factor: whole ratio of the sides.
        up_kernel: odd side of the reassembly kernels.
        up_group: groups of channels with kernels of their own; must divide ``channels``.
        encoder_kernel: odd side of the predicting convolution.
        encoder_dilation: its dilation.
        compressed_channels: channels it works on.

    >>> import torch
    >>> tuple(CARAFEPack(channels=8, scale_factor=2)(torch.rand(1, 8, 5, 7)).shape)
    (1, 8, 10, 14)
    """

    @checked_options
    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__()
        check_kernel_size("up_kernel", up_kernel)
        check_kernel_size("encoder_kernel", encoder_kernel)
        check_groups("the map (up_group)", channels, up_group)
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.up_group = up_group
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_group * up_kernel**2 * scale_factor**2,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """The first weights; mmengine calls it by this name."""
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        for convolution in (self.channel_compressor, self.content_encoder):
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to ``(B, channels, scale_factor * H, scale_factor * W)``."""
        refuse_torchscript()
        check_map("x", x)
        logits = shuffle(self.content_encoder(self.channel_compressor(x)), self.scale_factor)
        kernels = normalize_kernels(logits, self.up_kernel, self.up_group)
        return carafe(x, kernels, self.up_kernel, self.up_group, self.scale_factor)
