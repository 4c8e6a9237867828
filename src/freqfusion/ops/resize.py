"""Bringing a map to a size."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import is_channels_last, is_exporting, refuse_torchscript


def resize(x: Tensor, size: Sequence[int], mode: str, align_corners: bool = False) -> Tensor:
    """Interpolate ``(B, C, h, w)`` or ``(B, C, d, h, w)`` to ``size``; the map itself where it has that size already.

    ``"bilinear"`` is trilinear for a volume.
    """
    refuse_torchscript()
    size = tuple(size)
    if _has_size(x, size):
        return x
    if mode == "bilinear" and x.ndim == 5:
        mode = "trilinear"
    if mode in ("nearest", "nearest-exact", "area"):  # these take no align_corners
        return F.interpolate(x, size=size, mode=mode)
    return F.interpolate(x, size=size, mode=mode, align_corners=align_corners)


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first rows and columns of ``(B, C, h, w)``, ``size`` of them."""
    height, width = size
    if _has_size(x, (height, width)):
        return x
    if not is_exporting():
        return x[..., :height, :width]
    # a slice of a size that is known only at run time would tie the program to the traced one's being a whole map
    rows, columns = (torch.arange(length, device=x.device) for length in (height, width))
    return x.index_select(-2, rows).index_select(-1, columns)


def _has_size(x: Tensor, size: tuple[int, ...]) -> bool:
    """Whether ``x`` has that size; under export, whether it has it at every size that the program is for."""
    if not is_exporting():
        return x.shape[2:] == size
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings sympy along

    return all(statically_known_true(mine == wanted) for mine, wanted in zip(x.shape[2:], size, strict=True))


def shuffle(x: Tensor, factor: int) -> Tensor:
    """Channels to sub-pixels: torch's ``pixel_shuffle``, for volumes too.

    There ``(B, C * factor**3, d, h, w)`` becomes ``(B, C, d * factor, h * factor, w * factor)``.
    """
    if x.ndim == 4 and x.device.type != "cpu" and is_channels_last(x):
        return _shuffle_last(x, factor)
    # the gradient of torch's has a wrong shape for an empty batch
    if x.ndim == 4 and (torch.compiler.is_compiling() or len(x)):
        return F.pixel_shuffle(x, factor)
    batch, channels, *size = x.shape
    dims = len(size)
    channels = channels // factor**dims
    x = x.reshape(batch, channels, *[factor] * dims, *size)
    x = x.permute(0, 1, *(axis for inner in range(2, 2 + dims) for axis in (inner + dims, inner)))
    return x.reshape(batch, channels, *(side * factor for side in size))


def _shuffle_last(x: Tensor, factor: int) -> Tensor:
    """:func:`shuffle` that keeps channels innermost, as torch's does on a CPU alone."""
    batch, channels, height, width = x.shape
    channels //= factor**2
    x = x.permute(0, 2, 3, 1).reshape(batch, height, width, channels, factor, factor)
    x = x.permute(0, 1, 4, 2, 5, 3).reshape(batch, factor * height, factor * width, channels)
    return x.permute(0, 3, 1, 2)


def fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bring an upsampled map ``(B, C, h, w)`` to ``size``.

    A surplus of one row or column, as x2 leaves where the fine side is odd, is cropped at the bottom or right
    (as mmdetection's CARAFE neck does); other sizes are interpolated bilinearly.
    """
    height, width = size
    if 0 <= x.shape[-2] - height <= 1 and 0 <= x.shape[-1] - width <= 1:
        return crop(x, size)
    return resize(x, size, "bilinear")
