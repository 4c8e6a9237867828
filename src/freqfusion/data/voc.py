"""Pascal VOC: photographs of 20 kinds of objects and background."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from freqfusion.data.base import FileDataset, Pair, Palette, voc_colour


class PascalVOC(FileDataset):
    """Pascal VOC segmentation in the original layout: 21 classes, 255 (void) ignored.

    ``ImageSets/Segmentation/<split>.txt``, ``JPEGImages/*.jpg`` and ``SegmentationClass/*.png`` (palette
    indices) in ``root``, ``root/VOC2012`` or ``root/VOCdevkit/VOC2012``. For arguments and errors see
    :class:`~freqfusion.data.base.FileDataset`.
    """

    layout: ClassVar[str] = (
        "Pascal VOC expects ROOT/ImageSets/Segmentation/<split>.txt, ROOT/JPEGImages/*.jpg and "
        "ROOT/SegmentationClass/*.png, or the same below ROOT/VOCdevkit/VOC2012 "
        "(VOCtrainval_11-May-2012.tar, unpacked)."
    )
    classes = (
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    )
    palette: Palette = tuple(voc_colour(index) for index in range(21))
    values: Mapping[int, int] = {**{index: index for index in range(21)}, 255: 255}

    def find(self) -> Iterator[Pair]:
        """The samples of the split's list."""
        tops = (self.root, self.root / "VOC2012", self.root / "VOCdevkit" / "VOC2012")
        top = next((top for top in tops if (top / "ImageSets").is_dir()), self.root)
        for name in self.read_lines(top / "ImageSets" / "Segmentation" / f"{self.split}.txt"):
            image = self.file(top / "JPEGImages", name, ".jpg", any_case=True)
            yield Pair(name, image, self.file(top / "SegmentationClass", name, ".png", any_case=True))
