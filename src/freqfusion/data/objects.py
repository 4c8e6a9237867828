"""Images with objects (boxes, masks, panoptic segments): what their data sets share, and the checks of files."""

import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from freqfusion._optional import require
from freqfusion.data.base import Palette, Sample, SampleFiles
from freqfusion.data.images import BadSampleError, Decoded, decode_image, header_size

_log = logging.getLogger(__name__)


class Category(NamedTuple):
    """A kind of object or region."""

    id: int
    """Its number in the annotation file, from which the label (its place among the categories) may differ."""
    name: str
    is_thing: bool
    """Whether it has countable objects; a category of stuff (sky, road) has one region an image."""
    colour: tuple[int, int, int]
    """RGB, 0..255."""


class ObjectDataset(Dataset[Sample]):
    """Base of the data sets of objects.

    A sample is a dict of ``image`` (``tv_tensors.Image``, ``(3, H, W)`` uint8), ``name`` (str), ``image_id``
    (int or str) and, of N objects in the image:

    - ``boxes``: ``tv_tensors.BoundingBoxes``, ``(N, 4)`` float32, XYXY in pixels, clipped to the image;
    - ``labels``: ``(N,)`` int64, places in :attr:`categories`;
    - ``iscrowd``: ``(N,)`` bool, regions that are neither trained on nor scored;
    - ``masks``, if :attr:`has_masks`: ``tv_tensors.Mask``, ``(N, H, W)`` uint8 of 0 and 1.

    In a sample of a panoptic set (:attr:`is_panoptic`) ``segments`` stands for boxes and masks:
    ``tv_tensors.Mask``, ``(H, W)`` int32, 0 where there is no truth and j on the j-th segment; its ``labels`` and
    ``iscrowd`` are those of the segments. :func:`segments_to_objects` derives boxes and masks.
    """

    categories: tuple[Category, ...]
    """In the order of the labels."""
    has_masks: bool = False
    """Whether the samples hold ``masks``."""
    is_panoptic: bool = False
    """Whether the samples hold ``segments``."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the categories."""
        return tuple(category.name for category in self.categories)

    @property
    def palette(self) -> Palette:
        """The colours of the categories."""
        return tuple(category.colour for category in self.categories)

    @property
    def things(self) -> tuple[int, ...]:
        """The labels of the categories with countable objects."""
        return tuple(label for label, category in enumerate(self.categories) if category.is_thing)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, without decoding it."""
        raise NotImplementedError

    def image_id(self, index: int) -> int | str:
        """The number or text by which annotations and results name an image."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The name of an image, for people and for files."""
        raise NotImplementedError

    def file_name(self, index: int) -> str:
        """The name of an image's file, from the folder of the images on."""
        return self.name(index)

    def ground_truth(self) -> dict[str, Any]:
        """The truth of exactly the images of this set, in the form of COCO's instance annotations.

        It can be given to the ``COCO`` class of pycocotools (as its ``dataset``) or of faster_coco_eval; the latter
        takes no image ids but whole numbers. Images and categories keep their ids, boxes and areas are as in the
        file. Annotations are numbered anew, from 1, since evaluators take an annotation with the id 0 for none. Of a
        panoptic set this holds the segments of things, as compressed RLE, and reads every label map.

        Returns:
            ``images`` (``id``, ``file_name``, ``height``, ``width``), ``annotations`` (``id``, ``image_id``,
            ``category_id``, ``bbox`` as x, y, width, height, ``area``, ``iscrowd`` and, with :attr:`has_masks` or
            :attr:`is_panoptic`, ``segmentation``), ``categories`` (``id``, ``name``) and an empty ``info``.

        Raises:
            BadSampleError: for a label map of a panoptic set that cannot be used.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            height, width = self.size(index)
            image_id = self.image_id(index)
            images.append(
                {"id": image_id, "file_name": self.file_name(index), "height": height, "width": width}
            )
            for annotation in self._annotations(index):
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
        return {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": category.id, "name": category.name}
                for category in self.categories
                if category.is_thing or not self.is_panoptic
            ],
        }

    def _annotations(self, index: int) -> Iterator[dict[str, Any]]:
        """COCO's annotations of an image, without ``id`` and ``image_id``."""
        raise NotImplementedError


