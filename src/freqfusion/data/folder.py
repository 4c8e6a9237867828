"""A plain folder of images and masks, for data of one's own."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from freqfusion._text import readable
from freqfusion.data.base import FileDataset, Pair, Palette, voc_colour

_log = logging.getLogger(__name__)


class ImageFolder(FileDataset):
    """Images and masks of the same names, and a list of classes.

    ``root/<split>/images`` and ``root/<split>/masks``, or, for data without splits, ``root/images`` and
    ``root/masks`` (every split is then the whole folder, and a warning says so). A mask is a PNG, or another
    lossless format, whose values are class indices, 255 where there is no truth. ``root/classes.txt`` holds
    one class per line in the order of the indices, each with an optional colour: ``name`` or
    ``name red green blue``. For arguments and errors see :class:`~freqfusion.data.base.FileDataset`.
    """

    layout: ClassVar[str] = (
        "A folder dataset expects ROOT/classes.txt with one class per line (NAME or NAME RED GREEN BLUE), and "
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
        images, masks = self.require_folder(top / "images"), self.require_folder(top / "masks")
        for name in sorted(self.names(images) | self.names(masks)):
            yield Pair(name, self.file(images, name, ".png"), self.file(masks, name, ".png"))

    def _read_classes(self, path: Path) -> tuple[tuple[str, ...], Palette]:
        names, colours = [], []
        for index, line in enumerate(self.read_lines(path)):
            match = re.fullmatch(r"(.*\S)\s+(\d+)\s+(\d+)\s+(\d+)", line)
            colour = tuple(int(part) for part in match.groups()[1:]) if match else voc_colour(index)
            if max(colour) > 255:
                raise ValueError(f"{path}: the colour in {line!r} must be three numbers from 0 to 255")
            names.append(readable(match[1] if match else line, None))
            colours.append((colour[0], colour[1], colour[2]))
        if not 2 <= len(names) <= 255:
            raise ValueError(
                f"{path}: lists {len(names)} classes, expected 2 to 255, one per line. Every pixel gets one of them: "
                "where there is one kind of object, the background is a class too, with a line of its own"
            )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}: lists the class {twice!r} twice; give each class a name of its own")
        return tuple(names), tuple(colours)
