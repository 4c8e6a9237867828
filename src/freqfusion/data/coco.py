"""COCO: instance and panoptic annotations, of COCO itself and of any folder in its format."""

import json
import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch

from freqfusion._rle import run_lengths
from freqfusion._text import readable
from freqfusion.data.base import voc_colour
from freqfusion.data.images import BadSampleError, Decoded, decode_image
from freqfusion.data.objects import (
    BoxFiles,
    BoxPicture,
    Category,
    Object,
    ObjectFiles,
    P,
    PanopticFiles,
    PanopticPicture,
    Segment,
    check_units,
    decode_masks,
    number_segments,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")
Entry = dict[str, Any]
ImageId = int | str

_IMAGES = (
    "{split}2017",
    "images/{split}2017",
    "{split}/images",
    "{split}",
    "images/{split}",
    "images",
    "JPEGImages",
    ".",
)
_FAR = 1e9
"""Larger than any number of a box; a comparison with it refuses infinity and NaN too."""
_LEAST_SIDE = 0.01
"""Pixels; sides of boxes below this count as zero, since float32 may not tell their ends apart."""
_REACH = 10
"""How many picture sizes a polygon may reach out: drawing it takes memory in proportion."""


class _WrongError(ValueError):
    """What is wrong with an entry of a file, in words that follow its name."""


class _Image(NamedTuple):
    """One checked entry of the images."""

    file_name: str
    name: str
    size: tuple[int, int]


class _CocoFiles(ObjectFiles[P]):
    """What both kinds of COCO annotations share: finding the files, categories and images."""

    json_files: ClassVar[tuple[str, ...]]
    """Where the annotations may be, below the root."""

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        skip_bad: bool = False,
        annotations: str | None = None,
        images: str | None = None,
    ) -> None:
        self._annotations_option = annotations
        self._images_option = images
        super().__init__(root, split, skip_bad=skip_bad)

    def _below_root(self, pattern: str) -> Path:
        return Path(self.root, pattern.replace("{split}", self.split))

    def _require(
        self,
        what: str,
        exists: Callable[[Path], bool],
        option: str | None,
        paths: Sequence[Path] = (),
    ) -> Path:
        """The path that the option names, or else the first of ``paths`` that exists."""
        if option is not None:
            paths = [self._below_root(option)]
        found = next(filter(exists, paths), None)
        if found is None:
            raise FileNotFoundError(
                f"no {what}: there is no {' and no '.join(map(str, paths))}. {self.layout}"
            )
        return found

    def _read_json(self) -> Entry:
        """The content of the annotation file, with its path and categories taken over."""
        paths = [self._below_root(pattern) for pattern in self.json_files]
        path = self.json_path = self._require(
            "annotation file", Path.is_file, self._annotations_option, paths
        )
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BadSampleError(
                f"{path}: cannot be read as JSON ({error}). The file is truncated, damaged, not in UTF-8 or of "
                "another kind; save it as UTF-8, or replace it with a good copy."
            ) from error
        keys = ("images", "annotations", "categories")
        if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
            held = f"an object with {_short(sorted(content))}" if isinstance(content, dict) else "no object"
            raise BadSampleError(
                f"{path}: holds {held}, expected an object with the lists {', '.join(keys)}, as COCO's annotation "
                "files are. Name the right file with the option annotations."
            )
        self.categories = self._read_categories(content["categories"])
        self._labels = {category.id: label for label, category in enumerate(self.categories)}
        return content

    def _read_categories(self, entries: list[Any]) -> tuple[Category, ...]:
        found: dict[int, Entry] = {}

        def check(entry: Entry) -> Entry:
            category_id = entry.get("id")
            if type(category_id) is not int or type(entry.get("name")) is not str:
                raise _WrongError("must have an id (a whole number) and a name (text)")
            if entry.get("isthing", 1) not in (0, 1):
                raise _WrongError(f"has isthing {_short(entry['isthing'])}, expected 0 or 1")
            if category_id in found:
                raise _WrongError("has an id that a category before it has")
            return entry

        for entry in self._checked("categories", entries, check, may_skip=False):
            found[entry["id"]] = entry
        if not found:
            raise BadSampleError(f"{self.json_path}: lists no category, expected at least one.")
        times = Counter(entry["name"] for entry in found.values())
        return tuple(
            Category(
                category_id,
                readable(entry["name"], None) + (f" (id {category_id})" if times[entry["name"]] > 1 else ""),
                bool(entry.get("isthing", 1)),
                _colour(entry.get("color")) or voc_colour(number),
            )
            for number, (category_id, entry) in enumerate(sorted(found.items()), 1)
        )

    def _read_images(self, entries: list[Any]) -> dict[ImageId, _Image]:
        images: dict[ImageId, _Image] = {}

        def check(entry: Entry) -> tuple[ImageId, _Image]:
            image_id, file_name = _id(entry, "id"), _file_name(entry)
            if image_id in images:
                raise _WrongError("has an id that an image before it has")
            height, width = _pixels(entry.get("height")), _pixels(entry.get("width"))
            if height is None or width is None:
                sides = f"height {_short(entry.get('height'))} and width {_short(entry.get('width'))}"
                raise _WrongError(f"has {sides}, expected whole numbers of pixels")
            return image_id, _Image(file_name, str(PurePosixPath(file_name).with_suffix("")), (height, width))

        for image_id, image in self._checked("images", entries, check):
            images[image_id] = image
        return images

    def _checked(
        self, part: str, entries: list[Any], check: Callable[[Entry], T], may_skip: bool = True
    ) -> Iterator[T]:
        """What ``check`` makes of each entry; those it refuses are errors or, with ``skip_bad``, left out."""
        for index, entry in enumerate(entries):
            try:
                if type(entry) is not dict:
                    raise _WrongError(f"is {_short(entry)}, expected an object")
                yield check(entry)
            except _WrongError as problem:
                known = entry if type(entry) is dict else {}
                ids = [f"{key} {_short(known[key])}" for key in ("id", "image_id") if key in known]
                place = f"{self.json_path}: {part}[{index}]" + (f" ({', '.join(ids)})" if ids else "")
                if not may_skip:
                    raise BadSampleError(f"{place} {problem}. Correct it.") from None
                self.leave_out(
                    BadSampleError(
                        f"{place} {problem}. Correct it, or leave it out with skip_bad (--skip-bad)."
                    )
                )

    def _any_left(self, content: Entry, kept: Collection[ImageId]) -> bool:
        if content["images"] and not kept:
            raise BadSampleError(
                f"{self.json_path}: none of its {len(content['images'])} images can be used; see the warnings, or "
                "leave out skip_bad to see the first error."
            )
        return bool(kept)

    def _label(self, entry: Entry) -> int:
        category_id = entry.get("category_id")
        if type(category_id) is not int or category_id not in self._labels:
            raise _WrongError(
                f"has the category_id {_short(category_id)}, which is none of the file's categories"
            )
        return self._labels[category_id]

    def _find_pictures(self, images: Iterable[_Image]) -> Callable[[str], Path]:
        """A function from the file name of a picture to its path, in the folder that holds the first one found.

        A file that is not there gives way to one whose name differs in its ending, case or normal form alone.
        """
        if self._images_option is not None:
            folder = self._require("folder of pictures", Path.is_dir, self._images_option)
            return lambda file_name: self._present(folder / file_name)
        file_names = [image.file_name for image in images]
        for exact_or_near, file_name, path_of in product((Path, self._present), file_names, self._ways()):
            if exact_or_near(path_of(file_name)).is_file():
                return lambda file_name: self._present(path_of(file_name))
        searched = ", ".join(str(self._below_root(pattern)) for pattern in _IMAGES)
        raise FileNotFoundError(
            f"no pictures: {file_names[0]} and the other files of {self.json_path} are in none of the folders "
            f"{searched}. Name theirs with the option images. {self.layout}"
        )

    def _present(self, path: Path) -> Path:
        return path if path.is_file() else self.file(path.parent, path.stem, path.suffix, any_case=True)

    def _ways(self) -> list[Callable[[str], Path]]:
        """Functions from the file name of a picture to where it may be."""
        return [self._below_root(pattern).joinpath for pattern in _IMAGES]


