"""A plain folder of images and masks, for data of one's own."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from freqfusion.data.base import FileDataset, Pair, Palette, voc_colour

_log = logging.getLogger(__name__)

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class ImageFolder(FileDataset):
    """Images and masks of the same names, and a list of classes.

    ``root/<split>/images`` and ``root/<split>/masks``, or, for data without splits, ``root/images`` and
    ``root/masks`` (every split is then the whole folder, and a warning says so). A mask is a PNG, or another
    lossless format, whose values are class indices, 255 where there is no truth. ``root/classes.txt`` holds
    one class a line in the order of the indices, each with an optional colour: ``name`` or
    ``name red green blue``. For arguments and errors see :class:`~freqfusion.data.base.FileDataset`.
    """

    layout: ClassVar[str] = (
        "A folder dataset expects ROOT/classes.txt with one class a line (NAME or NAME RED GREEN BLUE), and "
        "ROOT/<split>/images and ROOT/<split>/masks (or ROOT/images and ROOT/masks) with files of the same "
        "names."
    )

    def __init__(self, root: str | Path, split: str, *, skip_bad: bool = False) -> None:
        self.root = Path(root)
        if self.root.is_dir():  # else the base class says what is missing
            self.classes, self.palette = self._read_classes(self.root / "classes.txt")
            self.values = {**{index: index for index in range(len(self.classes))}, 255: 255}
        super().__init__(root, split, skip_bad=skip_bad)

    def find(self) -> Iterator[Pair]:
        """Every name with an image or a mask."""
        top = self.root / self.split
        if not top.is_dir() and (self.root / "images").is_dir():
            _log.warning(
                "%s: no such folder; the split %r is all of %s", top, self.split, self.root / "images"
            )
            top = self.root
        images = self._by_name(self.require_folder(top / "images"))
        masks = self._by_name(self.require_folder(top / "masks"))
        for name in sorted(images | masks):
            yield Pair(
                name,
                images.get(name, top / "images" / f"{name}.png"),
                masks.get(name, top / "masks" / f"{name}.png"),
            )

    def _by_name(self, folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in _SUFFIXES or path.name.startswith("."):
                continue
            if path.stem in found:
                raise ValueError(
                    f"{path}: has the name of {found[path.stem]} too; keep one of them, or rename one "
                    "with its mask"
                )
            found[path.stem] = path
        return found

    def _read_classes(self, path: Path) -> tuple[tuple[str, ...], Palette]:
        names, colours = [], []
        for index, line in enumerate(self.read_lines(path)):
            match = re.fullmatch(r"(.*\S)\s+(\d+)\s+(\d+)\s+(\d+)", line)
            colour = tuple(int(part) for part in match.groups()[1:]) if match else voc_colour(index)
            if max(colour) > 255:
                raise ValueError(f"{path}: the colour in {line!r} must be three numbers from 0 to 255")
            names.append(match[1] if match else line)
            colours.append((colour[0], colour[1], colour[2]))
        if not 1 <= len(names) <= 255:
            raise ValueError(f"{path}: lists {len(names)} classes, expected 1 to 255, one a line")
        return tuple(names), tuple(colours)
