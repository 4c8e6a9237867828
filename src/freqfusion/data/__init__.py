"""Datasets and transforms for segmentation and detection.

The readers load on first use, so that importing this package needs torch alone.
"""

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqfusion._optional import require

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
    from freqfusion.data.synthetic import SyntheticPanoptic, SyntheticScenes
    from freqfusion.data.voc import PascalVOC
    from freqfusion.data.voc_boxes import VOCBoxes

_DATASETS = {
    "ade20k": "ADE20K",
    "camvid": "CamVid",
    "cityscapes": "Cityscapes",
    "drive": "DRIVE",
    "folder": "ImageFolder",
    "foreground": "ForegroundFolder",
    "synthetic": "SyntheticScenes",
    "voc": "PascalVOC",
}
_OBJECT_DATASETS = {
    "cityscapes_panoptic": "CityscapesPanoptic",
    "coco": "CocoInstances",
    "coco_panoptic": "CocoPanoptic",
    "synthetic_panoptic": "SyntheticPanoptic",
    "voc_boxes": "VOCBoxes",
}
_MODULES = {
    **{class_name: name for name, class_name in (_DATASETS | _OBJECT_DATASETS).items()},
    "BadSampleError": "images",
    "Category": "objects",
    "CocoPanoptic": "coco",
    "ObjectDataset": "objects",
    "SegmentationDataset": "base",
    "SyntheticPanoptic": "synthetic",
    "read_image": "images",
    "read_mask": "images",
    "segments_to_objects": "objects",
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
    "SegmentationDataset",
    "SyntheticPanoptic",
    "SyntheticScenes",
    "VOCBoxes",
    "create_dataset",
    "create_object_dataset",
    "list_datasets",
    "list_object_datasets",
    "read_image",
    "read_mask",
    "segments_to_objects",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for package in ("numpy", "PIL", "torchvision"):
        require(package, "train")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def list_datasets() -> list[str]:
    """Names that :func:`create_dataset` knows.

    Example:
        >>> list_datasets()
        ['ade20k', 'camvid', 'cityscapes', 'drive', 'folder', 'foreground', 'synthetic', 'voc']
    """
    return sorted(_DATASETS)


def create_dataset(
    name: str, root: str | Path | None, split: str, *, skip_bad: bool = False, **options: Any
) -> "SegmentationDataset":
    """Build a dataset by name.

    Args:
        name: one of :func:`list_datasets`.
        root: folder of the data in its original layout; unused (may be None) for ``synthetic``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        skip_bad: leave out missing and broken files with a warning instead of raising.
        **options: further arguments of the dataset's class.

    Raises:
        ImportError: if an optional package is absent; the message holds the install line.
        ValueError: for an unknown name or split, or a dataset of files without a root.
        FileNotFoundError: if the root has not the expected layout.

    Example:
        >>> scenes = create_dataset("synthetic", None, "train", length=4, seed=1)
        >>> len(scenes), tuple(scenes[0]["image"].shape)
        (4, (3, 96, 96))
    """
    return _create(_DATASETS, name, root, split, skip_bad, options)


def list_object_datasets() -> list[str]:
    """Names that :func:`create_object_dataset` knows.

    Example:
        >>> list_object_datasets()
        ['cityscapes_panoptic', 'coco', 'coco_panoptic', 'synthetic_panoptic', 'voc_boxes']
    """
    return sorted(_OBJECT_DATASETS)


def create_object_dataset(
    name: str, root: str | Path | None, split: str, *, skip_bad: bool = False, **options: Any
) -> "ObjectDataset":
    """Build a dataset of images with boxes, masks or panoptic segments by name.

    Args:
        name: one of :func:`list_object_datasets`.
        root: folder of the data; unused (may be None) for ``synthetic_panoptic``.
        split: ``"train"``, ``"val"`` or another part of the data.
        skip_bad: leave out missing and broken files and malformed annotations with a warning instead of raising.
        **options: further arguments of the dataset's class.

    Raises:
        ImportError: if an optional package is absent; the message holds the install line.
        ValueError: for an unknown name or split, or a dataset of files without a root.
        FileNotFoundError: if the root has not the expected layout.
        BadSampleError: for a missing file or a malformed annotation, unless ``skip_bad``.

    Example:
        >>> scenes = create_object_dataset("synthetic_panoptic", None, "train", length=4, seed=1)
        >>> len(scenes), tuple(scenes[0]["segments"].shape), len(scenes.things)
        (4, (96, 96), 5)
    """
    return _create(_OBJECT_DATASETS, name, root, split, skip_bad, options)


def _create(
    datasets: dict[str, str],
    name: str,
    root: str | Path | None,
    split: str,
    skip_bad: bool,
    options: dict[str, Any],
) -> Any:
    if name not in datasets:
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(sorted(datasets))}")
    dataset = __getattr__(datasets[name])
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
