"""The contract of every fusion method: one coarse and one fine map in, two maps of the fine size out."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from freqfusion.ops._checks import (
    NotScriptable,
    check_map,
    check_pair,
    checked_options,
    refuse_torchscript,
)

Convolution = nn.Conv2d | nn.Conv3d


def convolution(spatial_dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution of images or of volumes."""
    return nn.Conv2d if spatial_dims == 2 else nn.Conv3d


class FusedFeatures(NamedTuple):
    """What a fusion returns.

    A tuple, so that ``_, hr_feat, lr_feat = fusion(hr_feat=..., lr_feat=...)`` works.
    """

    lowpass_kernel: Tensor | None
    """``(B, groups * k * k, H, W)`` reassembly kernels of the coarse map, or None where a method has none."""
    hr_feat: Tensor
    """``(B, hr_channels, H, W)`` fine map, refined where the method does so."""
    lr_feat: Tensor
    """``(B, lr_channels, H, W)`` coarse map at the fine size."""


class Fusion(NotScriptable, nn.Module, ABC):
    """Base class of the fusion methods.

    A subclass implements :meth:`fuse`; this class checks the inputs, so that every method answers wrong
    input with the same words. Adding or concatenating the two returned maps is left to the decoder.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
    """

    refines_hr: bool = False
    """Whether the fine map comes back changed; a method that does so says it."""
    spatial_dims: int = 2
    """3 where the maps are volumes ``(B, C, D, H, W)``, whose size is ``(D, H, W)``."""

    @checked_options
    def __init__(self, hr_channels: int, lr_channels: int) -> None:
        super().__init__()
        self.hr_channels = hr_channels
        self.lr_channels = lr_channels

    @abstractmethod
    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        """Fuse checked inputs; see :meth:`forward`."""

    def forward(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        """Bring ``lr_feat`` to the size of ``hr_feat``.

        Args:
            hr_feat: ``(B, hr_channels, H, W)``, floating point.
            lr_feat: ``(B, lr_channels, h, w)`` with ``1 <= h <= H`` and ``1 <= w <= W``, same device.

        Returns:
            :class:`FusedFeatures`; both maps have the size ``(H, W)`` and their own channel counts.

        Raises:
            TypeError: for integer maps.
            ValueError: for wrong rank, channels, batch, device or size.
            RuntimeError: under ``torch.jit.trace`` and torch's older exporter to ONNX, which is built on it.
        """
        refuse_torchscript()
        self._check(hr_feat, lr_feat)
        return self.fuse(hr_feat, lr_feat)

    def _check(self, hr_feat: Tensor, lr_feat: Tensor) -> None:
        for name, feat, channels in (
            ("hr_feat", hr_feat, self.hr_channels),
            ("lr_feat", lr_feat, self.lr_channels),
        ):
            check_map(name, feat, (self.spatial_dims,))
            if feat.shape[1] != channels:
                raise ValueError(
                    f"{name} has {feat.shape[1]} channels, this {type(self).__name__} was built for "
                    f"{channels}; build it with {name.replace('feat', 'channels')}={feat.shape[1]}"
                )
        check_pair("hr_feat", hr_feat, "lr_feat", lr_feat)
        size, coarse = hr_feat.shape[2:], lr_feat.shape[2:]
        if any(side > fine for side, fine in zip(coarse, size, strict=True)):
            raise ValueError(
                f"lr_feat of size {tuple(coarse)} is larger than hr_feat of size {tuple(size)}; "
                "were the two maps swapped?"
            )
        if any(side < 1 for side in coarse):
            raise ValueError(f"lr_feat has an empty side: size {tuple(coarse)}; the input image is too small")
