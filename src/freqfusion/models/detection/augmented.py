"""Prediction of objects at several image sizes, and mirrored."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from freqfusion.models.detection.panoptic import PanopticFPN

Detection = dict[str, Tensor]


@torch.no_grad()
def predict_objects(
    model: nn.Module, images: list[Tensor], *, sizes: Sequence[int] | None = None, flip: bool = False
) -> list[Detection]:
    """Detections, merged from several passes if asked for.

    The detections of all passes are put together, and non-maximum suppression within each class drops the lesser
    doubles, with the limits that the model itself has.

    Args:
        model: a detector as torchvision has them, in evaluation mode.
        images: ``(3, H, W)`` each, as the model takes them.
        sizes: for each pass the length of the images' shorter side, the limit of the longer growing along; by
            default the model's own.
        flip: also predict the mirrored image at each size.

    Returns:
        For each image what the model gives for one.

    Raises:
        ValueError: for several passes of a panoptic model, whose segments cannot be put together, and for sizes where
            the model has one fixed size.
    """
    every_size: Sequence[int | None] = sizes or [None]
    passes = [(size, mirrored) for size in every_size for mirrored in ([False, True] if flip else [False])]
    if len(passes) == 1:
        with _resizing(model, passes[0][0]):
            single: list[Detection] = model(images)
            return single
    if isinstance(model, PanopticFPN):
        raise ValueError(
            "panoptic segments of several passes cannot be put together: give one size and no mirrored pass"
        )
    found: list[list[Detection]] = []
    for size, mirrored in passes:
        with _resizing(model, size):
            results: list[Detection] = model([x.flip(-1) for x in images] if mirrored else images)
        if mirrored:
            results = [_mirror(result, x.shape[-1]) for result, x in zip(results, images, strict=True)]
        found.append(results)
    limits: Any = getattr(model, "roi_heads", model)
    return [_merge(list(of_image), limits) for of_image in zip(*found, strict=True)]


@contextmanager
def _resizing(model: Any, size: int | None) -> Iterator[None]:
    """Let the model resize images to another size for a while."""
    if size is None:
        yield
        return
    transform = model.transform
    if transform.fixed_size is not None:
        raise ValueError(
            f"{type(model).__name__} resizes every image to {transform.fixed_size} (width, height): leave sizes out"
        )
    before = transform.min_size, transform.max_size
    usual = before[0][-1]
    transform.min_size, transform.max_size = (size,), round(before[1] * size / usual)
    try:
        yield
    finally:
        transform.min_size, transform.max_size = before


def _mirror(detection: Detection, width: int) -> Detection:
    left, top, right, bottom = detection["boxes"].unbind(1)
    mirrored = {**detection, "boxes": torch.stack((width - right, top, width - left, bottom), dim=1)}
    if "masks" in detection:
        mirrored["masks"] = detection["masks"].flip(-1)
    return mirrored


def _merge(detections: list[Detection], limits: Any) -> Detection:
    together = {key: torch.cat([detection[key] for detection in detections]) for key in detections[0]}
    keep = batched_nms(together["boxes"], together["scores"], together["labels"], limits.nms_thresh)
    return {key: x[keep[: limits.detections_per_img]] for key, x in together.items()}
