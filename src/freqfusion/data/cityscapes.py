"""Cityscapes: street scenes of 50 cities, 19 scored classes."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from freqfusion.data.base import FileDataset, Pair, Palette

# (label id, name, colour) of the classes that are scored, in the order of their train ids (Cordts et al.,
# "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016, and the benchmark's label table)
_CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)


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
    classes = tuple(name for _, name, _ in _CLASSES)
    palette: Palette = tuple(colour for _, _, colour in _CLASSES)
    values: Mapping[int, int] = {
        **dict.fromkeys(range(34), 255),
        **{label_id: index for index, (label_id, _, _) in enumerate(_CLASSES)},
    }

    def find(self) -> Iterator[Pair]:
        """Every frame that has a picture or a label."""
        images = self.require_folder(self.root / "leftImg8bit" / self.split)
        masks = self.require_folder(self.root / "gtFine" / self.split)
        image_end, mask_end = "_leftImg8bit.png", "_gtFine_labelIds.png"
        frames = {
            (path.parent.name, path.name.removesuffix(end))
            for folder, end in ((images, image_end), (masks, mask_end))
            for path in folder.glob(f"*/*{end}")
        }
        for city, name in sorted(frames):
            yield Pair(name, images / city / f"{name}{image_end}", masks / city / f"{name}{mask_end}")