class CocoInstances(_CocoFiles[BoxPicture], BoxFiles):
    """Boxes, and masks where there are some, of COCO and of any data in its format.

    The annotations are ``annotations/instances_<split>2017.json``, ``annotations/instances_<split>.json``,
    ``instances_<split>.json``, ``<split>/instances.json`` or ``<split>/_annotations.coco.json``, the first that
    exists. The pictures are in ``<split>2017``, ``images/<split>2017``, ``<split>/images``, ``<split>``,
    ``images/<split>``, ``images``, ``JPEGImages`` or the root itself, the first that holds the first picture listed.
    Lin et al., "Microsoft COCO: common objects in context", ECCV 2014; cocodataset.org/#format-data.

    Every entry is checked at the start, in one pass. Boxes of no width or height, which published sets contain, are
    left out with one warning. Labels follow the rising ids of the categories.

    Args:
        root: folder of the data.
        split: fills the place of ``<split>``: ``"train"``, ``"val"``, or what the files are named after.
        skip_bad: see :class:`~freqfusion.data.objects.ObjectFiles`, also for the errors.
        annotations: the JSON file, relative to the root or absolute; ``{split}`` in it is replaced by the split.
        images: the folder of the pictures, given in the same way.
        with_masks: whether to read masks; None reads them if there is an annotation with a segmentation.
        skip_empty: leave out pictures without an object that is no crowd, as detectors are trained.
    """

    layout: ClassVar[str] = (
        "COCO expects ROOT/annotations/instances_<split>2017.json and ROOT/<split>2017/*.jpg; other folders in its "
        "format may have instances_<split>.json in ROOT/annotations or ROOT, or instances.json or "
        "_annotations.coco.json in ROOT/<split>, or name their files with the options annotations and images "
        '("{split}" in them is replaced).'
    )
    json_files = (
        "annotations/instances_{split}2017.json",
        "annotations/instances_{split}.json",
        "instances_{split}.json",
        "{split}/instances.json",
        "{split}/_annotations.coco.json",
    )

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        skip_bad: bool = False,
        annotations: str | None = None,
        images: str | None = None,
        with_masks: bool | None = None,
        skip_empty: bool = False,
    ) -> None:
        self._with_masks = with_masks
        self._skip_empty = skip_empty
        super().__init__(root, split, skip_bad=skip_bad, annotations=annotations, images=images)

    def find(self) -> list[BoxPicture]:
        """Every picture that the file lists, in its order, without the empty ones if so chosen."""
        content = self._read_json()
        images = self._read_images(content["images"])
        objects = self._read_objects(content, images)
        if self._skip_empty:
            objects = {
                key: entries for key, entries in objects.items() if not all(e.iscrowd for e in entries)
            }
            if images and not objects:
                raise BadSampleError(
                    f"{self.json_path}: none of its {len(images)} pictures has an object that is no crowd, and "
                    "skip_empty leaves such pictures out. Is it the right file?"
                )
        if not self._any_left(content, objects):
            return []
        path_of = self._find_pictures(images[image_id] for image_id in objects)
        return [
            BoxPicture(image_id, image.name, path_of(image.file_name), image.size, tuple(entries))
            for image_id, entries in objects.items()
            for image in (images[image_id],)
        ]

    def _read_objects(self, content: Entry, images: dict[ImageId, _Image]) -> dict[ImageId, list[Object]]:
        entries = content["annotations"]
        if self._with_masks is None:
            self.has_masks = any(
                type(entry) is dict and _has_mask(entry.get("segmentation")) for entry in entries
            )
        else:
            self.has_masks = self._with_masks
        listed = _listed_ids(content["images"])
        objects: dict[ImageId, list[Object]] = {image_id: [] for image_id in images}
        empty: dict[str, list[Any]] = {
            "box(es) of no width or height": [],
            "object(s) whose mask has no pixel": [],
        }

        def check(entry: Entry) -> None:
            image_id = _id(entry, "image_id")
            if image_id not in images:
                if image_id in listed:  # the image's own entry was left out
                    return
                raise _WrongError("belongs to no image of the file")
            size = images[image_id].size
            label, bbox, crowd = self._label(entry), _bbox(entry.get("bbox"), size), _flag(entry, "iscrowd")
            no_box, no_mask = empty.values()
            if bbox is None:
                no_box.append(entry.get("id"))
                return
            segmentation = _segmentation(entry.get("segmentation"), size) if self.has_masks else None
            found = Object(label, bbox, _area(entry), crowd, segmentation)
            suspect = segmentation is not None and _may_be_empty(segmentation, size)
            if suspect and not decode_masks([found], size).any():
                no_mask.append(entry.get("id"))
            else:
                objects[image_id].append(found)

        for _ in self._checked("annotations", entries, check):
            pass
        for what, ids in empty.items():
            if ids:
                _log.warning(
                    "%s: left out %d %s, the first in the annotation %r",
                    self.json_path,
                    len(ids),
                    what,
                    ids[0],
                )
        check_units([found.bbox for some in objects.values() for found in some], self.json_path)
        return objects


