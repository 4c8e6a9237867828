"""Cityscapes: street scenes of 50 cities, 19 scored classes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from freqfusion.data.base import FileDataset, Pair, Palette, SampleFiles
from freqfusion.data.class_names import CITYSCAPES_LABELS as CLASSES


class Cityscapes(FileDataset):
    """The fine annotations in the original layout: label ids 0..33 become 19 train ids, the rest is ignored.

    ``leftImg8bit/<split>/<city>/*_leftImg8bit.png`` and ``gtFine/<split>/<city>/*_gtFine_labelIds.png``. The
    labels of the test split are not public. For arguments and errors see
    :class:`~freqfusion.data.base.FileDataset`.
    """

    layout: ClassVar[str] = (
        "Cityscapes expects ROOT/leftImg8bit/<split>/<city>/*_leftImg8bit.png and "
        "ROOT/gtFine/<split>/<city>/*_gtFine_labelIds.png (leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip, unpacked into one folder)."
    )
    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    classes = tuple(name for _, name, _ in CLASSES)
    palette: Palette = tuple(colour for _, _, colour in CLASSES)
    values: Mapping[int, int] = {
        **dict.fromkeys(range(34), 255),
        **{label_id: index for index, (label_id, _, _) in enumerate(CLASSES)},
    }

    def find(self) -> Iterator[Pair]:
        """Every frame that has a picture or a label."""
        images = self.require_folder(self.root / "leftImg8bit" / self.split)
        masks = self.require_folder(self.root / "gtFine" / self.split)
        for name, image, mask in frames(self, images, masks, "_gtFine_labelIds"):
            yield Pair(name, image, mask)


def frames(
    dataset: SampleFiles[Any], images: Path, maps: Path, map_end: str
) -> Iterator[tuple[str, Path, Path]]:
    """The name, picture and label map of every frame that has one of the two, in folders with one folder a city."""
    image_end = "_leftImg8bit"
    found = {
        (city.name, name)
        for folder, end in ((images, image_end), (maps, map_end))
        for city in folder.iterdir()
        for name in dataset.names(city, end)
    }
    for city, name in sorted(found):
        yield (
            name,
            dataset.file(images / city, name + image_end, ".png"),
            dataset.file(maps / city, name + map_end, ".png"),
        )
