"""Cityscapes as panoptic segments, from the benchmark's own files."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from freqfusion.data.base import _ranges
from freqfusion.data.cityscapes import CLASSES, frames
from freqfusion.data.images import BadSampleError, Decoded, decode_mask
from freqfusion.data.objects import Category, PanopticFiles, PanopticPicture, Segment, number_segments

_FIRST_THING = 24
"""Label ids from here on (person, rider, vehicles) have instances."""
_LABEL_IDS = range(34)


class CityscapesPanoptic(PanopticFiles):
    """The fine annotations in the original layout: 19 categories, of which 8 are things.

    ``leftImg8bit/<split>/<city>/*_leftImg8bit.png`` and ``gtFine/<split>/<city>/*_gtFine_instanceIds.png``. A
    value of 1000 or more is label id * 1000 + number of the instance, one segment each; a smaller one is a label id:
    one segment of stuff, or one crowd of things that were not told apart. Labels outside the 19 classes are void
    (Cordts et al., CVPR 2016; mcordts/cityscapesScripts, ``createPanopticImgs.py``). The labels of the test split
    are not public. For arguments and errors see :class:`~freqfusion.data.objects.ObjectFiles`.
    """

    layout: ClassVar[str] = (
        "Cityscapes expects ROOT/leftImg8bit/<split>/<city>/*_leftImg8bit.png and "
        "ROOT/gtFine/<split>/<city>/*_gtFine_instanceIds.png (leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip, unpacked into one folder)."
    )
    splits = ("train", "val")
    categories = tuple(
        Category(label_id, name, label_id >= _FIRST_THING, colour) for label_id, name, colour in CLASSES
    )

    def find(self) -> Iterator[PanopticPicture]:
        """Every frame that has a picture or a label map."""
        images = self.require_folder(self.root / "leftImg8bit" / self.split)
        maps = self.require_folder(self.root / "gtFine" / self.split)
        for name, image, label_map in frames(self, images, maps, "_gtFine_instanceIds"):
            yield PanopticPicture(name, name, image, None, label_map)

    def file_name(self, index: int) -> str:
        """The name of an image's file."""
        return self.entries[index].path.name

    def read_segments(self, picture: PanopticPicture) -> tuple[Decoded, Sequence[Segment]]:
        """The segments of a picture, and ``(H, W)`` int64: j on the j-th of them, from 1, and 0 on void."""
        stored, orientation = decode_mask(picture.label_map)
        labels = {category.id: label for label, category in enumerate(self.categories)}
        segments, strange = [], []
        for value in stored.unique().tolist():
            label_id = value // 1000 if value >= 1000 else value
            if label_id not in _LABEL_IDS:
                strange.append(value)
            elif label_id in labels:
                is_crowd = value < 1000 and label_id >= _FIRST_THING
                segments.append(Segment(value, labels[label_id], is_crowd))
        if strange:
            raise BadSampleError(
                f"{picture.label_map}: holds the values {_ranges(strange)}, expected label ids from 0 to 33, or "
                "those times 1000 plus the number of an instance. Is it another kind of label map? Restore it, or "
                "leave the sample out with skip_bad (--skip-bad)."
            )
        return Decoded(number_segments(stored, segments), orientation), segments