def segments_to_objects(
    segments: Tensor, labels: Tensor, iscrowd: Tensor, things: Sequence[int]
) -> dict[str, Tensor]:
    """The objects of a panoptic truth: the segments of things that have a pixel.

    Args:
        segments: ``(H, W)``, integers: j for the j-th segment, from 1; 0 where there is none.
        labels: ``(S,)``, integers: the label of each segment.
        iscrowd: ``(S,)`` bool: segments that stand for a group.
        things: the labels whose segments are objects.

    Returns:
        ``boxes`` ``(N, 4)`` float32, XYXY in pixels around the segment's pixels (x2 is the last column + 1);
        ``labels`` ``(N,)``; ``iscrowd`` ``(N,)``; ``masks`` ``(N, H, W)`` uint8 of 0 and 1. Plain tensors, in the
        order of the segments, on the device of ``segments``.

    Raises:
        ValueError: if ``segments`` holds a number that ``labels`` does not have.

    Example:
        >>> segments = torch.tensor([[0, 1, 1], [3, 1, 1]])
        >>> labels, iscrowd = torch.tensor([7, 7, 2]), torch.tensor([False, False, False])
        >>> objects = segments_to_objects(segments, labels, iscrowd, things=[7])
        >>> objects["boxes"].tolist(), objects["masks"].tolist()
        ([[1.0, 0.0, 3.0, 2.0]], [[[0, 1, 1], [0, 1, 1]]])
    """
    segments = segments.as_subclass(Tensor).long()
    if segments.numel() and not 0 <= int(segments.min()) <= int(segments.max()) <= len(labels):
        raise ValueError(
            f"segments holds numbers from {int(segments.min())} to {int(segments.max())}, expected 0 (no truth) or "
            f"the place, from 1, of one of the {len(labels)} labels"
        )
    present = torch.bincount(segments.flatten(), minlength=len(labels) + 1)[1:] > 0
    kept = present & torch.isin(labels, torch.tensor(things, dtype=labels.dtype, device=labels.device))
    masks = segments == (kept.nonzero() + 1)[:, :, None]
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return {
        "boxes": boxes,
        "labels": labels[kept],
        "iscrowd": iscrowd[kept],
        "masks": masks.to(torch.uint8),
    }


def thing_annotations(
    segments: Tensor, labels: Tensor, iscrowd: Tensor, categories: Sequence[Category]
) -> Iterator[dict[str, Any]]:
    """COCO's annotations of the things among the segments of one image, with masks as compressed RLE.

    The arguments are those of :func:`segments_to_objects`, with the categories that the labels stand for.
    """
    mask_utils = require("pycocotools.mask", "train")
    things = [label for label, category in enumerate(categories) if category.is_thing]
    objects = segments_to_objects(segments, labels, iscrowd, things)
    for (left, top, right, bottom), label, crowd, mask in zip(
        objects["boxes"].tolist(),
        objects["labels"].tolist(),
        objects["iscrowd"].tolist(),
        objects["masks"],
        strict=True,
    ):
        rle = mask_utils.encode(np.asfortranarray(mask.numpy()))
        yield {
            "category_id": categories[label].id,
            "bbox": [left, top, right - left, bottom - top],
            "area": int(mask.sum()),
            "iscrowd": int(crowd),
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
        }


class Object(NamedTuple):
    """One checked annotation of a box, with or without a mask."""

    label: int
    bbox: tuple[float, float, float, float]
    """x, y, width and height in pixels, as stored."""
    area: float | None
    """Pixels, as stored; None stands for that of the mask or, without masks, of the box."""
    iscrowd: bool
    segmentation: "list[array[float]] | dict[str, Any] | None" = None
    """Polygons (x, y, x, y, ...), or an RLE of COCO's with counts as a list or a text."""


class Segment(NamedTuple):
    """One checked entry of a panoptic annotation."""

    id: int
    """The value of its pixels in the label map."""
    label: int
    iscrowd: bool


@dataclass(frozen=True)
class Picture:
    """The file of one image, existing or not, and what its annotations say."""

    image_id: int | str
    name: str
    path: Path
    size: tuple[int, int] | None
    """Height and width that the annotations are for, where they state them."""


@dataclass(frozen=True)
class BoxPicture(Picture):
    """An image with boxes."""

    size: tuple[int, int]
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class PanopticPicture(Picture):
    """An image with a label map."""

    label_map: Path
    segments: tuple[Segment, ...] = ()
    """Those that an annotation lists; none where only the label map tells them."""


P = TypeVar("P", bound=Picture)


