"""Augmentation of images with objects, and how they are put into batches.

Every random number comes from torch's global generator, so seeding torch fixes the augmentation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from freqfusion.data.base import Sample
from freqfusion.data.transforms import PhotometricDistortion, RandomShortSide, _uniform


class _Resize(v2.Transform):
    """Resize to a size that a subclass draws.

    Images are interpolated bilinearly without antialiasing; masks and segments take the nearest pixel's value, on the
    grid of the image.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image, boxes, masks or segments."""
        if isinstance(inpt, tv_tensors.Mask):
            # F.resize would shift masks by half a pixel against the image; it takes no other mode for them
            planes = inpt.as_subclass(Tensor)
            planes = planes[None] if inpt.ndim == 2 else planes
            planes = F.resize_image(planes, params["size"], InterpolationMode.NEAREST_EXACT)
            return tv_tensors.Mask(planes[0] if inpt.ndim == 2 else planes)
        return F.resize(inpt, params["size"], InterpolationMode.BILINEAR, antialias=False)


class _ResizeShortSide(_Resize, RandomShortSide):
    pass


class _ScaleJitter(_Resize):
    def __init__(self, jitter: tuple[float, float], crop_size: tuple[int, int]) -> None:
        super().__init__()
        if not 0 < jitter[0] <= jitter[1]:
            raise ValueError(f"jitter must be two positive factors in rising order, got {jitter}")
        self.jitter = jitter
        self.crop_size = crop_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the output size; sides are rounded to the nearest pixel, halves up, as mmdetection rounds them."""
        height, width = v2.query_size(flat_inputs)
        factor = _uniform(*self.jitter) * min(self.crop_size[0] / height, self.crop_size[1] / width)
        return {"size": [max(1, int(side * factor + 0.5)) for side in (height, width)]}


class _RandomCrop(v2.Transform):
    """Crop to at most a given size; a smaller picture keeps its size along that side."""

    def __init__(self, crop_size: tuple[int, int]) -> None:
        super().__init__()
        if min(crop_size) < 1:
            raise ValueError(f"crop_size must be at least 1x1 pixels, got {crop_size}")
        self.crop_size = crop_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the position."""
        size = v2.query_size(flat_inputs)
        height, width = (min(limit, side) for limit, side in zip(self.crop_size, size, strict=True))
        top = int(torch.randint(size[0] - height + 1, ()))
        left = int(torch.randint(size[1] - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image, boxes, masks or segments."""
        return F.crop(inpt, **params)


_sanitize = v2.Compose(
    [
        v2.ClampBoundingBoxes(),  # rounding may put a box at the border past it
        v2.SanitizeBoundingBoxes(
            min_size=1, labels_getter=lambda sample: (sample["labels"], sample["iscrowd"])
        ),
    ]
)


def _drop_tiny(sample: Sample) -> Sample:
    """Clip the boxes to the picture and drop objects, with all they have, of which no pixel is left.

    Nor are those kept whose box has a side under one pixel.
    """
    if "boxes" not in sample:
        return sample
    sample = _sanitize(sample)
    if "masks" in sample:  # a corner of a box may be left without its object
        seen = (sample["masks"] > 0).flatten(1).any(1)
        for key in ("boxes", "labels", "iscrowd", "masks"):
            sample[key] = tv_tensors.wrap(sample[key][seen], like=sample[key])
    return sample


def _as_plain(sample: Sample) -> Sample:
    plain = {
        key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value
        for key, value in sample.items()
    }
    plain["image"] = F.to_dtype(plain["image"], torch.float32, scale=True)
    if "segments" in plain:
        plain["segments"] = plain["segments"].long()
    return plain


def eval_object_transform() -> Callable[[Sample], Sample]:
    """The plain form of a sample at its own size, for scoring and prediction.

    Returns:
        A function from a sample (see :class:`~freqfusion.data.objects.ObjectDataset`) to one with plain tensors:
        ``image`` ``(3, H, W)`` float32 in [0, 1], ``segments`` of a panoptic set ``(H, W)`` int64, the rest as it
        was.

    Example:
        >>> sample = {"image": tv_tensors.Image(torch.full((3, 1, 2), 255, dtype=torch.uint8)), "name": "a"}
        >>> eval_object_transform()(sample)["image"].tolist()
        [[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]]]
    """
    return _as_plain


