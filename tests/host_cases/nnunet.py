from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from torch import nn

from host_cases import HostCase


def unet(cls: type[nn.Module], dims: int, blocks: str, **options: Any) -> nn.Module:
    """Three levels; the coarsest has the first axis of the one above."""
    return cls(
        input_channels=1,
        n_stages=3,
        features_per_stage=[8, 16, 32],
        conv_op=nn.Conv2d if dims == 2 else nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, [1, 2] if dims == 2 else [1, 2, 2]],
        num_classes=2,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
        **{blocks: 1},
        **options,
    )


def plain(dims: int = 2) -> nn.Module:
    return unet(PlainConvUNet, dims, "n_conv_per_stage")


def residual_encoder() -> nn.Module:
    return unet(ResidualEncoderUNet, 2, "n_blocks_per_stage")


def residual() -> nn.Module:
    return unet(ResidualUNet, 2, "n_blocks_per_stage")


def plain_3d() -> nn.Module:
    return plain(3)


_COMMON: dict[str, Any] = {"channels": 1, "sites": 2, "limit": "must match"}
_RESIDUAL: dict[str, Any] = {**_COMMON, "odd_size": None, "pickles": False}

CASES = [
    HostCase("PlainConvUNet", plain, **_COMMON),
    HostCase("ResidualEncoderUNet", residual_encoder, **_RESIDUAL),
    HostCase("ResidualUNet", residual, **_RESIDUAL),
    HostCase("PlainConvUNet3d", plain_3d, size=(8, 16, 24), odd_size=(9, 13, 19), **_COMMON),
]