class CocoPanoptic(_CocoFiles[PanopticPicture], PanopticFiles):
    """Panoptic segments of COCO and of any data in its format.

    The annotations are ``annotations/panoptic_<split>2017.json``, ``annotations/panoptic_<split>.json``,
    ``panoptic_<split>.json`` or ``gtFine/cityscapes_panoptic_<split>.json``, the first that exists; the label maps
    are PNGs in the folder of the same name without the ending, beside the file or in the root. The pictures are
    found as those of :class:`CocoInstances`, or in the folders of Cityscapes, ``leftImg8bit/<split>/<city>``.
    Kirillov et al., "Panoptic segmentation", CVPR 2019; cocodataset.org/#format-data.

    A pixel of colour (R, G, B) belongs to the segment R + 256 G + 65536 B, 0 is void. When a sample is read, its
    label map must hold the segments that its annotation lists, all of them and no other.

    Args:
        root: folder of the data.
        split: fills the place of ``<split>``.
        skip_bad: see :class:`~freqfusion.data.objects.ObjectFiles`, also for the errors. A picture whose annotation
            is malformed or missing is left out.
        annotations: the JSON file, relative to the root or absolute; ``{split}`` in it is replaced by the split.
        images: the folder of the pictures, given in the same way.
        segments: the folder of the label maps, given in the same way.
    """

    layout: ClassVar[str] = (
        "COCO panoptic expects ROOT/annotations/panoptic_<split>2017.json, "
        "ROOT/annotations/panoptic_<split>2017/*.png and ROOT/<split>2017/*.jpg; other folders in its format may "
        "have panoptic_<split>.json beside panoptic_<split>/*.png in ROOT/annotations or ROOT, or "
        "cityscapes_panoptic_<split>.json in ROOT/gtFine, or name their files with the options annotations, "
        'segments and images ("{split}" in them is replaced).'
    )
    json_files = (
        "annotations/panoptic_{split}2017.json",
        "annotations/panoptic_{split}.json",
        "panoptic_{split}.json",
        "gtFine/cityscapes_panoptic_{split}.json",
    )

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        skip_bad: bool = False,
        annotations: str | None = None,
        images: str | None = None,
        segments: str | None = None,
    ) -> None:
        self._segments_option = segments
        super().__init__(root, split, skip_bad=skip_bad, annotations=annotations, images=images)

    def find(self) -> list[PanopticPicture]:
        """Every picture that the file lists, in its order."""
        content = self._read_json()
        images = self._read_images(content["images"])
        beside = self.json_path.with_suffix("")
        folder = self._require(
            "folder of label maps", Path.is_dir, self._segments_option, (beside, self.root / beside.name)
        )
        listed = _listed_ids(content["images"])
        truths: dict[ImageId, tuple[Path, tuple[Segment, ...]]] = {}

        def check(entry: Entry) -> None:
            image_id = _id(entry, "image_id")
            if image_id in truths:
                raise _WrongError("belongs to an image that an annotation before it has")
            if image_id not in images:
                if image_id in listed:  # the image's own entry was left out
                    return
                raise _WrongError("belongs to no image of the file")
            truths[image_id] = (
                self._present(folder / _file_name(entry)),
                self._segments(entry.get("segments_info")),
            )

        for _ in self._checked("annotations", content["annotations"], check):
            pass
        for image_id, image in images.items():
            if image_id not in truths:
                self.leave_out(
                    BadSampleError(
                        f"{self.json_path}: the image {image_id!r} ({image.file_name}) has no annotation that can be "
                        "used. Add it, or leave the image out with skip_bad (--skip-bad)."
                    )
                )
        images = {image_id: image for image_id, image in images.items() if image_id in truths}
        if not self._any_left(content, images):
            return []
        path_of = self._find_pictures(images.values())
        return [
            PanopticPicture(image_id, image.name, path_of(image.file_name), image.size, *truths[image_id])
            for image_id, image in images.items()
        ]

    def _segments(self, entries: Any) -> tuple[Segment, ...]:
        if type(entries) is not list:
            raise _WrongError(f"has the segments_info {_short(entries)}, expected a list")
        segments: dict[int, Segment] = {}
        for entry in entries:
            if type(entry) is not dict:
                raise _WrongError(f"has the segment {_short(entry)}, expected an object")
            segment_id = entry.get("id")
            if type(segment_id) is not int or not 0 < segment_id < 256**3:
                raise _WrongError(
                    f"has a segment with the id {_short(segment_id)}, expected 1 to {256**3 - 1}"
                )
            if segment_id in segments:
                raise _WrongError(f"has two segments with the id {segment_id}")
            try:
                segments[segment_id] = Segment(segment_id, self._label(entry), _flag(entry, "iscrowd"))
            except _WrongError as error:
                raise _WrongError(f"has a segment (id {segment_id}) that {error}") from None
        return tuple(segments.values())

    def read_segments(self, picture: PanopticPicture) -> tuple[Decoded, Sequence[Segment]]:
        """The segments of a picture, and ``(H, W)`` int64: j on the j-th of them, from 1, and 0 on void."""
        label_map = decode_image(picture.label_map)
        colours = label_map.pixels.long()
        stored = colours[0] + 256 * colours[1] + 65536 * colours[2]
        numbers = number_segments(stored, picture.segments)
        strange = stored[(numbers == 0) & (stored != 0)].unique().tolist()
        absent = (torch.bincount(numbers.flatten(), minlength=len(picture.segments) + 1)[1:] == 0).tolist()
        missing = [segment.id for segment, gone in zip(picture.segments, absent, strict=True) if gone]
        if strange or missing:
            problems = [
                f"{words} {', '.join(map(str, ids[:10]))}{', ...' if len(ids) > 10 else ''}"
                for words, ids in (
                    ("it holds segments that are not listed:", strange),
                    ("listed segments have no pixel in it:", missing),
                )
                if ids
            ]
            raise BadSampleError(
                f"{picture.label_map}: does not fit the annotation of the image {picture.image_id!r} in "
                f"{self.json_path}; {'; '.join(problems)}. Was it resized, or saved with loss? Restore it, or "
                "leave the sample out with skip_bad (--skip-bad)."
            )
        return Decoded(numbers, label_map.orientation), picture.segments

    def _ways(self) -> list[Callable[[str], Path]]:
        def in_city(file_name: str) -> Path:
            city = file_name.partition("_")[0]
            # the benchmark's own conversion names the pictures frame_gtFine_leftImg8bit.png
            return self._below_root("leftImg8bit/{split}") / city / file_name.replace("_gtFine", "")

        return [*super()._ways(), in_city]


