"""How results are got from a network: sizes, windows, mirrored passes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


@dataclass(frozen=True)
class ObjectInference:
    """How objects are found; see :meth:`freqfusion.models.base.ObjectModel.find`."""

    sizes: Sequence[int] | None = None
    """Lengths in pixels of the images' shorter side, a pass for each; the network's own, or the image's, if None."""
    max_size: int | None = None
    """Limit of the longer side; by default the network's own, grown with the size."""
    flip: bool = False
    """Also find objects in the mirrored image."""
    max_detections: int = 100
    """How many instances a mask classifier keeps per image."""


AS_SET = ObjectInference()
"""One pass at the size that the network is set to."""


def fitting_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width after resizing: shorter side ``min_size``, unless the longer were above ``max_size``.

    Rounded to the nearest pixel, as mmdetection does; torchvision rounds down.

    >>> fitting_size(480, 640, 800, 1333), fitting_size(427, 640, 800, 1333)
    ((800, 1067), (800, 1199))
    """
    scale = min(max_size / max(height, width), min_size / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    images: Tensor,
    *,
    window: int | Size | None = None,
    stride: int | Size | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Class scores of a batch of images.

    The model's mode is left alone: call ``model.eval()`` before. No gradient is recorded.

    Args:
        model: maps ``(B, 3, h, w)`` to logits ``(B, K, h, w)`` for any size.
        images: ``(B, 3, H, W)``, floating point, normalised.
        window: side or ``(height, width)`` in pixels of a sliding window; by default the model sees the
            whole image. A window larger than the image shrinks to it. The last window of a row or column
            is moved back to the border, so that every pixel is covered; overlapping logits are averaged.
        stride: step or ``(vertical, horizontal)`` steps of the window in pixels, at most its size; by
            default two thirds of it.
        scales: factors by which the image is resized before prediction; each result is resized back.
        flip: also predict the mirrored image (left to right) at each scale.

    Returns:
        ``(B, K, H, W)``, float32 at least. From a single pass (one scale, no flip) these are logits. From
        several passes these are probabilities: the mean of each pass's softmax over the classes. In both
        cases ``.argmax(1)`` is the prediction.

    Raises:
        TypeError: for integer images.
        ValueError: for another shape, a window, stride or scale that is not positive, a stride that leaves
            gaps or comes without a window, or a model whose output has another size than its input.
    """
    if images.ndim != 4 or 0 in images.shape[-2:]:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point and normalised, got {images.dtype}")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be positive factors, at least one, got {tuple(scales)}")
    window, stride = _check_window(window, stride)

    size = (images.shape[-2], images.shape[-1])
    mirrors = (False, True) if flip else (False,)
    passes = len(scales) * len(mirrors)
    total: Tensor | None = None
    for scale in scales:
        scaled = _resize(images, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
        for mirror in mirrors:
            logits = _predict(model, scaled.flip(-1) if mirror else scaled, window, stride)
            logits = _resize(logits.flip(-1) if mirror else logits, size)
            if passes == 1:
                return logits
            probabilities = logits.softmax(dim=1)
            total = probabilities if total is None else total.add_(probabilities)
    assert total is not None  # scales is not empty
    return total.div_(passes)


def _check_window(window: int | Size | None, stride: int | Size | None) -> tuple[Size | None, Size]:
    if window is None:
        if stride is not None:
            raise ValueError(f"stride={stride} was given without a window; give both or neither")
        return None, (1, 1)
    window = _pair(window, "window")
    stride = (-(-2 * window[0] // 3), -(-2 * window[1] // 3)) if stride is None else _pair(stride, "stride")
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride {stride} is larger than the window {window} and would leave gaps; lower it")
    return window, stride


def _pair(value: int | Size, name: str) -> Size:
    pair = (value, value) if isinstance(value, int) else (value[0], value[1])
    if min(pair) < 1:
        raise ValueError(f"{name} must be at least 1 pixel, got {value}")
    return pair


def _resize(x: Tensor, size: Size) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _predict(model: nn.Module, images: Tensor, window: Size | None, stride: Size) -> Tensor:
    """Logits of ``images`` at their own size; windows are added up in one tensor."""
    height, width = images.shape[-2:]
    if window is None or (window[0] >= height and window[1] >= width):
        return _run(model, images)
    tall, wide = min(window[0], height), min(window[1], width)
    tops, lefts = _starts(height, tall, stride[0]), _starts(width, wide, stride[1])
    total: Tensor | None = None
    for top in tops:
        for left in lefts:
            logits = _run(model, images[..., top : top + tall, left : left + wide])
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], height, width))
            total[..., top : top + tall, left : left + wide] += logits
    assert total is not None  # there is always a first window
    total /= _cover(height, tall, tops).to(total)[:, None]
    total /= _cover(width, wide, lefts).to(total)
    return total


def _run(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images)
    if logits.ndim != 4 or logits.shape[0] != images.shape[0] or logits.shape[-2:] != images.shape[-2:]:
        raise ValueError(
            f"the model returned shape {tuple(logits.shape)} for images {tuple(images.shape)}; expected "
            "logits (B, K, H, W) at the images' size"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side, the last one ending at the border."""
    return [*range(0, length - window, stride), length - window]


def _cover(length: int, window: int, starts: list[int]) -> Tensor:
    """How many windows cover each pixel of one side."""
    count = torch.zeros(length)
    for start in starts:
        count[start : start + window] += 1
    return count