def train_object_transform(
    *,
    short_sides: Sequence[int],
    max_size: int,
    flip: float,
    photometric: bool = False,
    jitter: tuple[float, float] | None = None,
    crop_size: tuple[int, int] | None = None,
) -> Callable[[Sample], Sample]:
    """The usual augmentation of detectors: resize, perhaps crop, flip, perhaps distort colours.

    Without ``jitter`` the shorter side becomes one of ``short_sides``, unless the longer would exceed ``max_size``.
    With it, large scale jitter takes the place of that: the picture is resized by a random factor times the one that
    fits it into ``crop_size``, then cropped at random to at most that size (Ghiasi et al., "Simple copy-paste is a
    strong data augmentation method for instance segmentation", CVPR 2021). Nothing is padded. Objects are cut at the
    rim, and those whose box is left with a side under one pixel are dropped; segments keep their place even where no
    pixel of them is left.

    Args:
        short_sides: lengths of the shorter side in pixels, one drawn for each picture; not used with ``jitter``.
        max_size: greatest length of the longer side in pixels; not used with ``jitter``.
        flip: probability of a horizontal flip.
        photometric: whether to distort colours; see :class:`~freqfusion.data.transforms.PhotometricDistortion`.
        jitter: lowest and highest random factor; needs ``crop_size``.
        crop_size: height and width of the crop after ``jitter``.

    Returns:
        A function from a sample (see :class:`~freqfusion.data.objects.ObjectDataset`) to one with plain tensors:
        ``image`` ``(3, H, W)`` float32 in [0, 1], not normalised; of a box set ``boxes`` ``(N, 4)`` float32,
        ``labels``, ``iscrowd`` and, if there were, ``masks`` ``(N, H, W)`` uint8; of a panoptic set ``segments``
        ``(H, W)`` int64, ``labels`` and ``iscrowd``. Other entries pass.

    Raises:
        ValueError: for a setting outside its range, or ``jitter`` or ``crop_size`` alone.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip is a probability in [0, 1], got {flip}")
    steps: list[Callable[[Sample], Sample]]
    if jitter is not None and crop_size is not None:
        steps = [_ScaleJitter(jitter, crop_size), _RandomCrop(crop_size)]
    elif jitter is None and crop_size is None:
        steps = [_ResizeShortSide(short_sides, max_size)]
    else:
        raise ValueError(f"jitter and crop_size go together, got {jitter} and {crop_size}; give both or none")
    steps += [_drop_tiny, v2.RandomHorizontalFlip(flip)]
    if photometric:
        steps.append(PhotometricDistortion())
    return v2.Compose([*steps, _as_plain])


def collate_objects(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Put samples, whose sizes may differ, into a batch of lists.

    Args:
        samples: with the same keys.

    Returns:
        For each key the list over the samples. Of no samples, ``name`` and ``image_id`` alone, both empty.

    Raises:
        ValueError: for samples with different keys.

    Example:
        >>> collate_objects([{"name": "a", "image_id": 1}, {"name": "b", "image_id": 2}])
        {'name': ['a', 'b'], 'image_id': [1, 2]}
        >>> collate_objects([])
        {'name': [], 'image_id': []}
    """
    keys = list(samples[0]) if samples else ["name", "image_id"]
    for sample in samples:
        if set(sample) != set(keys):
            raise ValueError(
                f"samples of a batch must have the same entries, got {sorted(keys)} and {sorted(sample)}"
            )
    return {key: [sample[key] for sample in samples] for key in keys}


def group_by_aspect(
    sizes: Sequence[tuple[int, int]], order: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Cut an order of pictures into batches of landscape (or square) and of portrait ones, which need less padding.

    The order is gone through once, and a batch is given out as soon as one of the two groups has enough members. At
    the end the landscape pictures left over, then the portrait ones, are joined into mixed batches, and only the
    last, incomplete one is dropped: at most ``batch_size - 1`` pictures, and none appears twice.

    Args:
        sizes: height and width of every picture.
        order: places in ``sizes``.
        batch_size: pictures a batch.

    Returns:
        ``len(order) // batch_size`` batches of places, depending on the arguments alone.

    Raises:
        ValueError: for a batch size below 1.

    Example:
        >>> sizes = [(2, 3), (3, 2), (2, 2), (3, 2), (2, 3)]
        >>> group_by_aspect(sizes, order=[4, 3, 2, 1, 0], batch_size=2)
        [[4, 2], [3, 1]]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batches: list[list[int]] = []
    landscape: list[int] = []
    portrait: list[int] = []
    for index in order:
        height, width = sizes[index]
        group = landscape if width >= height else portrait
        group.append(index)
        if len(group) == batch_size:
            batches.append(group.copy())
            group.clear()
    left = landscape + portrait
    if len(left) >= batch_size:
        batches.append(left[:batch_size])
    return batches
