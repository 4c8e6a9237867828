"""Encoders: a small one of ours, and every hierarchical network of timm."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion._optional import require
from freqfusion.decoders._blocks import conv_norm_relu

WIDTHS = (32, 48, 64, 96)
RESNETS = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50", "r101": "resnet101"}
"""Short names of torchvision's residual networks."""
FREE_SIZE = {"strict_img_size": False}
SWIN = ("swin_transformer", "swin_transformer_v2")
"""timm's files whose networks take one image size alone unless built with :data:`FREE_SIZE`."""
SIDE_MULTIPLES = {
    "swin_transformer": 4,
    "swin_transformer_v2": 4,
    "hrnet": 32,
    "dla": 32,
    "tresnet": 32,
    "hieradet_sam2": 32,
    "csatv2": 64,
}
"""timm's files whose networks need sides that are multiples of a number: of patches, or of the coarsest stride
where branches of different strides are added. Found by trial on timm 1.0.31."""


class SmallEncoder(nn.Module):
    """Stages of 3x3 convolutions with batch norm and ReLU, each halving the size (rounded up).

    Args:
        widths: channels of the stages' maps, at strides 2, 4, 8, ...
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.out_channels = tuple(widths)
        self.stages = nn.ModuleList()
        previous = 3
        for width in widths:
            stage = nn.Sequential(conv_norm_relu(previous, width, stride=2), conv_norm_relu(width, width))
            self.stages.append(stage)
            previous = width

    def forward(self, image: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` to maps ``(B, widths[i], ceil(H / 2**(i+1)), ceil(W / 2**(i+1)))``."""
        maps = []
        x = image
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class TimmEncoder(nn.Module):
    """The feature maps of a timm network with fresh weights, fine to coarse, one per stride, as ``(B, C, H, W)``.

    Channels, strides and memory layout are read from the network. Where several maps have one stride, as
    with ``output_stride=8``, the deepest of them is taken; maps finer than ``finest_stride`` are left out.

    Images smaller than the coarsest stride, and images of a network that needs whole patches (Swin) or sides
    that are multiples of its coarsest stride (HRNet, DLA), are padded with zeros on the right and at the
    bottom, and the maps cropped.

    Args:
        name: a network of ``timm.list_models()``, such as ``convnext_tiny``; the tag of its weights, which are not
            loaded here, may follow a dot.
        finest_stride: smallest stride of a map.
        options: further arguments of ``timm.create_model``, such as ``drop_path_rate`` or ``img_size``.

    Attributes:
        out_channels: channels of the maps.
        strides: strides of the maps, as timm states them.

    Raises:
        ImportError: where timm is not installed.
        ValueError: for an unknown name, or a network without maps of two strides at least.

    Source: timm's ``features_only`` networks and their ``feature_info`` (Wightman, PyTorch Image Models).
    """

    def __init__(
        self,
        name: str,
        finest_stride: int = 4,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        timm = require("timm", "vision")
        if not timm.is_model(name):
            raise ValueError(f"timm has no network {name!r}; timm.list_models() lists what there is")
        is_of = timm.models.is_model_in_modules  # most releases refuse a single string, all take a tuple
        options = {**(FREE_SIZE if is_of(name, SWIN) else {}), **(options or {})}
        self.network = timm.create_model(name, pretrained=False, features_only=True, **options)
        layout = getattr(self.network, "output_fmt", "NCHW")  # MobileNets do not say
        layout = getattr(layout, "value", layout)  # an enumeration in timm
        if layout not in ("NCHW", "NHWC"):
            raise ValueError(f"{name!r} gives maps in {layout}, expected NCHW or NHWC; take another network")
        self.channels_last = layout == "NHWC"

        info = self.network.feature_info
        stated = list(info.reduction())
        deepest = {stride: level for level, stride in enumerate(stated) if stride >= finest_stride}
        self.levels = tuple(deepest.values())
        self.strides = tuple(deepest)
        self.out_channels = tuple(info.channels()[level] for level in self.levels)
        if len(self.strides) < 2:
            raise ValueError(
                f"{name!r} gives maps at the strides {stated}; a decoder needs at least two different strides of "
                f"{finest_stride} or more: with one size alone no coarse map meets a fine one. Take a network "
                "with stages, such as resnet50, convnext_tiny or swin_tiny_patch4_window7_224; features of a plain "
                "vision transformer are upsampled by freqfusion.features"
            )
        self.name = name
        free = is_of(name, SWIN) and not options["strict_img_size"]
        self.fixed_size = None if free else _fixed_size(self.network.pretrained_cfg, options.get("img_size"))
        self.multiple = next((side for file, side in SIDE_MULTIPLES.items() if is_of(name, (file,))), 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` to maps ``(B, out_channels[i], H_i, W_i)``.

        ``H_i`` is ``H / strides[i]``, rounded up or, in some networks (ConvNeXt), down.

        Raises:
            ValueError: for an image of another size than the one that a network such as MaxViT is made for.
        """
        height, width = image.shape[-2:]
        below, right = (self._missing(side) for side in (height, width))
        padded = F.pad(image, (0, right, 0, below)) if below or right else image
        try:
            maps = self.network(padded)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or self.fixed_size in (None, (height, width)):
                raise
            raise ValueError(
                f"{self.name!r} is made for images of {self.fixed_size} and fails on {(height, width)} "
                f"({error}); resize the images, build it for another size with options={{'img_size': ...}} if "
                "timm allows that, or take a network without such a limit, such as convnext_tiny"
            ) from error
        maps = [maps[level] for level in self.levels]
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        if below or right:
            maps = [
                x[..., : -(-height // stride), : -(-width // stride)]
                for x, stride in zip(maps, self.strides, strict=True)
            ]
        return maps

    def _missing(self, side: int) -> int:
        """Pixels to add to a side."""
        needed = max(side, self.strides[-1])
        return -(-needed // self.multiple) * self.multiple - side


def _fixed_size(config: Mapping[str, Any], img_size: Any) -> tuple[int, int] | None:
    """The one image size of a network that timm marks as fixed; some of those take others anyway."""
    if not config.get("fixed_input_size"):
        return None
    if img_size is None:
        img_size = config["input_size"][-2:]
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height, width
