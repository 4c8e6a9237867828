import importlib.util
from typing import Any

from monai.networks.nets import UNETR, BasicUNet, DynUNet, SegResNet, SwinUNETR, UNet
from torch import nn

from host_cases import HostCase

_FEATURES = (16, 16, 16, 32, 32, 16)
_COMMON: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}


def basic(cls: type[nn.Module] = BasicUNet, **options: Any) -> nn.Module:
    return cls(**{"features": _FEATURES, **_COMMON, **options})


def unet(**options: Any) -> nn.Module:
    defaults = {"channels": (8, 16, 16, 32), "strides": (2, 2, 2), "num_res_units": 1}
    return UNet(**{**_COMMON, **defaults, **options})


def dynunet(**options: Any) -> nn.Module:
    strides = {"strides": [1, 2, [2, 1]], "upsample_kernel_size": [2, [2, 1]]}
    return DynUNet(kernel_size=[3, 3, 3], filters=[8, 16, 32], **{**_COMMON, **strides, **options})


def unetr() -> nn.Module:
    return UNETR(1, 2, (64, 96), feature_size=8, hidden_size=32, mlp_dim=32, num_heads=4, spatial_dims=2)


def swin_unetr() -> nn.Module:
    return SwinUNETR(1, 2, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), feature_size=24, spatial_dims=2)


def segresnet(**options: Any) -> nn.Module:
    sizes = {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
    return SegResNet(**{**_COMMON, **sizes, **options})


def basic_3d() -> nn.Module:
    return basic(spatial_dims=3, features=(16, 16, 16, 16, 16, 16))


def unet_3d() -> nn.Module:
    return unet(spatial_dims=3, channels=(8, 8, 8, 16), strides=((1, 2, 2), 2, 2))


def dynunet_3d() -> nn.Module:
    strides = {"strides": [1, 2, [1, 2, 2]], "upsample_kernel_size": [2, [1, 2, 2]]}
    return dynunet(spatial_dims=3, **strides)


def segresnet_3d() -> nn.Module:
    return segresnet(spatial_dims=3)


def unetr_3d() -> nn.Module:
    return UNETR(1, 2, (16, 16, 32), feature_size=8, hidden_size=16, mlp_dim=16, num_heads=2)


def swin_unetr_3d() -> nn.Module:
    return SwinUNETR(1, 2, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), feature_size=24)


_VOLUME: dict[str, Any] = {"channels": 1, "size": (8, 16, 24), "odd_size": (9, 13, 19)}
_LIMIT = "must match"

CASES = [
    HostCase("BasicUNet", basic, channels=1, sites=4, compiles="upcat_2"),
    HostCase("UNet", unet, channels=1, sites=2, limit=_LIMIT, compiles="model.1"),
    HostCase("DynUNet", dynunet, channels=1, sites=2, limit="Sizes of tensors must match"),
    HostCase("SegResNet", segresnet, channels=1, sites=2, limit=_LIMIT),
    HostCase(
        "BasicUNet3d",
        basic_3d,
        channels=1,
        size=(16, 16, 32),
        odd_size=(17, 19, 35),
        sites=4,
        compiles="upcat_2",
    ),
    HostCase("UNet3d", unet_3d, sites=2, limit=_LIMIT, compiles="model.1", **_VOLUME),
    HostCase("DynUNet3d", dynunet_3d, sites=2, limit=_LIMIT, **_VOLUME),
    HostCase("SegResNet3d", segresnet_3d, sites=2, limit=_LIMIT, **_VOLUME),
]
if importlib.util.find_spec("einops") is not None:  # MONAI needs it for transformers
    patches: dict[str, Any] = {"channels": 1, "compiles": "decoder3", "odd_size": None}
    CASES += [
        HostCase("UNETR", unetr, sites=4, limit=_LIMIT, **patches),
        HostCase("SwinUNETR", swin_unetr, sites=5, limit="divisible", **patches),
        HostCase("UNETR3d", unetr_3d, size=(16, 16, 32), sites=4, limit=_LIMIT, **patches),
        HostCase(
            "SwinUNETR3d", swin_unetr_3d, size=(32, 32, 64), sites=5, limit="divisible", slow=True, **patches
        ),
    ]
