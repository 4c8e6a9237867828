"""Encoders: a small one of ours, and the networks of timm."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion._optional import require
from freqfusion.decoders._blocks import halving_stages
from freqfusion.ops.resize import resize

WIDTHS = (32, 48, 64, 96)
RESNETS = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50", "r101": "resnet101"}
"""Short names of torchvision's residual networks."""
FREE_SIZE = {"strict_img_size": False}
SWIN = ("swin_transformer", "swin_transformer_v2")
"""timm's files whose networks take one image size alone unless built with :data:`FREE_SIZE`."""
DYNAMIC_SIZE = {"dynamic_img_size": True}
DYNAMIC = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "vitamin")
"""timm's files of plain vision transformers whose position embeddings are resampled to the image if built with
:data:`DYNAMIC_SIZE`."""
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
        skipped: how many of the finest maps are not returned.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, skipped: int = 0) -> None:
        super().__init__()
        self.out_channels = tuple(widths[skipped:])
        self.skipped = skipped
        self.stages = halving_stages(widths)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` to maps ``(B, widths[i], ceil(H / 2**(i+1)), ceil(W / 2**(i+1)))``; skips the first."""
        maps = []
        x = image
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[self.skipped :]


class TimmEncoder(nn.Module):
    """The feature maps of a timm network with fresh weights, fine to coarse, one per stride, as ``(B, C, H, W)``.

    Channels, strides and memory layout are read from the network. Where several maps have one stride, as
    with ``output_stride=8``, the deepest of them is taken; maps finer than ``finest_stride`` are left out.

    Images smaller than the coarsest stride, and images of a network that needs whole patches (Swin) or sides
    that are multiples of its coarsest stride (HRNet, DLA), are padded with zeros on the right and at the
    bottom, and the maps cropped.

    A plain vision transformer, or another network whose maps all have one stride, gives one map: those of its
    ``out_indices`` (timm's default are the last three layers), each normalised over its channels as in a LayerNorm
    without weights, concatenated. Position embeddings are resampled to the image. Images that are not of whole
    patches are resized to the next larger size that is, so that the map covers just the image.

    Args:
        name: a network of ``timm.list_models()``, such as ``convnext_tiny``; the tag of its weights, which are not
            loaded here, may follow a dot.
        finest_stride: smallest stride of a map.
        options: further arguments of ``timm.create_model``, such as ``drop_path_rate``, ``img_size`` or
            ``out_indices``.

    Attributes:
        out_channels: channels of the maps.
        strides: strides of the maps, as timm states them.
        is_plain: whether the network has a single stride.

    Raises:
        ImportError: where timm is not installed.
        ValueError: for an unknown name, or a network with maps of several strides of which fewer than two are of
            ``finest_stride`` or more.

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
        defaults = FREE_SIZE if is_of(name, SWIN) else DYNAMIC_SIZE if is_of(name, DYNAMIC) else {}
        if options and options.get("depth") in (1, 2):  # too few layers for timm's default
            defaults = {**defaults, "out_indices": options["depth"]}
        options = {**defaults, **(options or {})}
        self.network = timm.create_model(name, pretrained=False, features_only=True, **options)
        layout = getattr(self.network, "output_fmt", "NCHW")  # MobileNets do not say
        layout = getattr(layout, "value", layout)  # an enumeration in timm
        if layout not in ("NCHW", "NHWC"):
            raise ValueError(f"{name!r} gives maps in {layout}, expected NCHW or NHWC; take another network")
        self.channels_last = layout == "NHWC"

        info = self.network.feature_info
        stated = list(info.reduction())
        self.is_plain = len(set(stated)) == 1
        deepest = {stride: level for level, stride in enumerate(stated) if stride >= finest_stride}
        self.levels = tuple(range(len(stated)) if self.is_plain else deepest.values())
        self.strides = tuple(stated[:1] if self.is_plain else deepest)
        channels = [info.channels()[level] for level in self.levels]
        self.out_channels = (sum(channels),) if self.is_plain else tuple(channels)
        if not self.is_plain and len(self.strides) < 2:
            raise ValueError(
                f"{name!r} gives maps at the strides {stated}; a decoder needs at least two different strides of "
                f"{finest_stride} or more: with one size alone no coarse map meets a fine one. Take a network "
                "with more stages, such as resnet50, convnext_tiny or swin_tiny_patch4_window7_224"
            )
        self.name = name
        free = not options.get("strict_img_size", True) or bool(options.get("dynamic_img_size"))
        self.fixed_size = None if free else _fixed_size(self.network.pretrained_cfg, options.get("img_size"))
        default = self.strides[0] if self.is_plain else 1
        self.multiple = next((side for file, side in SIDE_MULTIPLES.items() if is_of(name, (file,))), default)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` to maps ``(B, out_channels[i], H_i, W_i)``.

        ``H_i`` is ``H / strides[i]``, rounded up or, in some networks with stages (ConvNeXt), down.

        Raises:
            ValueError: for an image of another size than the one that a network such as MaxViT is made for.
        """
        height, width = image.shape[-2:]
        below, right = (self._missing(side) for side in (height, width))
        if self.is_plain:
            padded = resize(image, (height + below, width + right), "bilinear")
        else:
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
        if self.is_plain:
            return [torch.cat([_normalised(x) for x in maps], dim=1)]
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


def _normalised(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` with zero mean and unit deviation over the channels of each place."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


def _fixed_size(config: Mapping[str, Any], img_size: Any) -> tuple[int, int] | None:
    """The one image size of a network that timm marks as fixed; some of those take others anyway."""
    if not config.get("fixed_input_size"):
        return None
    if img_size is None:
        img_size = config["input_size"][-2:]
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height, width
