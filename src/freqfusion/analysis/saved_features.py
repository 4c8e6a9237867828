"""Features, labels, images and predictions from ``.npy``, ``.npz`` and ``.safetensors`` files."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqfusion._files import read_text
from freqfusion._optional import require
from freqfusion.analysis.measure import Observation
from freqfusion.data.base import voc_colour

LABELS, IMAGES, PREDICTIONS = "labels", "images", "predictions"
LEVEL = "features"
"""Name of the level where the arrays name none."""


class SavedFeatures:
    """Images by index, each with its features.

    Args:
        arrays: by name. ``labels`` ``(N, H, W)``, integers; ``images`` ``(N, H, W, 3)`` uint8 and ``predictions``
            ``(N, H, W)``, where they are wanted; every other array is features, ``(N, C, h, w)``. Its name is
            that of the variant ("before"), or level and variant ("p3/before").
        classes: their names; by default as many as the labels need.
        ignore_index: the label of pixels without truth.

    Raises:
        ValueError: for missing or misshapen arrays, arrays of different numbers of images, levels that differ
            in their variants, or labels that are no class.
    """

    def __init__(
        self, arrays: dict[str, Tensor], classes: Sequence[str] | None = None, ignore_index: int = 255
    ) -> None:
        if LABELS not in arrays:
            raise ValueError(
                f"there is no array called {LABELS!r} among {', '.join(arrays)}; name it so in the .npz or "
                f".safetensors file, or call the file {LABELS}.npy"
            )
        shapes = {LABELS: "(N, H, W)", PREDICTIONS: "(N, H, W)", IMAGES: "(N, H, W, 3)"}
        for name, array in arrays.items():
            whole = not array.is_floating_point() and not array.is_complex()
            fits = {
                LABELS: array.ndim == 3 and whole,
                PREDICTIONS: array.ndim == 3 and whole,
                IMAGES: array.ndim == 4 and array.shape[-1] == 3 and array.dtype == torch.uint8,
            }.get(name, array.ndim == 4 and array.is_floating_point())
            if not fits or 0 in array.shape:
                wanted = shapes.get(name, "(N, C, h, w)")
                kind = {IMAGES: "uint8", LABELS: "integers", PREDICTIONS: "integers"}.get(
                    name, "floating point"
                )
                raise ValueError(
                    f"{name} must have shape {wanted} and hold {kind}, got {tuple(array.shape)} and {array.dtype}"
                )
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the arrays are of different numbers of images: {lengths}")
        self.labels = arrays.pop(LABELS).long()
        self.images = arrays.pop(IMAGES, None)
        self.predictions = arrays.pop(PREDICTIONS, None)
        for name, extra in ((IMAGES, self.images), (PREDICTIONS, self.predictions)):
            if extra is not None and extra.shape[1:3] != self.labels.shape[1:]:
                sizes = f"{tuple(extra.shape[1:3])} and {tuple(self.labels.shape[1:])}"
                raise ValueError(f"{name} and {LABELS} differ in size: {sizes}")
        self.maps: dict[str, dict[str, Tensor]] = {}
        for name, array in arrays.items():
            level, _, variant = name.rpartition("/")
            self.maps.setdefault(level or LEVEL, {})[variant] = array
        if not self.maps:
            raise ValueError("there are labels but no features; give an array of shape (N, C, h, w) too")
        known = self.labels[self.labels != ignore_index]
        largest = int(known.max()) if known.numel() else 0
        if classes is None:
            classes = [f"class {index}" for index in range(largest + 1)]
        if largest >= len(classes) or (known.numel() and int(known.min()) < 0):
            raise ValueError(
                f"the labels reach from {int(known.min())} to {largest}, but there are {len(classes)} classes (and "
                f"{ignore_index} for ignored pixels)"
            )
        self.classes = tuple(classes)
        self.palette = tuple(voc_colour(index) for index in range(len(classes)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Observation:
        return Observation(
            name=f"image {index}",
            maps={
                level: {variant: array[index].float() for variant, array in maps.items()}
                for level, maps in self.maps.items()
            },
            labels=self.labels[index],
            image=None if self.images is None else self.images[index].permute(2, 0, 1),
            predictions={} if self.predictions is None else {"": self.predictions[index].long()},
        )


def read_features(paths: Sequence[Path], classes: Path | None = None) -> SavedFeatures:
    """Read arrays from files; one in an ``.npy`` file has the file's name.

    Args:
        paths: ``.npy``, ``.npz`` and ``.safetensors`` files.
        classes: a text file with one class name per line.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for another kind of file, one that cannot be read, two arrays of one name, and as
            :class:`SavedFeatures`.
    """
    arrays: dict[str, Tensor] = {}
    for path in paths:
        for name, array in _read(path).items():
            if name in arrays:
                raise ValueError(f"{path}: there is an array {name!r} already; rename one of them")
            arrays[name] = array
    names = None
    if classes is not None:
        if not classes.is_file():
            raise FileNotFoundError(f"there is no file {classes}")
        names = [line.strip() for line in read_text(classes).split("\n") if line.strip()]
    return SavedFeatures(arrays, names)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        safetensors = require("safetensors", "hub")
        try:
            loaded: dict[str, Tensor] = require("safetensors.torch", "hub").load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        return loaded
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path}: expected a .npy, .npz or .safetensors file")
    try:
        content: Any = np.load(path, allow_pickle=False)
        found = {path.stem: content} if path.suffix == ".npy" else dict(content)
        return {name: torch.from_numpy(array) for name, array in found.items()}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as arrays of numbers: {error}") from error