class Truth(NamedTuple):
    """What a sample has from its annotations."""

    entries: dict[str, Any]
    """Those of the sample."""
    size: tuple[int, int]
    """Height and width that they are for."""
    orientation: int = 1
    """The EXIF orientation of the label map's file."""


class ObjectFiles(SampleFiles[P], ObjectDataset):
    """Base of the data sets of objects that live in files.

    A subclass lists the pictures with their checked annotations (:meth:`find`) and reads the truth of one
    (:meth:`read_truth`). For arguments and errors see :class:`~freqfusion.data.base.SampleFiles`; with ``skip_bad``
    a malformed annotation is left out alone, and :class:`BadSampleError` is raised for one without.
    """

    splits: ClassVar[tuple[str, ...]] = ()

    def read_truth(self, picture: P) -> Truth:
        """What a sample has from its annotations.

        Raises:
            BadSampleError: for files that cannot be used.
        """
        raise NotImplementedError

    def size(self, index: int) -> tuple[int, int]:
        """Height and width that the annotations state, else those in the header of the label map."""
        picture = self.entries[index]
        return picture.size or header_size(self.files(picture)[-1])

    def image_id(self, index: int) -> int | str:
        """The number or text by which annotations and results name an image."""
        return self.entries[index].image_id

    def name(self, index: int) -> str:
        """The name of an image: its file's, without the ending."""
        return self.entries[index].name

    def leave_out(self, error: BadSampleError) -> None:
        """With ``skip_bad`` say that a malformed annotation is left out; else raise its error."""
        if not self.skip_bad:
            raise error from None
        _log.warning("left out: %s", error)

    def file_name(self, index: int) -> str:
        """The name of an image with the ending of its file."""
        return self.name(index) + self.entries[index].path.suffix

    def files(self, entry: P) -> Sequence[Path]:
        """All files of a sample."""
        return [entry.path]

    def read(self, entry: P) -> Sample:
        """Read a picture and its truth."""
        picture = decode_image(entry.path)
        entries, size, orientation = self.read_truth(entry)
        image = self.in_frame(picture, entry.path, size, orientation)
        if image.shape[1:] != size and entry.size:
            raise BadSampleError(
                f"{entry.path}: is {_shown(picture.size)} pixels (width x height, upright by its EXIF orientation), "
                f"but its annotations are for {_shown(size)}. Restore the picture that was annotated, or leave the "
                "sample out with skip_bad (--skip-bad)."
            )
        if image.shape[1:] != size:
            raise _sizes_differ(self.files(entry)[-1], size, entry.path, picture.size)
        return {
            "image": tv_tensors.Image(image),
            "name": entry.name,
            "image_id": entry.image_id,
            **entries,
        }


def _sizes_differ(
    label_map: Path, map_size: tuple[int, int], path: Path, size: tuple[int, int]
) -> BadSampleError:
    return BadSampleError(
        f"{label_map}: is {_shown(map_size)} pixels, but its picture {path} is {_shown(size)}. Give them one size "
        "(resize labels with nearest neighbour), or leave the sample out with skip_bad (--skip-bad)."
    )


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


