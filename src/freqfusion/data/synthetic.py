"""Scenes drawn on the fly, for trying things out without any files."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torchvision import tv_tensors

from freqfusion._settings import check_settings
from freqfusion.data.base import Palette, Sample, SegmentationDataset
from freqfusion.data.objects import Category, ObjectDataset, thing_annotations

_SPLITS = ("train", "val", "test")

Plane = NDArray[np.float32]


class _Class(NamedTuple):
    name: str
    colour: tuple[int, int, int]
    """Of the palette, and the centre of the colours in the scenes."""


_CLASSES = (
    _Class("ground", (120, 125, 120)),
    _Class("wall", (200, 85, 60)),
    _Class("pond", (60, 115, 205)),
    _Class("shard", (200, 185, 50)),
    _Class("ring", (145, 70, 190)),
    _Class("bush", (60, 165, 75)),
    _Class("pole", (235, 150, 195)),
    _Class("wire", (25, 30, 35)),
)

_GROUND, _WALL, _POND, _SHARD, _RING, _BUSH, _POLE, _WIRE = range(len(_CLASSES))
_SOLIDS = (_WALL, _POND, _SHARD, _RING, _BUSH)
_STUFF = (_GROUND, _WALL, _WIRE)


class SyntheticScenes(SegmentationDataset):
    """Endless scenes of textured shapes with exact truth, made to be hard where feature fusion matters.

    Each scene is a ground with one or two walls (rectangles), ponds (ellipses), shards (polygons), rings and
    bushes (wavy blobs) each on it, crossed by poles (2 to 3 pixels thick) and curved wires (1 to 2 pixels).
    Stripes, checks and grain vary strongly within a shape, and colours and brightness from shape to shape,
    so that the features of one class are inconsistent; a quarter of the shapes take on the colour of what
    they cover, so that their boundaries have low contrast and are easily displaced. Edges are antialiased,
    and light and noise are laid over the whole.

    A scene depends on ``seed``, ``split`` and its index alone: not on other scenes, workers or any global
    random state (between kinds of processor, a value may differ by one step in rare pixels).

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``; their scenes come from separate random streams.
        length: number of scenes.
        size: height and width in pixels, at least 1; shapes scale with the shorter side, thin parts do not.
        seed: picks another set of scenes.

    Raises:
        ValueError: for an unknown split, a negative length or seed, or an empty size.

    Example:
        >>> scene = SyntheticScenes("val", length=1)[0]
        >>> scene["name"], tuple(scene["mask"].shape), scene["mask"].unique().tolist()
        ('val-000000', (96, 96), [0, 1, 2, 3, 4, 5, 6, 7])
    """

    classes = tuple(entry.name for entry in _CLASSES)
    palette: Palette = tuple(entry.colour for entry in _CLASSES)

    def __init__(
        self, split: str, length: int = 1000, size: tuple[int, int] = (96, 96), seed: int = 0
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(_SPLITS)}")
        checked = check_settings("scenes", {"length": length, "size": size, "seed": seed}, optional=False)
        self.split = split
        self.length: int = checked["length"]
        self.size: tuple[int, int] = tuple(checked["size"])
        self.seed: int = checked["seed"]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        canvas = self._draw(index)
        return {
            "image": tv_tensors.Image(torch.from_numpy(canvas.finished())),
            "mask": tv_tensors.Mask(torch.from_numpy(canvas.mask)),
            "name": self.name(index),
        }

    def name(self, index: int) -> str:
        """The name of a scene."""
        return f"{self.split}-{index % self.length:06d}"

    def _draw(self, index: int) -> "_Canvas":
        """A scene with all its shapes, before light and noise."""
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), index % self.length])
        return _draw_scene(rng, self.size)


class SyntheticPanoptic(ObjectDataset):
    """The scenes of :class:`SyntheticScenes` with panoptic segments.

    Every pond, shard, ring, bush and pole is an object; ground, walls and wires are stuff, one segment a class.
    Stuff comes first, then the objects in the order in which they were drawn; what is hidden completely has no
    segment, and there is neither void nor crowd. Image and classes equal those of ``SyntheticScenes`` with the same
    arguments, which also says what the arguments mean and which errors they raise.

    Example:
        >>> scenes = SyntheticPanoptic("val", length=1)
        >>> scene = scenes[0]
        >>> [scenes.classes[label] for label in scene["labels"]]
        ['ground', 'wall', 'wire', 'shard', 'ring', 'pond', 'pond', 'bush', 'shard', 'pole']
    """

    is_panoptic = True
    categories = tuple(
        Category(number, entry.name, number - 1 not in _STUFF, entry.colour)
        for number, entry in enumerate(_CLASSES, 1)
    )

    def __init__(
        self, split: str, length: int = 1000, size: tuple[int, int] = (96, 96), seed: int = 0
    ) -> None:
        self._scenes = SyntheticScenes(split, length, size, seed)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        canvas = self._scenes._draw(index)
        return {
            "image": tv_tensors.Image(torch.from_numpy(canvas.finished())),
            "name": self.name(index),
            "image_id": self.image_id(index),
            **_segments(canvas),
        }

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, the same for all."""
        return self._scenes.size

    def image_id(self, index: int) -> int:
        """The index of the scene."""
        return index % len(self)

    def name(self, index: int) -> str:
        """The split and the index."""
        return self._scenes.name(index)

    def _annotations(self, index: int) -> Iterator[dict[str, Any]]:
        return thing_annotations(**_segments(self._scenes._draw(index)), categories=self.categories)


