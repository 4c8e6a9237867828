"""Pascal VOC's boxes: one XML file an image."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple
from xml.etree import ElementTree

from freqfusion.data.base import voc_colour
from freqfusion.data.images import BadSampleError
from freqfusion.data.objects import BoxFiles, BoxPicture, Category, Object, check_units
from freqfusion.data.voc import PascalVOC

_log = logging.getLogger(__name__)


class VOCBoxes(BoxFiles):
    """Boxes in the form of Pascal VOC, of VOC itself and of data of one's own.

    ``ImageSets/Main/<split>.txt``, ``Annotations/NAME.xml`` and ``JPEGImages/NAME.jpg`` (or ``.jpeg``, ``.png``) in
    ``root``, ``root/VOC2012`` or ``root/VOCdevkit/VOC2012``. Corners are 1-based and inclusive: the box is
    ``(xmin - 1, ymin - 1, xmax, ymax)``, clipped to the picture. Difficult objects count as crowds, which are neither
    trained on nor scored. Boxes of no width or height are left out with one warning. The image ids are the
    names in the split's list. Everingham et al., "The Pascal visual object classes (VOC) challenge", IJCV 2010.

    Args:
        root: folder of the data.
        split: ``"train"``, ``"val"`` or ``"test"``, or what the list is named.
        skip_bad: see :class:`~freqfusion.data.objects.ObjectFiles`, also for the errors.
        classes: the names of the objects in the order of the labels; None stands for the 20 classes of VOC.

    Raises:
        ValueError: if an object has another name; the message lists the names found.
    """

    layout: ClassVar[str] = (
        "A VOC folder of boxes expects ROOT/ImageSets/Main/<split>.txt, ROOT/Annotations/*.xml and "
        "ROOT/JPEGImages/*.jpg, or the same below ROOT/VOCdevkit/VOC2012 (VOCtrainval_11-May-2012.tar, unpacked)."
    )

    def __init__(
        self, root: str | Path, split: str, *, skip_bad: bool = False, classes: Sequence[str] | None = None
    ) -> None:
        names = PascalVOC.classes[1:] if classes is None else tuple(classes)
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"classes must be at least one name, each once, got {list(names)}")
        self.categories = tuple(
            Category(number, name, True, voc_colour(number)) for number, name in enumerate(names, 1)
        )
        super().__init__(root, split, skip_bad=skip_bad)

    def find(self) -> list[BoxPicture]:
        """The samples of the split's list."""
        tops = (self.root, self.root / "VOC2012", self.root / "VOCdevkit" / "VOC2012")
        top = next((top for top in tops if (top / "ImageSets").is_dir()), self.root)
        list_path = top / "ImageSets" / "Main" / f"{self.split}.txt"
        names = list(dict.fromkeys(self.read_lines(list_path)))
        annotations: list[tuple[str, _Annotation]] = []
        for name in names:
            try:
                path = self.file(top / "Annotations", name, ".xml", endings=(".xml",), any_case=True)
                annotations.append((name, self._read_xml(path)))
            except BadSampleError as error:
                self.leave_out(error)
        if names and not annotations:
            raise BadSampleError(
                f"{list_path}: none of its samples can be used; see the warnings, or leave out skip_bad to see the "
                "first error."
            )
        labels = self._labels_of({entry.name for _, found in annotations for entry in found.objects})
        empty = [path for _, found in annotations for path in [found.path] * found.empty]
        if empty:
            _log.warning(
                "%s: left out %d box(es) of no width or height, the first of %s",
                list_path,
                len(empty),
                empty[0],
            )
        pictures = []
        for name, found in annotations:
            path = self.file(top / "JPEGImages", name, ".jpg", any_case=True)
            objects = tuple(
                Object(labels[entry.name], entry.bbox, None, entry.is_difficult) for entry in found.objects
            )
            pictures.append(BoxPicture(name, name, path, found.size, objects))
        check_units([found.bbox for picture in pictures for found in picture.objects], list_path)
        return pictures

    def _labels_of(self, found: set[str]) -> dict[str, int]:
        labels = {name: label for label, name in enumerate(self.classes)}
        unknown = sorted(found - set(labels))
        if unknown:
            raise ValueError(
                f"{self.root}: objects of the split {self.split!r} have the names {', '.join(sorted(found))}, but "
                f"{', '.join(unknown)} are not among the classes {', '.join(labels)}. Give all names in the order of "
                f"the labels, with the option classes, for instance classes={sorted(found)}."
            )
        return labels

    def _read_xml(self, path: Path) -> "_Annotation":
        if not path.is_file():
            raise BadSampleError(
                f"{path}: missing. Restore it, or remove the sample from the list, or leave such samples out with "
                "skip_bad (--skip-bad)."
            )
        try:
            root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise BadSampleError(
                f"{path}: cannot be read as XML ({error}). The file is truncated, damaged, of another kind, or not "
                "in the encoding that its first line declares (UTF-8 if none); save it as UTF-8, or replace it with "
                "a good copy."
            ) from error
        try:
            sides = [_number(root, f"size/{key}") for key in ("height", "width")]
            if min(sides) < 1 or not all(side.is_integer() for side in sides):
                raise ValueError(f"has the height and width {sides}, expected numbers of pixels")
        except ValueError as error:
            raise BadSampleError(
                f"{path}: {error}. Correct it, or leave the sample out with skip_bad."
            ) from None
        height, width = int(sides[0]), int(sides[1])
        objects, empty = [], 0
        for number, element in enumerate(root.findall("object"), 1):
            try:
                entry = _object(element, height, width)
            except ValueError as error:
                self.leave_out(
                    BadSampleError(
                        f"{path}: object {number} {error}. Correct it, or leave it out with skip_bad (--skip-bad)."
                    )
                )
                continue
            if entry is None:
                empty += 1
            else:
                objects.append(entry)
        return _Annotation(path, (height, width), objects, empty)


class _NamedBox(NamedTuple):
    name: str
    bbox: tuple[float, float, float, float]
    is_difficult: bool


class _Annotation(NamedTuple):
    """The checked content of one XML file."""

    path: Path
    size: tuple[int, int]
    objects: list[_NamedBox]
    empty: int
    """How many boxes have no width or height."""


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses the declarations by which a small XML file can grow without bounds."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type declaration, which annotations do not need")


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9:
        raise ValueError(f"has {path} {text!r}, expected a number")
    return value


def _object(element: ElementTree.Element, height: int, width: int) -> _NamedBox | None:
    """A checked object, or None if its corners coincide in x or y."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("has no name")
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"has difficult {difficult!r}, expected 0 or 1")
    left, top, right, bottom = (_number(element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
    corners = f"has a box from ({left:g}, {top:g}) to ({right:g}, {bottom:g})"
    if right < left or bottom < top:
        raise ValueError(f"{corners}, whose width or height is negative")
    if right == left or bottom == top:
        return None
    x1, y1, x2, y2 = max(left - 1, 0), max(top - 1, 0), min(right, width), min(bottom, height)
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"{corners}, which lies outside its image of {width}x{height} pixels")
    return _NamedBox(name, (x1, y1, x2 - x1, y2 - y1), difficult == "1")
