"""CamVid: street scenes filmed from a car, 11 classes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from freqfusion.data.base import FileDataset, Pair, Palette


class CamVid(FileDataset):
    """CamVid in the form of the SegNet authors: classes 0..10, 11 (unlabelled) ignored.

    Names are listed in ``<split>.txt``; the files are ``<split>/images/NAME.jpg`` (or ``.png``) and
    ``<split>/labels/NAME.png``, or, as the SegNet authors publish them, ``<split>/NAME.png`` and
    ``<split>annot/NAME.png``. Data: Brostow, Fauqueur and Cipolla, "Semantic object classes in video", 2009.
    For arguments and errors see :class:`~freqfusion.data.base.FileDataset`.
    """

    layout: ClassVar[str] = (
        "CamVid expects ROOT/<split>.txt with one name per line, ROOT/<split>/images/NAME.jpg (or .png) and "
        "ROOT/<split>/labels/NAME.png; or the SegNet authors' ROOT/<split>/NAME.png and "
        "ROOT/<split>annot/NAME.png."
    )
    classes = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    palette: Palette = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )
    values: Mapping[int, int] = {**{index: index for index in range(11)}, 11: 255}

    def find(self) -> Iterator[Pair]:
        """The samples of the split's list."""
        lines = self.read_lines(self.root / f"{self.split}.txt")
        images = self.root / self.split / "images"
        masks = self.root / self.split / "labels"
        if not images.is_dir():
            images, masks = self.root / self.split, self.root / f"{self.split}annot"
        self.require_folder(images)
        self.require_folder(masks)
        for line in lines:
            name = Path(line.split()[0]).stem  # the SegNet authors list image and label path in one line
            image, mask = (self.file(folder, name, ".png", any_case=True) for folder in (images, masks))
            yield Pair(name, image, mask)
