"""Class maps for image files of any size, in bounded memory."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from freqfusion.models.base import normalisation_of
from freqfusion.models.inference import predict_logits
from freqfusion.tasks.rng import fixed_randomness

LARGE_PIXELS = 2048 * 1024
"""Images of more pixels are predicted tile by tile."""
TILE = 1024
"""Side of a tile, pixels."""
MARGIN = 128
"""What the network sees around a tile on each side, pixels; predictions there are thrown away."""
_BAND_VALUES = 1 << 26
"""How many logits of the full-size result are held at once when a smaller result is enlarged."""


@torch.no_grad()
def predict_mask(
    network: nn.Module,
    image: Tensor,
    *,
    resize: tuple[int, int] | None = None,
    window: int | None = None,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """The class of every pixel.

    An image of more than ``LARGE_PIXELS`` is cut into tiles of ``TILE`` pixels, each predicted with
    ``MARGIN`` pixels of its surroundings, so that memory does not grow with the image; with ``resize`` the
    network's work is bounded anyway.

    Args:
        network: a segmentation network in eval mode, on the device to use; it says how images are normalised.
        image: ``(3, H, W)`` uint8.
        resize: height and width that the network works at; its logits are enlarged to the image's size.
            None: the image's own size.
        window, stride, scales, flip: see :func:`freqfusion.models.inference.predict_logits`.

    Returns:
        ``(H, W)`` on the CPU, uint8 up to 256 classes, else int32.
    """
    device = next(network.parameters()).device
    mean, std = map(list, normalisation_of(network))

    def predict(seen: Tensor) -> Tensor:
        scaled = TF.to_dtype(seen.to(device), torch.float32, scale=True)
        with fixed_randomness(device):
            return predict_logits(
                network,
                TF.normalize(scaled, mean, std)[None],
                window=window,
                stride=stride,
                scales=scales,
                flip=flip,
            )[0]

    height, width = image.shape[-2:]
    if resize is not None:
        image = TF.resize(image, list(resize), antialias=True)
    if resize is None and height * width > LARGE_PIXELS:
        return _predict_tiles(predict, image)
    logits = predict(image)
    return _narrow(enlarged_argmax(logits, (height, width)), logits.shape[0])


def _predict_tiles(predict: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    result: Tensor | None = None
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            above, before = min(MARGIN, top), min(MARGIN, left)
            bottom, right = min(top + TILE, height), min(left + TILE, width)
            seen = image[:, top - above : bottom + MARGIN, left - before : right + MARGIN]
            logits = predict(seen)
            inner = logits[:, above : above + bottom - top, before : before + right - left]
            classes = _narrow(inner.argmax(0), logits.shape[0])
            if result is None:
                result = classes.new_empty((height, width))
            result[top:bottom, left:right] = classes
    assert result is not None  # an image has at least one pixel
    return result


def _narrow(classes: Tensor, num_classes: int) -> Tensor:
    return classes.to("cpu", torch.uint8 if num_classes <= 256 else torch.int32)


def enlarged_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """``argmax`` of bilinearly resized logits without ever holding the resized logits in full.

    Args:
        logits: ``(K, h, w)``.
        size: height and width of the result.

    Returns:
        ``(*size)`` int64, what ``F.interpolate(logits[None], size, mode="bilinear").argmax(1)`` gives.
    """
    classes, source_height = logits.shape[:2]
    height, width = size
    if logits.shape[1:] == size:
        return logits.argmax(0)
    rows = max(1, _BAND_VALUES // (classes * width))
    result = torch.empty(size, dtype=torch.int64, device=logits.device)
    for top in range(0, height, rows):
        # on the CPU: not every device has doubles
        lines = torch.arange(top, min(top + rows, height), dtype=torch.float64)
        # Pixel centres to pixel centres, clamped at the border: the rule of align_corners=False.
        position = ((lines + 0.5) * (source_height / height) - 0.5).clamp(0, source_height - 1)
        weight = (position - position.floor()).to(logits)[:, None]
        upper = position.long().to(logits.device)
        lower = (upper + 1).clamp(max=source_height - 1)
        band = torch.lerp(logits[:, upper], logits[:, lower], weight.expand(-1, logits.shape[2]))
        band = F.interpolate(band[None], size=(len(lines), width), mode="bilinear", align_corners=False)
        result[top : top + len(lines)] = band[0].argmax(0)
    return result
