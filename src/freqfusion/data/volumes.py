"""Volumes drawn on the fly, for trying out networks in 3D without any files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch.utils.data import Dataset

from freqfusion._settings import check_settings
from freqfusion.ops._checks import check_count

_SPLITS = ("train", "val", "test")
_VESSEL, _BLOB = 1, 2

Field = NDArray[np.float32]


class SyntheticVolumes(Dataset[dict[str, Any]]):
    """Endless volumes of thin vessels and soft blobs in texture, with exact truth.

    Each volume has a ground of smooth texture, two to four blobs (wavy ellipsoids, striped inside, some hardly
    brighter than the ground) and three to five curved vessels with a radius of about 0.7 to 1.5 voxels, whose
    brightness rises and falls along them. Edges are antialiased, and noise is laid over the whole. Vessels are as
    thin as what is lost when a volume is downsampled.

    A volume depends on ``seed``, ``split`` and its index alone. A sample is a dict of ``image`` ``(1, D, H, W)``
    float32 around 0.5, ``mask`` ``(D, H, W)`` uint8 of the classes, and ``name``.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``; their volumes come from separate random streams.
        length: number of volumes.
        size: depth, height and width in voxels; blobs scale with the shortest side, vessels do not.
        seed: picks another set of volumes.

    Raises:
        TypeError: for a size that is no whole number.
        ValueError: for an unknown split, a negative length or seed, or an empty size.

    Example:
        >>> sample = SyntheticVolumes("val", length=1)[0]
        >>> sample["name"], tuple(sample["image"].shape), sample["mask"].unique().tolist()
        ('val-000000', (1, 32, 32, 32), [0, 1, 2])
    """

    classes = ("ground", "vessel", "blob")

    def __init__(
        self, split: str, length: int = 1000, size: Sequence[int] = (32, 32, 32), seed: int = 0
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(_SPLITS)}")
        if len(size) != 3:
            raise ValueError(f"size must be (depth, height, width), got {tuple(size)}")
        checked = check_settings("scenes", {"length": length, "seed": seed}, optional=False)
        self.split = split
        self.length: int = checked["length"]
        self.seed: int = checked["seed"]
        self.size = tuple(check_count(f"size[{axis}]", side) for axis, side in enumerate(size))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.length <= index < self.length:
            raise IndexError(f"volume {index} of {self.length}")
        index %= self.length
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), index])
        image, mask = _draw(rng, self.size)
        return {
            "image": torch.from_numpy(image)[None],
            "mask": torch.from_numpy(mask),
            "name": f"{self.split}-{index:06d}",
        }


def _draw(rng: Generator, size: tuple[int, ...]) -> tuple[Field, NDArray[np.uint8]]:
    places = np.stack(np.meshgrid(*(np.arange(side, dtype=np.float32) for side in size), indexing="ij"))
    image = 0.4 + 0.08 * _texture(rng, places, 3.0)
    mask = np.zeros(size, np.uint8)
    for _ in range(rng.integers(2, 5)):
        depth = _blob_depth(rng, places)
        stripes = _texture(rng, places, 1.2)
        _paint(image, mask, depth, _BLOB, rng.uniform(0.45, 0.75) + 0.1 * stripes)
    for _ in range(rng.integers(3, 6)):
        depth, along = _vessel_depth(rng, places)
        glow = rng.uniform(0.6, 0.95) + 0.15 * np.sin(along * rng.uniform(5, 20) + rng.uniform(0, 6))
        _paint(image, mask, depth, _VESSEL, glow)
    image += rng.normal(0, 0.06, size)
    return image.astype(np.float32), mask


def _paint(image: Field, mask: NDArray[np.uint8], depth: Field, label: int, colour: Field) -> None:
    """Lay a shape over the volume, given how far inside it each voxel is."""
    cover = np.clip(depth + 0.5, 0, 1)
    image += cover * (colour - image)
    mask[depth > 0] = label


def _texture(rng: Generator, places: Field, wave: float) -> Field:
    """A sum of four waves of ``wave`` to four times as many voxels, in [-1, 1]."""
    total = np.zeros(places.shape[1:], np.float32)
    for _ in range(4):
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction) * wave * rng.uniform(1, 4) / (2 * np.pi)
        total += np.sin(np.tensordot(direction, places, 1) + rng.uniform(0, 2 * np.pi)) / 4
    return total


def _blob_depth(rng: Generator, places: Field) -> Field:
    size = np.array(places.shape[1:])
    radii = size.min() * rng.uniform(0.12, 0.25, 3)
    offset = (places - (rng.uniform(0.1, 0.9, 3) * size)[:, None, None, None]) / radii[:, None, None, None]
    wavy = 1 + 0.2 * _texture(rng, places, float(radii.min()))
    return (wavy - np.linalg.norm(offset, axis=0)) * radii.min()


def _vessel_depth(rng: Generator, places: Field) -> tuple[Field, Field]:
    """How far inside a vessel each voxel is, and where along it, in [0, 1]."""
    size = np.array(places.shape[1:])
    ends = rng.uniform(0, 1, (3, 3))
    axis = rng.integers(3)
    ends[0, axis], ends[2, axis] = 0, 1  # it crosses the volume
    steps = np.linspace(0, 1, 2 * int(size.max()))
    weights = np.stack(((1 - steps) ** 2, 2 * steps * (1 - steps), steps**2))
    line = (weights.T @ ends) * (size - 1)  # a quadratic curve
    radii = rng.uniform(0.7, 1.5) * (1 + 0.2 * np.sin(steps * rng.uniform(3, 9)))
    depth, along = np.full(places.shape[1:], -np.inf, np.float32), np.zeros(places.shape[1:], np.float32)
    for place, radius, step in zip(line, radii, steps, strict=True):
        here = radius - np.linalg.norm(places - place[:, None, None, None], axis=0)
        nearer = here > depth
        depth[nearer], along[nearer] = here[nearer], step
    return depth, along
