"""Augmentation and normalisation of samples, on torchvision's v2 transforms.

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
from freqfusion.data.normalisation import IMAGENET, Normalisation

_IGNORE = 255
_CROP_TRIES = 10


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _coin() -> bool:
    return torch.rand(()).item() < 0.5


class RandomRescale(v2.Transform):
    """Resize by a random factor, keeping the aspect ratio.

    With ``base_size`` the picture is first thought resized to fit inside it (long side to long side, as
    mmsegmentation's keep-ratio resize to 2048x512), then multiplied by the factor; with None the factor is
    relative to the picture's own size. Images are interpolated bilinearly with antialiasing, masks by nearest
    neighbour.

    Args:
        ratio_range: lowest and highest factor.
        base_size: two sides in pixels, in either order, or None.
    """

    def __init__(self, ratio_range: tuple[float, float], base_size: tuple[int, int] | None) -> None:
        super().__init__()
        if not 0 < ratio_range[0] <= ratio_range[1]:
            raise ValueError(f"ratio_range must be two positive factors in rising order, got {ratio_range}")
        if base_size is not None and min(base_size) < 1:
            raise ValueError(f"base_size must be two sides of at least 1 pixel, got {base_size}")
        self.ratio_range = ratio_range
        self.base_size = base_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the output size."""
        height, width = v2.query_size(flat_inputs)
        factor = _uniform(*self.ratio_range)
        if self.base_size is not None:
            factor *= min(
                max(self.base_size) / max(height, width),
                min(self.base_size) / min(height, width),
            )
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one image or mask."""
        return F.resize(inpt, params["size"], InterpolationMode.BILINEAR, antialias=True)


class RandomShortSide(RandomRescale):
    """Resize the shorter side to one of several lengths, keeping the aspect ratio, as detectron2 does.

    Args:
        short_sides: lengths in pixels, one drawn for each picture.
        max_size: limit of the longer side in pixels.
    """

    def __init__(self, short_sides: Sequence[int], max_size: int) -> None:
        super().__init__((1.0, 1.0), None)
        if not short_sides or min(short_sides) < 1 or max_size < 1:
            raise ValueError(
                f"short_sides must be one or more numbers of pixels and max_size one, got {list(short_sides)} "
                f"and {max_size}"
            )
        self.short_sides = tuple(short_sides)
        self.max_size = max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the output size."""
        sides = v2.query_size(flat_inputs)
        short_side = self.short_sides[int(torch.randint(len(self.short_sides), ()))]
        factor = min(short_side / min(sides), self.max_size / max(sides))
        return {"size": [max(1, int(side * factor + 0.5)) for side in sides]}


class RandomCover(v2.Transform):
    """Resize until a picture covers a crop, and further by a random factor, keeping the aspect ratio.

    Args:
        crop_size: height and width in pixels.
        ratio_range: lowest and highest factor; at 1 one side has the crop's length.
    """

    def __init__(self, crop_size: tuple[int, int], ratio_range: tuple[float, float]) -> None:
        super().__init__()
        if not 1 <= ratio_range[0] <= ratio_range[1]:
            raise ValueError(
                f"ratio_range is {tuple(ratio_range)}, expected two rising factors of at least 1, at which a picture "
                "just covers the crop"
            )
        self.crop_size = crop_size
        self.ratio_range = ratio_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the output size."""
        sides = v2.query_size(flat_inputs)
        factor = _uniform(*self.ratio_range) * max(
            crop / side for crop, side in zip(self.crop_size, sides, strict=True)
        )
        return {
            "size": [
                max(crop, round(side * factor)) for crop, side in zip(self.crop_size, sides, strict=True)
            ]
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one image."""
        return F.resize(inpt, params["size"], InterpolationMode.BILINEAR, antialias=True)


class BalancedRandomCrop(v2.Transform):
    """Crop to at most a given size, avoiding crops of almost one class.

    Up to ten positions are drawn until no class covers ``cat_max_ratio`` of the crop's labelled pixels (or
    more); if none will do, the last is taken, as in mmsegmentation.

    Args:
        crop_size: height and width in pixels; a smaller picture keeps its size along that side.
        cat_max_ratio: limit in (0, 1]; at 1 the first position is taken.
    """

    def __init__(self, crop_size: tuple[int, int], cat_max_ratio: float) -> None:
        super().__init__()
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f"cat_max_ratio must be in (0, 1], got {cat_max_ratio}")
        self.crop_size = crop_size
        self.cat_max_ratio = cat_max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the position."""
        size = v2.query_size(flat_inputs)
        mask = next(entry for entry in flat_inputs if isinstance(entry, tv_tensors.Mask))
        height, width = (min(limit, side) for limit, side in zip(self.crop_size, size, strict=True))
        top = left = 0
        for _ in range(_CROP_TRIES):
            top = int(torch.randint(size[0] - height + 1, ()))
            left = int(torch.randint(size[1] - width + 1, ()))
            if self.cat_max_ratio == 1:
                break
            labels = mask[top : top + height, left : left + width].flatten()
            counts = torch.bincount(labels, minlength=_IGNORE + 1)[:_IGNORE]
            if counts.max() < self.cat_max_ratio * counts.sum():
                break
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one image or mask."""
        return F.crop(inpt, **params)


