"""Fusion methods by name."""

from typing import Any

from freqfusion.fusion.base import Fusion
from freqfusion.fusion.freqfusion import FreqFusion
from freqfusion.fusion.interpolate import Bilinear, Nearest

_METHODS: dict[str, type[Fusion]] = {"nearest": Nearest, "bilinear": Bilinear, "freqfusion": FreqFusion}


def list_fusions() -> list[str]:
    """Names that :func:`create_fusion` takes.

    >>> list_fusions()
    ['nearest', 'bilinear', 'freqfusion']
    """
    return list(_METHODS)


def create_fusion(name: str, hr_channels: int, lr_channels: int, **options: Any) -> Fusion:
    """Build a fusion method by name.

    Args:
        name: one of :func:`list_fusions`.
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        options: further arguments of the method's constructor.

    Raises:
        ValueError: for an unknown name.
        TypeError: for an option that the method does not have.
    """
    if name not in _METHODS:
        raise ValueError(f"unknown fusion {name!r}; choose one of: {', '.join(_METHODS)}")
    return _METHODS[name](hr_channels, lr_channels, **options)