def _segments(canvas: "_Canvas") -> dict[str, torch.Tensor]:
    """``segments``, ``labels`` and ``iscrowd`` of a panoptic sample."""
    labels = np.array(canvas.labels)
    # shapes of stuff go by their class, things by their place in the order of drawing
    keys = np.where(np.isin(labels, _STUFF), labels, len(_CLASSES) + np.arange(len(labels)))
    _, first, numbers = np.unique(keys[canvas.shapes], return_index=True, return_inverse=True)
    return {
        "segments": tv_tensors.Mask(torch.from_numpy(numbers.reshape(canvas.size).astype(np.int32) + 1)),
        "labels": torch.from_numpy(labels[canvas.shapes.flat[first]]),
        "iscrowd": torch.zeros(len(first), dtype=torch.bool),
    }


def _draw_scene(rng: Generator, size: tuple[int, int]) -> "_Canvas":
    canvas = _Canvas(rng, size)
    solids = np.repeat(_SOLIDS, rng.integers(1, 3, len(_SOLIDS)))
    for label in rng.permutation(solids):
        canvas.draw_solid(int(label))
    for label in (_POLE, _WIRE):
        for _ in range(rng.integers(1, 4)):
            canvas.draw_thin(label)
    return canvas


class _Canvas:
    """The picture and truth in the making.

    A shape is a plane of approximate signed distances to its outline in pixels, negative inside: pixels
    below 0 are its truth, and its colour fades over the pixel around 0.
    """

    def __init__(self, rng: Generator, size: tuple[int, int]) -> None:
        self.rng = rng
        self.size = size
        self.unit = float(min(size))
        rows, columns = np.indices(size, dtype=np.float32, sparse=True)
        self.rows, self.columns = rows, columns
        self.mask = np.zeros(size, np.uint8)
        self.shapes = np.zeros(size, np.int64)
        self.labels = [_GROUND]
        """The class of each shape, by the numbers in ``shapes``."""
        self.image = np.empty((3, *size), np.float32)
        self.image[:] = self._texture(self._colour(_GROUND), rows, columns)

    def draw_solid(self, label: int) -> None:
        """Draw a wall, pond, shard, ring or bush at a random place."""
        rng, unit = self.rng, self.unit
        row, column = rng.uniform(0, self.size[0]), rng.uniform(0, self.size[1])
        angle = rng.uniform(0, np.pi)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u = (self.columns - np.float32(column)) * cos + (self.rows - np.float32(row)) * sin
        v = (self.rows - np.float32(row)) * cos - (self.columns - np.float32(column)) * sin
        a, b = (rng.uniform(0.12, 0.26, 2) * unit).astype(np.float32)
        if label == _WALL:
            distance = np.maximum(np.abs(u) - a, np.abs(v) - b)
        elif label == _POND:
            distance = (np.hypot(u / a, v / b) - 1) * min(a, b)
        elif label == _SHARD:
            sides = int(rng.integers(3, 6))
            turns = np.linspace(0, 2 * np.pi, sides, endpoint=False) + rng.uniform(-0.3, 0.3, sides)
            distance = np.maximum.reduce(
                [u * np.float32(np.cos(turn)) + v * np.float32(np.sin(turn)) - 0.7 * a for turn in turns]
            )
        elif label == _RING:
            half = max(1.0, 0.5 * rng.uniform(0.03, 0.08) * unit)
            distance = np.abs(np.hypot(u, v) - max(a, b)) - np.float32(half)
        else:
            lobes, depth = rng.integers(5, 10), rng.uniform(0.12, 0.25)
            radius = a * (1 + np.float32(depth) * np.sin(np.float32(lobes) * np.arctan2(v, u)))
            distance = np.hypot(u, v) - radius
        self._paint(label, distance, u, v)

    def draw_thin(self, label: int) -> None:
        """Draw a pole or a wire at a random place."""
        rng = self.rng
        height, width = self.size
        if label == _POLE:
            column, lean = rng.uniform(0, width), rng.uniform(-0.15, 0.15)
            top, length = rng.uniform(-0.2, 0.5) * height, rng.uniform(0.4, 0.9) * height
            across = self.columns - np.float32(column) - np.float32(lean) * self.rows
            along = np.abs(self.rows - np.float32(top + length / 2)) - np.float32(length / 2)
            distance = np.maximum(np.abs(across) - np.float32(rng.uniform(1.0, 1.6)), along)
        else:
            row, slope = rng.uniform(0, height), rng.uniform(-0.5, 0.5)
            sag, waves = rng.uniform(0.02, 0.12) * self.unit, rng.uniform(0.5, 1.5)
            phase = self.columns * np.float32(np.pi * waves / width) + np.float32(rng.uniform(0, np.pi))
            line = np.float32(row) + np.float32(slope) * (self.columns - width / 2)
            line = line + np.float32(sag) * np.sin(phase)
            across, along = (self.rows - line) / np.float32(np.hypot(1, slope)), self.columns
            distance = np.abs(across) - np.float32(rng.uniform(0.7, 1.2))
        self._paint(label, distance, across, along)

    def finished(self) -> NDArray[np.uint8]:
        """The image with light and noise over it, as ``(3, H, W)`` uint8."""
        rng = self.rng
        tilt = rng.uniform(-0.25, 0.25, 2).astype(np.float32)
        light = 1 + tilt[0] * (self.rows / self.size[0] - 0.5) + tilt[1] * (self.columns / self.size[1] - 0.5)
        noise = rng.standard_normal(self.image.shape, dtype=np.float32) * np.float32(rng.uniform(2, 8))
        return np.clip(self.image * light + noise, 0, 255).astype(np.uint8)

    def _colour(self, label: int) -> Plane:
        return (np.array(_CLASSES[label].colour) + self.rng.normal(0, 8, 3)).astype(np.float32)

    def _paint(self, label: int, distance: Plane, u: Plane, v: Plane) -> None:
        inside = distance < 0
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not rows.size:
            return
        # one pixel more on each side, for the fading edge; all further work is on this part only
        box = (slice(max(0, rows[0] - 1), rows[-1] + 2), slice(max(0, columns[0] - 1), columns[-1] + 2))
        distance, inside = distance[box], inside[box]
        under = self.image[:, box[0], box[1]]
        colour = self._colour(label)
        if self.rng.random() < 0.25:  # camouflage: low contrast to what lies below
            colour += 0.6 * (under[:, inside].mean(1) - colour)
        u, v = (np.broadcast_to(plane, self.size)[box] for plane in (u, v))
        cover = np.clip(0.5 - distance, 0, 1)
        under += cover * (self._texture(colour, u, v) - under)
        self.mask[box][inside] = label
        self.shapes[box][inside] = len(self.labels)
        self.labels.append(label)

    def _texture(self, colour: Plane, u: Plane, v: Plane) -> Plane:
        """``(3, H, W)`` colours around ``colour``: stripes, checks or grain along the axes u and v."""
        rng = self.rng
        tint = rng.normal(0, 8, 3).astype(np.float32)
        other = colour * np.float32(rng.uniform(0.6, 1.4)) + tint
        period = np.float32(rng.uniform(3, 10))
        kind = rng.integers(4)
        if kind == 0:
            share = 0.5 + 0.5 * np.sin(u * (2 * np.float32(np.pi) / period)) + 0 * v
        elif kind == 1:
            share = ((np.floor(u / period) + np.floor(v / period)) % 2).astype(np.float32)
        elif kind == 2:
            share = rng.random(np.broadcast_shapes(u.shape, v.shape), dtype=np.float32)
        else:
            share = np.clip(0.5 + u / self.unit + 0 * v, 0, 1)
        return colour[:, None, None] + share * (other - colour)[:, None, None]
