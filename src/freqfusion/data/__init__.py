"""Datasets and transforms for segmentation and detection.

The readers load on first use, so that importing this package needs torch alone.
"""

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from freqfusion._optional import lazy

if TYPE_CHECKING:
    from freqfusion.data.ade20k import ADE20K
    from freqfusion.data.base import SegmentationDataset
    from freqfusion.data.camvid import CamVid
    from freqfusion.data.cityscapes import Cityscapes
    from freqfusion.data.cityscapes_panoptic import CityscapesPanoptic
    from freqfusion.data.coco import CocoInstances, CocoPanoptic
    from freqfusion.data.drive import DRIVE
    from freqfusion.data.folder import ImageFolder
    from freqfusion.data.foreground import ForegroundFolder
    from freqfusion.data.images import BadSampleError, read_image, read_mask
    from freqfusion.data.objects import Category, ObjectDataset, segments_to_objects
    from freqfusion.data.pictures import Pictures
    from freqfusion.data.synthetic import SyntheticPanoptic, SyntheticScenes
    from freqfusion.data.voc import PascalVOC
    from freqfusion.data.voc_boxes import VOCBoxes
    from freqfusion.data.volumes import SyntheticVolumes

Kind = Literal["semantic", "objects", "images"]
"""What the truth of a data set is: a class for every pixel; boxes, instance masks or panoptic segments; or none."""

_DATASETS: dict[str, tuple[Kind, str]] = {
    "ade20k": ("semantic", "ADE20K"),
    "camvid": ("semantic", "CamVid"),
    "cityscapes": ("semantic", "Cityscapes"),
    "cityscapes_panoptic": ("objects", "CityscapesPanoptic"),
    "coco": ("objects", "CocoInstances"),
    "coco_panoptic": ("objects", "CocoPanoptic"),
    "drive": ("semantic", "DRIVE"),
    "folder": ("semantic", "ImageFolder"),
    "foreground": ("semantic", "ForegroundFolder"),
    "pictures": ("images", "Pictures"),
    "synthetic": ("semantic", "SyntheticScenes"),
    "synthetic_panoptic": ("objects", "SyntheticPanoptic"),
    "voc": ("semantic", "PascalVOC"),
    "voc_boxes": ("objects", "VOCBoxes"),
}

__all__ = [
    "ADE20K",
    "DRIVE",
    "BadSampleError",
    "CamVid",
    "Category",
    "Cityscapes",
    "CityscapesPanoptic",
    "CocoInstances",
    "CocoPanoptic",
    "ForegroundFolder",
    "ImageFolder",
    "ObjectDataset",
    "PascalVOC",
    "Pictures",
    "SegmentationDataset",
    "SyntheticPanoptic",
    "SyntheticScenes",
    "SyntheticVolumes",
    "VOCBoxes",
    "create_dataset",
    "list_datasets",
    "read_image",
    "read_mask",
    "segments_to_objects",
]

__getattr__ = lazy(
    __name__,
    {
        "ade20k": "ADE20K",
        "base": "SegmentationDataset",
        "camvid": "CamVid",
        "cityscapes": "Cityscapes",
        "cityscapes_panoptic": "CityscapesPanoptic",
        "coco": "CocoInstances CocoPanoptic",
        "drive": "DRIVE",
        "folder": "ImageFolder",
        "foreground": "ForegroundFolder",
        "images": "BadSampleError read_image read_mask",
        "objects": "Category ObjectDataset segments_to_objects",
        "pictures": "Pictures",
        "synthetic": "SyntheticPanoptic SyntheticScenes",
        "voc": "PascalVOC",
        "voc_boxes": "VOCBoxes",
        "volumes": "SyntheticVolumes",
    },
    "train",
)


def list_datasets(kind: Kind | None = None) -> list[str]:
    """Names that :func:`create_dataset` knows.

    Args:
        kind: only those with a class for every pixel (``"semantic"``), with boxes, instance masks or panoptic
            segments (``"objects"``), or without truth (``"images"``).

    Example:
        >>> list_datasets("objects")
        ['cityscapes_panoptic', 'coco', 'coco_panoptic', 'synthetic_panoptic', 'voc_boxes']
    """
    return sorted(name for name, (own, _) in _DATASETS.items() if kind in (None, own))


def create_dataset(
    name: str, root: str | Path | None, split: str, *, skip_bad: bool = False, **options: Any
) -> "SegmentationDataset | ObjectDataset | Pictures":
    """Build a dataset by name.

    Args:
        name: one of :func:`list_datasets`.
        root: folder of the data in its original layout; unused (may be None) for ``synthetic`` and
            ``synthetic_panoptic``.
        split: ``"train"``, ``"val"``, ``"test"``, or for objects another part of the data.
        skip_bad: leave out missing and broken files and malformed annotations with a warning instead of raising.
        **options: further arguments of the dataset's class.

    Raises:
        ImportError: if an optional package is absent; the message holds the install line.
        ValueError: for an unknown name or split, or a dataset of files without a root.
        FileNotFoundError: if the root has not the expected layout.
        BadSampleError: for a missing file or a malformed annotation, unless ``skip_bad``.

    Example:
        >>> scenes = create_dataset("synthetic", None, "train", length=4, seed=1)
        >>> len(scenes), tuple(scenes[0]["image"].shape)
        (4, (3, 96, 96))
        >>> scenes = create_dataset("synthetic_panoptic", None, "train", length=4, seed=1)
        >>> tuple(scenes[0]["segments"].shape), len(scenes.things)
        ((96, 96), 5)
    """
    if name not in _DATASETS:
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(list_datasets())}")
    dataset = __getattr__(_DATASETS[name][1])
    known = [key for key in signature(dataset).parameters if key not in ("root", "split", "skip_bad")]
    unknown = [str(key) for key in options if key not in known]
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ValueError(f"dataset {name!r} has no option {', '.join(unknown)}; {takes}")
    try:
        if name.startswith("synthetic"):
            return dataset(split, **options)
        if root is None:
            raise ValueError(
                f"dataset {name!r} is read from files: give its folder as root. {dataset.layout}"
            )
        return dataset(root, split, skip_bad=skip_bad, **options)
    except TypeError as error:
        raise ValueError(f"the options {options} do not fit the dataset {name!r}: {error}") from error
