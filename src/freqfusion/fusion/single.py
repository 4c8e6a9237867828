"""A method that needs no fine map, as a layer with one input."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from freqfusion.fusion.base import FusedFeatures
from freqfusion.fusion.catalog import SCALES, create_fitting_fusion, is_guided
from freqfusion.ops._checks import check_map


def upsample_alone(fusion: Callable[[Tensor, Tensor], FusedFeatures], x: Tensor, scale: int) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C, scale * H, scale * W)`` by a fusion that takes the size of one fine channel."""
    check_map("x", x)
    batch, _, height, width = x.shape
    return fusion(x.new_zeros(()).expand(batch, 1, scale * height, scale * width), x).lr_feat


class SingleInput(nn.Module):
    """Upsamples a map by a method that takes nothing from a fine one.

    Args:
        name: a method of :func:`~freqfusion.fusion.list_fusions` that is not guided.
        channels: of the map.
        scale: how many times larger the result is, a positive whole number. A method that predicts something for each
            sub-pixel does so for ``scale**2`` of them.
        options: further arguments of the method's constructor.

    Raises:
        ValueError: for an unknown or guided method, or a scale below 1, or channels that do not fit it.

    >>> import torch
    >>> tuple(SingleInput("carafe", 8)(torch.rand(1, 8, 5, 7)).shape)
    (1, 8, 10, 14)
    """

    def __init__(self, name: str, channels: int, scale: int = 2, **options: Any) -> None:
        super().__init__()
        if is_guided(name):
            raise ValueError(
                f"{name} is guided by a fine map and needs two inputs, the fine and the coarse map"
            )
        if not isinstance(scale, int) or scale < 1:
            raise ValueError(f"scale must be a positive whole number, got {scale!r}")
        self.scale = scale
        if name in SCALES:
            options = {SCALES[name]: scale, **options}
        self.fusion = create_fitting_fusion(name, 1, channels, options)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to ``(B, channels, scale * H, scale * W)``."""
        return upsample_alone(self.fusion, x, self.scale)
