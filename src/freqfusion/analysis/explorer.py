"""The explorer of a feature report: choose a pixel, see how alike all others are to it before and after fusion.

A page cannot hold the features as they are. Three steps make them small, in this order:

1. Of a map of more than :data:`MAX_CELLS` pixels some are picked, evenly spread. Nothing is averaged: each is a
   feature vector of the network.
2. The vectors are scaled to length 1 and turned onto their leading principal axes, without taking a mean away,
   so that their scalar products, the cosine similarities, survive. What is cut off is stated: the share of the
   squared length that was kept.
3. Each vector is rounded to 8 bits a number, with a scale of its own, which a cosine does not see.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from freqfusion.drawing.figures import IGNORED_COLOUR, Array, Colour, Picture

MAX_CELLS = 96 * 96
"""Largest number of pixels of a map on the page."""
MAX_DIMS = 64
"""Largest number of principal axes."""
MIN_DIMS = 8
"""Below this the maps would mislead; then there are too many pictures for one page."""
BUDGET = 8_000_000
"""Bytes of all features of a page; a third more as base64. Leaves room for the rest of 15 MB."""
PICTURE_SIDE = 480
"""Longer side of a picture, pixels."""


def thin(features: Tensor, max_cells: int = MAX_CELLS) -> NDArray[np.float32]:
    """Pick at most ``max_cells`` pixels of a feature map, evenly spread.

    Args:
        features: ``(C, H, W)``, floating point.
        max_cells: of the result.

    Returns:
        ``(h, w, C)``, channels last. Its pixel ``(r, c)`` is the one of ``features`` at the middle of that cell.

    Raises:
        ValueError: for another shape, or values that are not finite.
    """
    if features.ndim != 3 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"features must have shape (C, H, W) and a floating-point dtype, got {tuple(features.shape)} and "
            f"{features.dtype}"
        )
    height, width = features.shape[1:]
    shrink = min(1.0, math.sqrt(max_cells / (height * width)))
    rows = min(max_cells, max(1, math.floor(height * shrink)))
    columns = min(max_cells // rows, max(1, math.floor(width * shrink)))
    picked = features[:, _centres(height, rows)][:, :, _centres(width, columns)]
    values: NDArray[np.float32] = picked.detach().cpu().float().permute(1, 2, 0).contiguous().numpy()
    if not np.isfinite(values).all():
        raise ValueError(
            "the features hold values that are not finite (NaN or infinite), which have no similarity; find out "
            "where the network produces them"
        )
    return values


def _centres(length: int, cells: int) -> list[int]:
    """The pixel at the middle of each of ``cells`` equal parts of a side."""
    return [(2 * cell + 1) * length // (2 * cells) for cell in range(cells)]


@dataclass(frozen=True)
class PackedMap:
    """A feature map as the page holds it."""

    vectors: NDArray[np.int8]
    """``(h, w, d)``; the vector of each pixel up to a factor of its own, zero where the feature was."""
    kept: float
    """Share of the squared length of the unit vectors that the ``d`` axes hold, 0 to 1."""


def pack_features(values: NDArray[np.floating[Any]], dims: int) -> PackedMap:
    """Reduce feature vectors to ``dims`` principal axes and 8 bits; their cosines stay.

    With ``e`` the rounding error of a vector, of length at most ``0.5 sqrt(d) max|z| / 127``, a cosine changes
    by no more than the angles of both: ``asin e1 + asin e2``.

    Args:
        values: ``(h, w, C)``, finite.
        dims: axes to keep, at most; ``C`` where that is less.

    >>> packed = pack_features(np.array([[[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]]]), dims=2)
    >>> packed.vectors.shape, packed.kept
    ((1, 3, 2), 1.0)
    >>> cosine_map(packed, 0, 0).round(2).tolist()
    [[1.0, 0.96, 0.0]]
    """
    height, width, channels = values.shape
    unit = values.reshape(-1, channels).astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    kept = 1.0
    if dims < channels and unit.any():
        _, axes = np.linalg.eigh(unit.T @ unit)  # ascending
        projected = unit @ axes[:, -dims:]
        kept = float((projected**2).sum() / (unit**2).sum())
        unit = projected
    largest = np.abs(unit).max(axis=1, keepdims=True)
    scaled = unit * (127 / np.where(largest == 0, 1, largest))
    return PackedMap(np.rint(scaled).astype(np.int8).reshape(height, width, -1), kept)


def cosine_map(packed: PackedMap, row: int, column: int) -> NDArray[np.float64]:
    """What the page shows for a pixel: its cosine similarity with every other, ``(h, w)``.

    The similarity with a zero vector is 0, as in :func:`torch.nn.functional.cosine_similarity`.
    """
    vectors = packed.vectors.astype(np.int64)
    products = vectors @ vectors[row, column]
    squares = (vectors**2).sum(-1)
    lengths = np.sqrt((squares * squares[row, column]).astype(np.float64))
    result: NDArray[np.float64] = np.divide(products, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return result


@dataclass(frozen=True)
class Scene:
    """An image of the explorer with its features."""

    name: str
    maps: Mapping[str, Mapping[str, NDArray[np.floating[Any]]]]
    """By level and variant, ``(h, w, C)``, as :func:`thin` makes them."""
    labels: Array
    """``(H, W)`` class indices; what is no class is ignored."""
    image: Picture | None = None
    """``(H, W, 3)`` uint8."""
    predictions: Mapping[str, Array] | None = None
    """By model, each ``(H, W)``."""


@dataclass(frozen=True)
class Explorer:
    """An explorer as HTML, and what it cost to get it small."""

    html: str
    packed: Mapping[tuple[str, str, str], PackedMap]
    """By scene, level and variant."""
    dims: int
    """Principal axes, where a map has as many channels."""


def build_explorer(
    scenes: Sequence[Scene],
    classes: Sequence[str],
    palette: Sequence[Colour],
    pair: tuple[str, str],
    budget: int = BUDGET,
) -> Explorer:
    """Pack the scenes and set them in HTML that refers to nothing outside itself.

    Args:
        scenes: at least one, of different names; all with the same levels, each with the same variants.
        classes: names by index; with none the explorer says nothing of labels.
        palette: their RGB colours.
        pair: the variants that are seen first, left and right.
        budget: bytes of all packed features.

    Raises:
        ValueError: for no scene, scenes that differ in levels or variants, or too many to fit.
    """
    names = [scene.name for scene in scenes]
    if not scenes or len(set(names)) < len(names):
        raise ValueError(f"an explorer needs scenes of different names, got {names}")
    levels = list(scenes[0].maps)
    variants = list(scenes[0].maps[levels[0]])
    for scene in scenes:
        found = {level: list(maps) for level, maps in scene.maps.items()}
        if found != dict.fromkeys(levels, variants):
            raise ValueError(
                f"all scenes and levels must have the same variants: {scene.name!r} has {found}, "
                f"expected {', '.join(variants)} at {', '.join(levels)}"
            )
    cells = sum(
        values.shape[0] * values.shape[1]
        for scene in scenes
        for maps in scene.maps.values()
        for values in maps.values()
    )
    dims = min(MAX_DIMS, budget // cells)
    if dims < MIN_DIMS:
        raise ValueError(
            f"{len(scenes)} pictures with {len(levels) * len(variants)} maps each do not fit a page: only "
            f"{dims} numbers per pixel would be left, {MIN_DIMS} are needed; show fewer pictures or fewer sites"
        )
    packed = {
        (scene.name, level, variant): pack_features(values, dims)
        for scene in scenes
        for level, maps in scene.maps.items()
        for variant, values in maps.items()
    }
    data = {
        "classes": list(classes),
        "palette": [list(colour) for colour in palette],
        "ignored": list(IGNORED_COLOUR),
        "ramp": _ramp(),
        "levels": levels,
        "variants": variants,
        "sides": [variants.index(name) for name in pair],
        "scenes": [_describe(scene, packed, len(classes)) for scene in scenes],
    }
    blocks = [
        [
            [_base64(packed[scene.name, level, variant].vectors.tobytes()) for variant in maps]
            for level, maps in scene.maps.items()
        ]
        for scene in scenes
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("freqfusion.analysis", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # "<" inside a script element could end it; the JSON escape means the same.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    html = environment.get_template("explorer.html.j2").render(data=text, blocks=blocks)
    return Explorer(html, packed, dims)


def _describe(
    scene: Scene, packed: Mapping[tuple[str, str, str], PackedMap], num_classes: int
) -> dict[str, Any]:
    rows, columns = _picture_size(scene.labels.shape)
    picked = np.ix_(_centres(scene.labels.shape[0], rows), _centres(scene.labels.shape[1], columns))

    def runs(labels: Array) -> list[int]:
        if labels.shape != scene.labels.shape:
            raise ValueError(
                f"labels and prediction of {scene.name!r} differ in size: {scene.labels.shape} and {labels.shape}"
            )
        wide = labels.astype(np.int64)[picked]
        return _runs(np.where((wide >= 0) & (wide < num_classes), wide, -1))

    picture = None
    if scene.image is not None:
        buffer = io.BytesIO()
        Image.fromarray(scene.image).resize((columns, rows)).save(buffer, "JPEG", quality=88)
        picture = "data:image/jpeg;base64," + _base64(buffer.getvalue())
    maps = [[packed[scene.name, level, name] for name in names] for level, names in scene.maps.items()]
    return {
        "name": scene.name,
        "height": rows,
        "width": columns,
        "picture": picture,
        "labels": runs(scene.labels),
        "predictions": [
            {"name": name, "runs": runs(labels)} for name, labels in (scene.predictions or {}).items()
        ],
        "maps": [[{"size": x.vectors.shape, "kept": round(x.kept, 4)} for x in level] for level in maps],
    }


def _picture_size(shape: tuple[int, ...]) -> tuple[int, int]:
    shrink = min(1.0, PICTURE_SIDE / max(shape))
    return max(1, round(shape[0] * shrink)), max(1, round(shape[1] * shrink))


def _runs(labels: Array) -> list[int]:
    """Value, length, value, length, ... of the labels, row after row.

    >>> _runs(np.array([[0, 0, 2], [2, 2, -1]]))
    [0, 2, 2, 3, -1, 1]
    """
    flat = labels.ravel()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    lengths = np.diff(np.append(starts, flat.size))
    return [int(number) for pair in zip(flat[starts], lengths, strict=True) for number in pair]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _ramp() -> str:
    """256 colours, dark to light, told apart by every common kind of colour vision: Matplotlib's viridis."""
    colours = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
    return bytes(colours.astype(np.uint8)).hex()
