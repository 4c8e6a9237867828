"""ADE20K scene parsing: indoor and outdoor scenes, 150 classes."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from freqfusion.data import class_names
from freqfusion.data.base import FileDataset, Pair, Palette, voc_colour

_FOLDERS = {"train": "training", "val": "validation"}


class ADE20K(FileDataset):
    """The MIT scene parsing benchmark (ADEChallengeData2016): stored 1..150 are classes 0..149, 0 is ignored.

    ``images/{training,validation}/*.jpg`` and ``annotations/{training,validation}/*.png`` in ``root`` or in
    ``root/ADEChallengeData2016``. The labels of the test split are not public. Class names are the first
    synonyms of the benchmark's list; colours are those of Pascal VOC's colour map from index 1 on. Data: Zhou
    et al., "Scene parsing through ADE20K dataset", CVPR 2017. For arguments and errors see
    :class:`~freqfusion.data.base.FileDataset`.
    """

    layout: ClassVar[str] = (
        "ADE20K expects ROOT/images/{training,validation}/*.jpg and "
        "ROOT/annotations/{training,validation}/*.png, or the same below ROOT/ADEChallengeData2016 "
        "(ADEChallengeData2016.zip, unpacked)."
    )
    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    classes = class_names.ADE20K
    palette: Palette = tuple(voc_colour(index + 1) for index in range(150))
    values: Mapping[int, int] = {0: 255, **{index + 1: index for index in range(150)}}

    def find(self) -> Iterator[Pair]:
        """Every name with a picture or a label."""
        inner = self.root / "ADEChallengeData2016"
        top = inner if inner.is_dir() else self.root
        images = self.require_folder(top / "images" / _FOLDERS[self.split])
        masks = self.require_folder(top / "annotations" / _FOLDERS[self.split])
        for name in sorted(self.names(images) | self.names(masks)):
            yield Pair(name, self.file(images, name, ".jpg"), self.file(masks, name, ".png"))
