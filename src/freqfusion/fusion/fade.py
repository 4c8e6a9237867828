"""FADE: kernels predicted from both maps by one shared convolution, and an optional gate."""

from typing import Any

import torch
from torch import Tensor, nn

from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.ops import carafe, normalize_kernels
from freqfusion.ops._checks import check_kernel_size, checked_options
from freqfusion.ops.resize import resize

_OLD_KEYS = {
    "kernel_generator.conv1_en.weight": "ker_generator.compressor_en.weight",
    "kernel_generator.conv1_en.bias": "ker_generator.compressor_en.bias",
    "kernel_generator.conv1_de.weight": "ker_generator.compressor_de.weight",
    "kernel_generator.conv2_kernels": "ker_generator.content_encoder.weight",
    "kernel_generator.conv2_bias": "ker_generator.content_encoder.bias",
}
"""Names of the authors' high-to-low form, which computes the same function, and ours (their low-to-high form's)."""


class SemiShiftKernels(nn.Module):
    """Kernel logits: one convolution applied to both compressed maps, the coarse result upsampled, the sum.

    The bias of the shared convolution acts twice, as in the authors' code.
    """

    def __init__(
        self, hr_channels: int, lr_channels: int, up_kernel: int, embedding: int, groups: int = 1
    ) -> None:
        super().__init__()
        self.compressor_en = nn.Conv2d(hr_channels, embedding, 1)
        self.compressor_de = nn.Conv2d(lr_channels, embedding, 1, bias=False)
        self.content_encoder = nn.Conv2d(embedding, up_kernel**2, 3, padding=1, groups=groups)

    def forward(self, hr_feat: Tensor, lr_feat: Tensor) -> Tensor:
        """``(B, up_kernel**2, H, W)``."""
        coarse = self.content_encoder(self.compressor_de(lr_feat))
        fine = self.content_encoder(self.compressor_en(hr_feat))
        return fine + resize(coarse, hr_feat.shape[-2:], "nearest")


class Gate(nn.Module):
    """A weight in (0, 1) per coarse pixel; a module of its own only for the authors' key names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x))


class FADE(Fusion):
    """Upsamples the coarse map with kernels predicted from both maps; the fine map passes unchanged.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map; with the gate they must be equal.
        up_kernel_size: odd side of the reassembly kernels.
        embedding_dim: channels the kernels are predicted from.
        gating: blend the fine map into the upsampled one by a gate predicted from the coarse map. Off, as in
            the authors' detection experiments.

    Raises:
        ValueError: for an even kernel, or a gate with unequal channels.

    Source: Lu et al., "FADE: Fusing the Assets of Decoder and Encoder for Task-Agnostic Upsampling", ECCV
    2022. Keys of both published forms load. Xavier-uniform start.
    """

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        up_kernel_size: int = 5,
        embedding_dim: int = 64,
        gating: bool = False,
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        check_kernel_size("up_kernel_size", up_kernel_size)
        if gating and hr_channels != lr_channels:
            raise ValueError(
                f"the gate blends both maps and needs hr_channels == lr_channels, got {hr_channels} and "
                f"{lr_channels}; use gating=False"
            )
        self.up_kernel_size = up_kernel_size
        self.ker_generator = SemiShiftKernels(hr_channels, lr_channels, up_kernel_size, embedding_dim)
        self.gate_generator = Gate(lr_channels) if gating else None
        self.register_load_state_dict_pre_hook(_rename_old_keys)
        _start(self)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        return _fuse(hr_feat, lr_feat, self.ker_generator, self.up_kernel_size, self.gate_generator)


class FADELite(Fusion):
    """FADE with a tenth of the parameters: each tap of the kernels is predicted from a channel of its own.

    The gate blends both maps, so it exists where ``hr_channels == lr_channels``; elsewhere the upsampled map is the
    result.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map; equal in the authors' code.
        up_kernel_size: odd side of the reassembly kernels.

    Raises:
        ValueError: for an even kernel.

    Source: Lu et al., "FADE: A Task-Agnostic Upsampling Operator for Encoder-Decoder Architectures", IJCV 2024; keys
    of the authors' code. Xavier-uniform start.
    """

    @checked_options
    def __init__(self, hr_channels: int, lr_channels: int, up_kernel_size: int = 5) -> None:
        super().__init__(hr_channels, lr_channels)
        check_kernel_size("up_kernel_size", up_kernel_size)
        taps = up_kernel_size**2
        self.up_kernel_size = up_kernel_size
        self.gate_generator = Gate(lr_channels) if hr_channels == lr_channels else None
        self.ker_generator = SemiShiftKernels(hr_channels, lr_channels, up_kernel_size, taps, groups=taps)
        _start(self)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        return _fuse(hr_feat, lr_feat, self.ker_generator, self.up_kernel_size, self.gate_generator)


def _start(fusion: Fusion) -> None:
    for module in fusion.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _fuse(
    hr_feat: Tensor, lr_feat: Tensor, logits: SemiShiftKernels, kernel_size: int, gate: Gate | None
) -> FusedFeatures:
    kernels = normalize_kernels(logits(hr_feat, lr_feat), kernel_size)
    upsampled = carafe(lr_feat, kernels, kernel_size)
    if gate is not None:
        share = resize(gate(lr_feat), hr_feat.shape[-2:], "nearest")
        upsampled = share * hr_feat + (1 - share) * upsampled
    return FusedFeatures(kernels, hr_feat, upsampled)


def _rename_old_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for old, new in _OLD_KEYS.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
