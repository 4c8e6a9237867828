"""What a host's module becomes: itself, with fusion modules where it brought coarse features up."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freqfusion.decoders._blocks import halving_stages
from freqfusion.fusion import Fusion
from freqfusion.ops.resize import resize


class FusionPoint(NamedTuple):
    """A place in a host's module where a coarse map meets a fine one."""

    name: str
    """Name of the fusion in the module's ``fusions``; no dots."""
    hr_channels: int
    lr_channels: int
    mode: str = "nearest"
    """How the host upsamples the coarse map: a mode of ``torch.nn.functional.interpolate``, or a word where that is
    not it: ``"learned"``, or ``"none"`` where the host does not join the two maps."""
    align_corners: bool = False
    skipped: str = ""
    """Why no fusion fits here, or ``""``."""
    gated: bool = True
    """Whether ``init="identity"`` gives this point gates of its own; False where the module has one for all."""
    freqfusion: Mapping[str, Any] = {}
    """Options of FreqFusion at this point, where its authors published some for this host."""
    stride: int = 0
    """Where the fine map is one of the image's (:class:`ImageStem`), its stride; 0 where it is the host's."""
    spatial_dims: int = 2
    """3 where the maps are volumes ``(B, C, D, H, W)``."""


class Gate(nn.Module):
    """``plain + weight * (fused - plain)`` with a weight for every channel, zero at first.

    So nothing changes until training moves the weights.

    Args:
        channels: channels of both maps.
        spatial_dims: 3 for volumes.
    """

    def __init__(self, channels: int, spatial_dims: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, *[1] * spatial_dims))

    def forward(self, plain: Tensor, fused: Tensor) -> Tensor:
        """Blend two maps ``(B, channels, H, W)``; the result has the dtype of ``plain``."""
        return plain + self.weight.to(plain.dtype) * (fused.to(plain.dtype) - plain)