class PhotometricDistortion(v2.Transform):
    """Colour jitter of the SSD detector, without its swap of channels.

    Each with probability one half: brightness shifted by up to 32 of 255; contrast (all values times 0.5 to
    1.5), before or after the following two; saturation times 0.5 to 1.5; hue turned by up to 36 degrees. Liu
    et al., "SSD: single shot multibox detector", ECCV 2016; the ranges are mmsegmentation's.
    Takes and returns uint8 images.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the strengths; None leaves a property as it is."""
        return {
            "brightness": _uniform(-32 / 255, 32 / 255) if _coin() else None,
            "contrast": _uniform(0.5, 1.5) if _coin() else None,
            "contrast_first": _coin(),
            "saturation": _uniform(0.5, 1.5) if _coin() else None,
            "hue": _uniform(-0.1, 0.1) if _coin() else None,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Distort an image; masks are left alone."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = F.to_dtype(inpt.as_subclass(Tensor), torch.float32, scale=True)
        if params["brightness"] is not None:
            image = (image + params["brightness"]).clamp(0, 1)
        if params["contrast"] is not None and params["contrast_first"]:
            image = (image * params["contrast"]).clamp(0, 1)
        if params["saturation"] is not None:
            image = F.adjust_saturation(image, params["saturation"])
        if params["hue"] is not None:
            image = F.adjust_hue(image, params["hue"])
        if params["contrast"] is not None and not params["contrast_first"]:
            image = (image * params["contrast"]).clamp(0, 1)
        return tv_tensors.Image((image * 255).round().to(torch.uint8))


class PadToSize(v2.Transform):
    """Pad on the right and below: normalised images with 0 (the mean colour), masks with 255 (ignored).

    Args:
        size: least height and width in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The missing rows and columns."""
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(0, self.size[1] - width), max(0, self.size[0] - height)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad one image or mask."""
        fill = _IGNORE if isinstance(inpt, tv_tensors.Mask) else 0
        return F.pad(inpt, **params, fill=fill)


def eval_transform(normalisation: Normalisation = IMAGENET) -> Callable[[Sample], Sample]:
    """Normalisation alone, for scoring and prediction.

    Args:
        normalisation: what the network wants, see :func:`freqfusion.models.base.normalisation_of`.

    Returns:
        A function from a sample (see :class:`~freqfusion.data.base.SegmentationDataset`) to one with plain
        tensors: ``image`` ``(3, H, W)`` float32, normalised; ``mask``, if there is one, ``(H, W)`` int64. Other
        entries pass.

    Example:
        >>> grey = tv_tensors.Image(torch.full((3, 2, 2), 255, dtype=torch.uint8))
        >>> [round(value, 3) for value in eval_transform()({"image": grey})["image"][:, 0, 0].tolist()]
        [2.249, 2.429, 2.64]
    """
    return v2.Compose([*_normalise(normalisation), v2.ToPureTensor()])


def train_transform(
    crop_size: tuple[int, int],
    ratio_range: tuple[float, float],
    base_size: tuple[int, int] | None,
    flip: float,
    photometric: bool,
    cat_max_ratio: float = 0.75,
    short_sides: Sequence[int] | None = None,
    max_size: int = 2560,
    normalisation: Normalisation = IMAGENET,
) -> Callable[[Sample], Sample]:
    """The usual augmentation of semantic segmentation: rescale, crop, flip, distort colours, normalise, pad.

    Args:
        crop_size: height and width of what comes out.
        ratio_range: lowest and highest factor of the random rescaling; (1, 1) with no base size does none.
        base_size: what the factor is relative to; see :class:`RandomRescale`.
        flip: probability of a horizontal flip.
        photometric: whether to distort colours; see :class:`PhotometricDistortion`.
        cat_max_ratio: see :class:`BalancedRandomCrop`.
        short_sides: lengths of the shorter side in pixels, one drawn for each picture, in place of the random
            rescaling; see :class:`RandomShortSide`.
        max_size: limit of the longer side then.
        normalisation: see :func:`eval_transform`.

    Returns:
        A function from a sample to one with plain tensors of the crop's size, as :func:`eval_transform` makes
        them; padding is 0 in the image (the mean colour) and 255 in the mask.

    Raises:
        ValueError: for a setting outside its range.
    """
    if min(crop_size) < 1:
        raise ValueError(f"crop_size must be at least 1x1 pixels, got {crop_size}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip is a probability in [0, 1], got {flip}")
    rescale = (
        RandomRescale(ratio_range, base_size)
        if short_sides is None
        else RandomShortSide(short_sides, max_size)
    )
    steps: list[v2.Transform] = [
        rescale,
        BalancedRandomCrop(crop_size, cat_max_ratio),
        v2.RandomHorizontalFlip(flip),
    ]
    if photometric:
        steps.append(PhotometricDistortion())
    return v2.Compose([*steps, *_normalise(normalisation), PadToSize(crop_size), v2.ToPureTensor()])


def _normalise(normalisation: Normalisation) -> list[v2.Transform]:
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(*normalisation)]
