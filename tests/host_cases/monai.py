import importlib.util
from typing import Any

from monai.networks.nets import UNETR, BasicUNet, DynUNet, SegResNet, SwinUNETR
from torch import nn

from host_cases import HostCase

_FEATURES = (16, 16, 16, 32, 32, 16)
_COMMON: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}


def basic(cls: type[nn.Module] = BasicUNet, **options: Any) -> nn.Module:
    return cls(features=_FEATURES, **_COMMON, **options)


def dynunet(**options: Any) -> nn.Module:
    strides = {"strides": [1, 2, [2, 1]], "upsample_kernel_size": [2, [2, 1]]}
    return DynUNet(**_COMMON, kernel_size=[3, 3, 3], filters=[8, 16, 32], **strides | options)


def unetr() -> nn.Module:
    return UNETR(1, 2, (64, 96), feature_size=8, hidden_size=32, mlp_dim=32, num_heads=4, spatial_dims=2)


def swin_unetr() -> nn.Module:
    return SwinUNETR(1, 2, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), feature_size=24, spatial_dims=2)


def segresnet(**options: Any) -> nn.Module:
    return SegResNet(**_COMMON, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1), **options)


CASES = [
    HostCase("BasicUNet", basic, channels=1, sites=4, compiles="upcat_2"),
    HostCase("DynUNet", dynunet, channels=1, sites=2, limit="Sizes of tensors must match"),
    HostCase("SegResNet", segresnet, channels=1, sites=2, limit="must match"),
]
if importlib.util.find_spec("einops") is not None:  # MONAI needs it for transformers
    CASES += [
        HostCase("UNETR", unetr, channels=1, sites=4, compiles="decoder3", odd_size=None, limit="must match"),
        HostCase(
            "SwinUNETR",
            swin_unetr,
            channels=1,
            sites=5,
            compiles="decoder3",
            odd_size=None,
            limit="divisible",
        ),
    ]