def _listed_ids(entries: list[Any]) -> set[ImageId]:
    """The ids of all images of a file, also of those that were left out."""
    return {entry["id"] for entry in entries if type(entry) is dict and type(entry.get("id")) in (int, str)}


def _pixels(side: Any) -> int | None:
    """A length in pixels, which some tools write as 48.0; None for anything else."""
    whole = type(side) is int or (type(side) is float and side.is_integer())
    return int(side) if whole and 1 <= side < _FAR else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _id(entry: Entry, key: str) -> ImageId:
    value = entry.get(key)
    if type(value) is not int and type(value) is not str:
        raise _WrongError(f"has the {key} {_short(value)}, expected a whole number or text")
    return value


def _file_name(entry: Entry) -> str:
    value = entry.get("file_name")
    if type(value) is not str or not PurePosixPath(value).name:
        raise _WrongError(f"has the file_name {_short(value)}, expected the name of a file")
    path = PurePosixPath(value)
    if any(len(part.encode(errors="replace")) > 255 for part in path.parts):
        raise _WrongError(f"has the file_name {_short(value)}, longer than a file's name can be")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _WrongError(f"has the file_name {_short(value)}, which is not text")
    if path.is_absolute() or ".." in path.parts:
        raise _WrongError(f"has the file_name {value!r}, expected a path below the folder of the files")
    return value