class FusionSlot(nn.Module):
    """A point's fusion, with gates if it has to start as what the host did; without fusion just that.

    Args:
        point: what it replaces.
        fusion: the method's module, or None to leave the point as it was.
        init: ``"identity"``, or ``"paper"`` for no gates.
    """

    def __init__(self, point: FusionPoint, fusion: Fusion | None, init: str) -> None:
        super().__init__()
        self.mode = point.mode
        self.align_corners = point.align_corners
        self.fusion = fusion
        gated = fusion is not None and init == "identity" and point.gated
        dims = point.spatial_dims
        self.lr_gate = Gate(point.lr_channels, dims) if gated else None
        # a map of the image only guides: the host takes nothing of it
        refines = fusion is not None and fusion.refines_hr and not point.stride
        self.hr_gate = Gate(point.hr_channels, dims) if gated and refines else None

    def forward(
        self, hr_feat: Tensor, lr_feat: Tensor, plain: Callable[[], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both maps at the fine size, ready to be added or concatenated.

        Args:
            hr_feat: ``(B, hr_channels, H, W)``.
            lr_feat: ``(B, lr_channels, h, w)``.
            plain: makes the coarse map at the fine size as the host does, ``(B, lr_channels, H, W)``, where
                that is more than an interpolation of ``lr_feat``. Not called where nothing needs it.

        Returns:
            ``(B, hr_channels, H, W)`` and ``(B, lr_channels, H, W)`` of the dtypes that came in.
        """
        if plain is None:
            plain = partial(self.enlarge, lr_feat, hr_feat)
        if self.fusion is None:
            return hr_feat, plain()
        _, fused_hr, fused_lr = self.fusion(hr_feat, lr_feat)
        if self.hr_gate is not None:
            fused_hr = self.hr_gate(hr_feat, fused_hr)
        if self.lr_gate is not None:
            fused_lr = self.lr_gate(plain(), fused_lr)
        return fused_hr.to(hr_feat.dtype), fused_lr.to(lr_feat.dtype)

    def enlarge(self, lr_feat: Tensor, hr_feat: Tensor) -> Tensor:
        """The coarse map at the size of the fine one, as the host makes it."""
        return resize(lr_feat, hr_feat.shape[2:], self.mode, self.align_corners)


STEM_WIDTHS = {2: 32, 4: 48, 8: 64}
"""Channels of the image's maps by their stride."""


class ImageStem(nn.Module):
    """Maps of the image that guide the features of a plain vision transformer up, made by convolutions.

    The image is set by a hook of the module that gets it, for the time of its forward pass.

    Args:
        stride: of the coarsest map, 2, 4 or 8.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stages = halving_stages([width for own, width in STEM_WIDTHS.items() if own <= stride])
        self.image: Tensor | None = None

    def forward(self) -> dict[int, Tensor] | None:
        """By stride the maps ``(B, STEM_WIDTHS[stride], H / stride, W / stride)`` of the image, sides rounded up.

        None if no image is set, as where a module is called without the model around it.
        """
        if self.image is None:
            return None
        maps, x = {}, self.image
        for i, stage in enumerate(self.stages):
            x = maps[2 ** (i + 1)] = stage(x)
        return maps


def give_image(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before ``owner.forward``: hands its ``pixel_values`` to the stems in it."""
    image = kwargs.get("pixel_values", args[0] if args else None)
    for stem in _stems(owner):
        stem.image = image


def take_image(owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A hook after it, also where it failed."""
    for stem in _stems(owner):
        stem.image = None


def _stems(owner: nn.Module) -> list[ImageStem]:
    return [module for module in owner.modules() if isinstance(module, ImageStem)]


class Upgraded(nn.Module):
    """Base of the classes that host modules get when they are upgraded.

    A subclass names the host's class as its second base. It says where the points are, and its ``forward``
    does what the host's does, calling ``self.fusions[name](hr_feat, lr_feat)`` for each. Decorate it with
    :func:`freqfusion.upgrade.register_host`::

        @register_host
        class UpgradedNeck(Upgraded, Neck):
            @staticmethod
            def points(module):
                return [FusionPoint("top", hr_channels=64, lr_channels=128, mode="bilinear")]

            @staticmethod
            def example(module):
                return torch.randn(1, 64, 9, 12), torch.randn(1, 128, 5, 6)

            def forward(self, fine, coarse):
                fine, coarse = self.fusions["top"](fine, coarse)
                return self.mix(torch.cat((fine, coarse), dim=1))

    The host's own attributes and parameter names stay. A state dict without a key of ours, such as the
    host's pretrained weights, loads strictly and leaves the fusions as they are, unless they lost their
    values on the meta device.
    """

    fusions: nn.ModuleDict

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        """The points of a host module, upgraded or not, in the order in which they are computed.

        A class without points takes its place where a module inside it is upgraded, for what must change along.
        """
        return []

    @staticmethod
    def image_points(module: Any, patch: int) -> list[FusionPoint]:
        """Further points, whose fine maps are those of an image that is cut into patches of ``patch`` pixels.

        They are used on demand; ``self.fusions["stem"]()`` then gives the maps. See :class:`ImageStem`.
        """
        return []

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        """Small random arguments of the module's ``forward``, to compare it before and after.

        A class with points defines it.
        """
        return ()

    @staticmethod
    def context(module: Any, parent: nn.Module | None) -> Any:
        """What ``points``, ``gate_channels`` and ``example`` are given: usually the module.

        A class whose modules do not know all that takes returns more, from the module around it.
        """
        return module

    @classmethod
    def host_class(cls) -> type[nn.Module]:
        """The class that is upgraded."""
        return next(
            base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, Upgraded)
        )

    def gate(self, plain: Tensor, fused: Tensor) -> Tensor:
        """Blend by the module's own gate ``fusions["gate"]``, where it has one; else ``fused``."""
        return self.fusions["gate"](plain, fused) if "gate" in self.fusions else fused

    @staticmethod
    def gate_channels(module: Any) -> int:
        """Channels of a gate over all points of the module; 0 for none. See :attr:`FusionPoint.gated`."""
        return 0

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        super()._apply(fn, *args, **kwargs)
        emptied = getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        if emptied or any(parameter.is_meta for parameter in self.fusions.parameters()):
            self.fusions.without_values = True  # type: ignore[assignment]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = f"{prefix}fusions."
        if any(key.startswith(own) for key in state_dict):
            self.fusions.without_values = False  # type: ignore[assignment]
        elif not getattr(self.fusions, "without_values", False):  # else they are missing, which torch reports
            state_dict.update(self.fusions.state_dict(prefix=own))
        super()._load_from_state_dict(state_dict, prefix, *args)
