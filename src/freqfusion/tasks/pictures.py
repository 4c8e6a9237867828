"""What a network finds in an image that it is judged on, drawn beside the truth."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from freqfusion.data.transforms import eval_transform
from freqfusion.drawing.detections import colour_segments, draw_objects
from freqfusion.drawing.figures import Picture, colour_mask
from freqfusion.models.base import normalisation_of

SURE = 0.5
"""The least score of an object that is drawn."""
DARK = 24
"""The ground of objects where the images must not be shown."""
LONGEST = 512
"""Longer side of each of the pictures that stand side by side, at most; pixels."""
GAP = 4
"""White pixels between them."""


def read_sample(data: Any, split: str, index: int) -> dict[str, Any]:
    """An image as it is judged, with its truth.

    Args:
        data: an ``ImageData``.
        split: the part of the data.
        index: which of its images.
    """
    if hasattr(data, "sample"):
        return dict(data.sample(split, index))
    return dict(data.transform("eval")(data.dataset(split)[index]))


def image_bytes(image: Tensor) -> Picture:
    """``(H, W, 3)`` uint8 of an image ``(3, H, W)``, uint8 or in [0, 1]."""
    image = image.as_subclass(Tensor)
    image = (255 * image).round().byte() if image.is_floating_point() else image
    return image.permute(1, 2, 0).numpy()


def resized(picture: Picture, size: tuple[int, int]) -> Picture:
    """A copy of the given height and width: enlarged pixels stay squares."""
    smaller = size[1] < picture.shape[1]
    how = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size[::-1], how))


def draw_truth(data: Any, sample: dict[str, Any], images: bool = True) -> Picture:
    """The classes of the pixels, the segments, or the objects over the image (over a dark ground without images)."""
    if "mask" in sample:
        return colour_mask(sample["mask"].as_subclass(Tensor).numpy(), data.palette)
    objects: dict[str, Any] = sample
    if "segments" not in sample:
        single = ~sample["iscrowd"]
        objects = {key: sample[key][single] for key in ("boxes", "labels", "masks") if key in sample}
    return _draw_objects(data, sample, objects, images)


def predict_labels(module: Any, sample: dict[str, Any]) -> NDArray[Any]:
    """The classes ``(H, W)`` that a ``SegmentationModule`` finds in the image of a sample."""
    image = eval_transform(normalisation_of(module.network))(sample)["image"].as_subclass(Tensor)
    labels: NDArray[Any] = module.predict(_placed(image, module)[None]).argmax(1)[0].cpu().numpy()
    return labels


def draw_found(module: Any, data: Any, sample: dict[str, Any], images: bool = True) -> Picture:
    """The segments, or the objects that are sure enough, that an ``ObjectTask`` finds in the image of a sample."""
    found = module([_placed(sample["image"], module)])[0]
    found = {key: (x.float() if x.is_floating_point() else x).cpu() for key, x in found.items()}
    if "segments" in found:
        objects = {"segments": found["segments"], "labels": found["segment_labels"]}
    else:
        sure = found["scores"] >= SURE
        objects = {key: found[key][sure] for key in ("boxes", "labels", "scores")}
        if "masks" in found:
            objects["masks"] = found["masks"][sure].squeeze(1) > 0.5
    return _draw_objects(data, sample, objects, images)


def draw_side_by_side(module: Any, data: Any, sample: dict[str, Any]) -> Picture:
    """Image, truth and prediction from left to right, ``GAP`` apart, each with a longer side of at most ``LONGEST``.

    Of an upsampler of features, which has no truth, the second is the target and the third the upsampled features:
    the three principal components of the target as red, green and blue.

    Args:
        module: a ``TaskModule`` in evaluation mode.
        data: the ``ImageData`` of the sample.
        sample: of :func:`read_sample`.

    Returns:
        ``(H, 3 * W + 2 * GAP, 3)`` uint8.
    """
    image = image_bytes(sample["image"])
    if module.task == "features":
        found, target = module.upsample_image(_placed(sample["image"], module)[None])
        pictures = [image, *_draw_components(target[0].float().cpu(), found[0].float().cpu())]
    elif "mask" in sample:
        pictures = [
            image,
            draw_truth(data, sample),
            colour_mask(predict_labels(module, sample), data.palette),
        ]
    else:
        pictures = [image, draw_truth(data, sample), draw_found(module, data, sample)]
    height, width = image.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    gap = np.full((size[0], GAP, 3), 255, np.uint8)
    first, second, third = (resized(picture, size) for picture in pictures)
    return np.concatenate([first, gap, second, gap, third], axis=1)


def _placed(image: Tensor, module: Any) -> Tensor:
    """An image where the weights are, and in their precision."""
    weight = next(module.parameters())
    kind = weight.dtype if image.is_floating_point() else image.dtype
    return image.as_subclass(Tensor).to(weight.device, kind)


def _draw_objects(data: Any, sample: Mapping[str, Any], objects: Mapping[str, Any], images: bool) -> Picture:
    if "segments" in objects:
        return colour_segments(objects["segments"], objects["labels"], data.palette, data.things)
    ground = image_bytes(sample["image"])
    ground = ground if images else np.full_like(ground, DARK)
    scores, masks = objects.get("scores"), objects.get("masks")
    return draw_objects(
        ground, objects["boxes"], objects["labels"], data.classes, data.palette, scores, masks
    )


def _draw_components(target: Tensor, found: Tensor) -> list[Picture]:
    """Both features ``(C, H, W)`` along the principal components of the target."""
    mean = target.mean((1, 2))[:, None]
    points = target.flatten(1) - mean
    axes = torch.linalg.eigh(points @ points.T)[1][:, -3:].flip(1).T
    low, high = (axes @ points).aminmax(dim=1, keepdim=True)
    pictures = []
    for features in (target, found):
        shares = (axes @ (features.flatten(1) - mean) - low) / (high - low).clamp_min(1e-12)
        shares = torch.cat([shares, shares.new_zeros(3 - len(shares), shares.shape[1])])
        pictures.append(image_bytes(shares.clamp(0, 1).view(3, *features.shape[1:])))
    return pictures