def _flag(entry: Entry, key: str) -> bool:
    value = entry.get(key, 0)
    if value not in (0, 1):
        raise _WrongError(f"has {key} {_short(value)}, expected 0 or 1")
    return bool(value)


def _colour(value: Any) -> tuple[int, int, int] | None:
    """Three numbers from 0 to 255, or None for anything else (some tools write colours as text)."""
    if (
        type(value) is list
        and len(value) == 3
        and all(type(part) is int and 0 <= part < 256 for part in value)
    ):
        return value[0], value[1], value[2]
    return None


def _area(entry: Entry) -> float | None:
    value = entry.get("area")
    if value is not None and not (type(value) in (int, float) and 0 <= value < _FAR**2):
        raise _WrongError(f"has the area {_short(value)}, expected a number of pixels")
    return value


def _bbox(value: Any, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """x, y, width and height, or None for a box of no width or height."""
    if (
        type(value) is not list
        or len(value) != 4
        or not all(type(number) in (int, float) and -_FAR < number < _FAR for number in value)
    ):
        raise _WrongError(f"has the bbox {_short(value)}, expected four finite numbers: x, y, width, height")
    x, y, width, height = value
    if width < 0 or height < 0:
        raise _WrongError(
            f"has the bbox {value}, whose width or height is negative; it is x, y, width, height"
        )
    if width < _LEAST_SIDE or height < _LEAST_SIDE:
        return None
    inside = min(x + width, size[1]) - max(x, 0), min(y + height, size[0]) - max(y, 0)
    if min(inside) < _LEAST_SIDE:
        raise _WrongError(f"has the bbox {value}, which lies outside its image of {size[1]}x{size[0]} pixels")
    return x, y, width, height


def _has_mask(value: Any) -> bool:
    """Whether it is more than one of the ways in which tools write that there is no mask.

    These are null, [], [[]], [null], {}, an RLE whose counts are null or [], and the texts "", "null" and "[]".
    """
    if type(value) is list:
        return any(part not in (None, [], [None]) for part in value)
    if type(value) is dict:
        return bool(value) and value.get("counts", "") not in (None, [])
    return bool(value) and value not in ("null", "[]")


def _may_be_empty(segmentation: "list[array[float]] | Entry", size: tuple[int, int]) -> bool:
    """Whether a mask may have no pixel: thin polygons, those outside the picture, and RLE of zeros."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return not any((run_lengths(counts) if isinstance(counts, str) else counts)[1::2])
    for polygon in segmentation:
        points = np.frombuffer(polygon).reshape(-1, 2)
        xs, ys = points.T
        (left, top), (right, bottom) = points.min(0), points.max(0)
        doubled = xs[:-1] @ ys[1:] - ys[:-1] @ xs[1:] + xs[-1] * ys[0] - ys[-1] * xs[0]
        outside = right <= 0 or bottom <= 0 or left >= size[1] or top >= size[0]
        if (
            abs(doubled) >= 4 * max(right - left, bottom - top, 1) and not outside
        ):  # so thick that it has a pixel
            return False
    return True


def _segmentation(value: Any, size: tuple[int, int]) -> "list[array[float]] | Entry":
    if not _has_mask(value):
        raise _WrongError(
            "has no segmentation, though others have; to read boxes alone, set with_masks to false"
        )
    if type(value) is list:
        if all(type(number) in (int, float) for number in value):
            raise _WrongError(
                f"has the segmentation {_short(value)}, a polygon where a list of polygons is expected; put it into "
                "a list of its own: [[x, y, x, y, ...]]"
            )
        return [_polygon(polygon, size) for polygon in value if _has_mask(polygon)]
    if type(value) is not dict:
        raise _WrongError(f"has the segmentation {_short(value)}, expected polygons or an RLE")
    stated, counts = value.get("size"), value.get("counts")
    if stated != list(size):
        raise _WrongError(
            f"has an RLE of size {_short(stated)}, but its image is {list(size)} (height, width); encode it at "
            "the size of the image"
        )
    if type(counts) is str:
        try:
            runs = run_lengths(counts)
        except ValueError:
            runs = []
    elif type(counts) is list and all(type(run) is int for run in counts):
        runs = counts
    else:
        raise _WrongError("has an RLE whose counts are neither a text nor a list of whole numbers")
    if min(runs, default=-1) < 0 or sum(runs) != size[0] * size[1]:
        raise _WrongError(
            f"has an RLE whose runs do not cover the {size[0] * size[1]} pixels of its image; the text is cut off or "
            "damaged"
        )
    return {"size": list(size), "counts": counts}


def _polygon(value: Any, size: tuple[int, int]) -> "array[float]":
    try:
        if type(value) is not list:
            raise TypeError
        polygon = array("d", value)
    except (TypeError, OverflowError):
        raise _WrongError(f"has the polygon {_short(value)}, expected a list of numbers") from None
    if len(polygon) < 6 or len(polygon) % 2:
        raise _WrongError(f"has a polygon of {len(polygon)} numbers, expected x, y of at least three points")
    reach = _REACH * max(size)
    if not (math.isfinite(sum(polygon)) and -reach <= min(polygon) and max(polygon) <= reach):
        raise _WrongError(
            f"has a polygon that is not finite or reaches far out of its image of {size[1]}x{size[0]} pixels"
        )
    return polygon