class BoxFiles(ObjectFiles[BoxPicture]):
    """Base of the data sets of boxes, with or without masks; for arguments and errors see :class:`ObjectFiles`."""

    def read_truth(self, picture: BoxPicture) -> Truth:
        """``boxes``, ``labels``, ``iscrowd`` and, with masks, ``masks``."""
        objects, size = picture.objects, picture.size
        boxes = torch.tensor([entry.bbox for entry in objects], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, size[1])
        boxes[:, 1::2].clamp_(0, size[0])
        truth: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes.float(), format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size
            ),
            "labels": torch.tensor([entry.label for entry in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([entry.iscrowd for entry in objects], dtype=torch.bool),
        }
        if self.has_masks:
            truth["masks"] = tv_tensors.Mask(decode_masks(objects, size))
        return Truth(truth, size)

    def labels(self, entry: BoxPicture) -> Iterable[int]:
        """The labels of the objects."""
        return [found.label for found in entry.objects if not found.iscrowd]

    def _annotations(self, index: int) -> Iterator[dict[str, Any]]:
        for entry in self.entries[index].objects:
            area = entry.area
            if area is None and self.has_masks:
                area = int(decode_masks([entry], self.size(index)).sum())
            annotation = {
                "category_id": self.categories[entry.label].id,
                "bbox": list(entry.bbox),
                "area": entry.bbox[2] * entry.bbox[3] if area is None else area,
                "iscrowd": int(entry.iscrowd),
            }
            if isinstance(entry.segmentation, list):
                annotation["segmentation"] = [polygon.tolist() for polygon in entry.segmentation]
            elif entry.segmentation is not None:
                annotation["segmentation"] = entry.segmentation
            yield annotation


def check_units(boxes: Sequence[Sequence[float]], path: Path) -> None:
    """Refuse boxes that are shares of the picture's sides.

    Args:
        boxes: all of a file or set, as x, y, width, height.
        path: of the file, for the error.
    """
    within = all(max(x + width, y + height) <= 1 for x, y, width, height in boxes)
    if within and not all(float(number).is_integer() for box in boxes for number in box):
        raise BadSampleError(
            f"{path}: all of its boxes lie within the first pixel, from 0 to 1: they seem to be shares of the "
            "picture's width and height. Multiply them by these: boxes are in pixels."
        )


def decode_masks(objects: Sequence[Object], size: tuple[int, int]) -> Tensor:
    """``(N, H, W)`` uint8 of 0 and 1; every object must have a segmentation."""
    if not objects:
        return torch.zeros(0, *size, dtype=torch.uint8)
    mask_utils = require("pycocotools.mask", "train")
    rles = []
    for entry in objects:
        segmentation = entry.segmentation
        if isinstance(segmentation, list):
            polygons = [polygon.tolist() for polygon in segmentation]
            rles.append(mask_utils.merge(mask_utils.frPyObjects(polygons, *size)))
        elif segmentation is not None and isinstance(segmentation["counts"], list):
            rles.append(mask_utils.frPyObjects(segmentation, *size))
        else:
            rles.append(segmentation)
    return torch.from_numpy(np.ascontiguousarray(mask_utils.decode(rles).transpose(2, 0, 1)))


class PanopticFiles(ObjectFiles[PanopticPicture]):
    """Base of the panoptic data sets in files; for arguments and errors see :class:`ObjectFiles`."""

    is_panoptic = True

    def files(self, entry: PanopticPicture) -> Sequence[Path]:
        """The picture and its label map."""
        return [entry.path, entry.label_map]

    def read_segments(self, picture: PanopticPicture) -> tuple[Decoded, Sequence[Segment]]:
        """The segments of a picture, and ``(H, W)`` integers: j on the j-th of them, from 1, else 0.

        Raises:
            BadSampleError: for files that cannot be used.
        """
        raise NotImplementedError

    def read_truth(self, picture: PanopticPicture) -> Truth:
        """``segments``, ``labels`` and ``iscrowd``."""
        numbers, segments = self.read_segments(picture)
        if picture.size and numbers.size != picture.size:
            raise _sizes_differ(picture.label_map, numbers.size, picture.path, picture.size)
        entries = {
            "segments": tv_tensors.Mask(numbers.pixels.to(torch.int32)),
            "labels": torch.tensor([segment.label for segment in segments], dtype=torch.int64),
            "iscrowd": torch.tensor([segment.iscrowd for segment in segments], dtype=torch.bool),
        }
        return Truth(entries, numbers.size, numbers.orientation)

    def labels(self, entry: PanopticPicture) -> Iterable[int]:
        """The labels of the segments, from the annotation where it lists them."""
        segments = entry.segments or self.read_segments(entry)[1]
        return [segment.label for segment in segments if not segment.iscrowd]

    def _annotations(self, index: int) -> Iterator[dict[str, Any]]:
        return thing_annotations(**self.read_truth(self.entries[index]).entries, categories=self.categories)


def number_segments(stored: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Turn a stored label map into the numbers of its segments.

    Args:
        stored: ``(H, W)`` int64, ids of segments or other values.
        segments: S of them, with different ids.

    Returns:
        ``(H, W)`` int64: j on the j-th segment, from 1, and 0 elsewhere.

    Example:
        >>> number_segments(torch.tensor([[7, 0], [3, 7]]), [Segment(7, 0, False), Segment(3, 1, False)]).tolist()
        [[1, 0], [2, 1]]
    """
    if not segments:
        return torch.zeros_like(stored)
    rising, order = torch.tensor([segment.id for segment in segments]).sort()
    place = torch.searchsorted(rising, stored).clamp_(max=len(segments) - 1)
    return torch.where(rising[place] == stored, order[place] + 1, 0)
