"""Datasets and transforms for semantic segmentation.

The readers load on first use, so that importing this package needs torch alone.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqfusion._optional import require

if TYPE_CHECKING:
    from freqfusion.data.ade20k import ADE20K
    from freqfusion.data.base import SegmentationDataset
    from freqfusion.data.camvid import CamVid
    from freqfusion.data.cityscapes import Cityscapes
    from freqfusion.data.folder import ImageFolder
    from freqfusion.data.foreground import ForegroundFolder
    from freqfusion.data.images import BadSampleError, read_image, read_mask
    from freqfusion.data.synthetic import SyntheticScenes
    from freqfusion.data.voc import PascalVOC

_DATASETS = {
    "ade20k": "ADE20K",
    "camvid": "CamVid",
    "cityscapes": "Cityscapes",
    "folder": "ImageFolder",
    "foreground": "ForegroundFolder",
    "synthetic": "SyntheticScenes",
    "voc": "PascalVOC",
}
_MODULES = {
    **{class_name: name for name, class_name in _DATASETS.items()},
    "BadSampleError": "images",
    "SegmentationDataset": "base",
    "read_image": "images",
    "read_mask": "images",
}

__all__ = [
    "ADE20K",
    "BadSampleError",
    "CamVid",
    "Cityscapes",
    "ForegroundFolder",
    "ImageFolder",
    "PascalVOC",
    "SegmentationDataset",
    "SyntheticScenes",
    "create_dataset",
    "list_datasets",
    "read_image",
    "read_mask",
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
        ['ade20k', 'camvid', 'cityscapes', 'folder', 'foreground', 'synthetic', 'voc']
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
    if name not in _DATASETS:
        raise ValueError(f"unknown dataset {name!r}; known are {', '.join(list_datasets())}")
    dataset = __getattr__(_DATASETS[name])
    if name == "synthetic":
        return dataset(split, **options)
    if root is None:
        raise ValueError(f"dataset {name!r} is read from files: give its folder as root. {dataset.layout}")
    return dataset(root, split, skip_bad=skip_bad, **options)
