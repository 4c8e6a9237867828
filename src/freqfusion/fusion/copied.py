"""Modules with the arguments of files that are often copied into a project; see docs/replace.md.

Each is the module of the same name in ``freqfusion.fusion``, called as its authors' file is.
"""

from typing import Any

from torch import Tensor

from freqfusion.fusion import dysample, freqfusion
from freqfusion.fusion.dysample import Style
from freqfusion.fusion.single import upsample_alone
from freqfusion.ops._checks import checked_options


class FreqFusion(freqfusion.FreqFusion):
    """As ``FreqFusion.py`` of the authors' release: without ``feature_resample=True`` there is no offset generator.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        scale_factor: only 1.
        more: see :class:`freqfusion.fusion.FreqFusion`.
        options: the same, by name.
    """

    def __init__(
        self, hr_channels: int, lr_channels: int, scale_factor: int = 1, *more: Any, **options: Any
    ) -> None:
        if len(more) < 9:  # else feature_resample is among them
            options = {"feature_resample": False, **options}
        super().__init__(hr_channels, lr_channels, scale_factor, *more, **options)


class DySample(dysample.DySample):
    """As ``dysample.py`` of the authors' release: one map comes in, one goes out.

    Args:
        in_channels: of the map.
        scale: whole ratio of the sides.
        style: see :class:`freqfusion.fusion.DySample`.
        groups: groups of channels that move together; must divide ``in_channels``.
        dyscope: predict the offsets' magnitude too.
    """

    @checked_options
    def __init__(
        self, in_channels: int, scale: int = 2, style: Style = "lp", groups: int = 4, dyscope: bool = False
    ) -> None:
        super().__init__(1, in_channels, scale, style, groups, dyscope)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``(B, in_channels, H, W)`` to ``(B, in_channels, scale * H, scale * W)``."""
        return upsample_alone(super().forward, x, self.scale)
