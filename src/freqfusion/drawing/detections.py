"""Pictures of detected objects and of panoptic segments, and precision-recall curves.

Images, palettes and colours are as in :mod:`freqfusion.drawing.figures`.
"""

from collections.abc import Mapping, Sequence
from colorsys import hls_to_rgb, rgb_to_hls

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from freqfusion._text import readable
from freqfusion.drawing.figures import (
    IGNORED_COLOUR,
    NAME_LETTERS,
    Array,
    Colour,
    Picture,
    as_mask,
    as_picture,
    colour_mask,
    load_font,
    overlay,
    plot_curves,
)

_DARK: Colour = (16, 16, 18)
_LIGHT: Colour = (255, 255, 255)
_TAG_SHARE = 0.15
"""How much of a picture its tags may cover."""


def instance_colours(labels: Sequence[int], palette: Sequence[Colour]) -> list[Colour]:
    """A colour for each object: that of its class for the first, then shades of it that differ from one another.

    Hue and lightness follow sequences that fill their ranges evenly however many there are (steps of the inverse
    plastic number and its square), so that neighbours in the list are far apart.

    Args:
        labels: class of each object.
        palette: RGB of each class.
    """
    seen: dict[int, int] = {}
    colours = []
    for label in labels:
        place = seen[label] = seen.get(label, -1) + 1
        hue, lightness, saturation = rgb_to_hls(*(channel / 255 for channel in palette[label]))
        if place:
            hue += 0.12 * ((0.5 + 0.7548776662 * place) % 1 - 0.5)
            # from 0.3 to 0.85, which is seen on dark and on light ground
            lightness = min(max(lightness, 0.5), 0.65) + 0.4 * ((0.5 + 0.5698402910 * place) % 1 - 0.5)
        red, green, blue = hls_to_rgb(hue % 1, lightness, saturation)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def _is_light(colour: Colour) -> bool:
    """Whether black is read more easily on the colour than white."""
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


def _grown(mask: Array, steps: int) -> Array:
    """A mask with what is next to it, sideways, above or below, taken in as many times."""
    for _ in range(steps):
        ringed = np.pad(mask, 1)
        mask = mask | ringed[:-2, 1:-1] | ringed[2:, 1:-1] | ringed[1:-1, :-2] | ringed[1:-1, 2:]
    return mask


def _checked_labels(labels: Sequence[int] | Array | Tensor, known: int, source: str) -> Array:
    array = np.asarray(labels)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"labels must be integers of the shape (N,), got the shape {array.shape} and dtype {array.dtype}"
        )
    if array.size and not 0 <= array.min() <= array.max() < known:
        raise ValueError(
            f"labels must be 0..{known - 1}, places in {source}, got {array.min()} to {array.max()}"
        )
    return array.astype(np.int64)


def _line_width(height: int, width: int) -> int:
    return max(1, round(0.5 + (height * width) ** 0.5 / 400))


def draw_objects(
    image: Array | Tensor,
    boxes: Array | Tensor,
    labels: Sequence[int] | Array | Tensor,
    names: Sequence[str],
    palette: Sequence[Colour],
    scores: Array | Tensor | None = None,
    masks: Array | Tensor | None = None,
) -> Picture:
    """Draw boxes, masks, class names and scores over an image, each object in a shade of its class.

    The best (without scores: the largest) objects get their tag with name and score first. A tag that would cover
    another, or a good part of a box, is left out, and so are names where there are many objects of one class alone:
    the objects stay visible however many they are.

    Args:
        image: ``(H, W, 3)`` uint8.
        boxes: ``(N, 4)``, corners ``x1, y1, x2, y2`` in pixels; parts outside the image are not drawn.
        labels: ``(N,)``, integers ``0..K-1``.
        names: of the K classes.
        palette: RGB of each class.
        scores: ``(N,)``, 0 to 1.
        masks: ``(N, H, W)`` bool or uint8 (not 0 is inside).

    Returns:
        ``(H, W, 3)`` uint8. Lines and letters grow with the picture.

    Raises:
        ValueError: for arrays of other shapes, a label without a name or colour, or a box that is not finite or
            of negative size.
    """
    picture = as_picture(image).copy()
    height, width = picture.shape[:2]
    boxes = np.asarray(boxes, dtype=np.float64)
    labels = _checked_labels(labels, min(len(names), len(palette)), "names and palette")
    count = len(boxes)
    confidences = None if scores is None else np.asarray(scores, dtype=np.float64)
    areas = None if masks is None else np.asarray(masks) != 0
    for name, values, shape in (
        ("boxes", boxes, (count, 4)),
        ("labels", labels, (count,)),
        ("scores", confidences, (count,)),
        ("masks", areas, (count, height, width)),
    ):
        if values is not None and values.shape != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {values.shape}")
    sides = boxes[:, 2:] - boxes[:, :2]
    if not np.isfinite(boxes).all() or (sides < 0).any():
        raise ValueError("boxes must be finite corners x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    line = _line_width(height, width)
    colours = instance_colours(labels.tolist(), palette)
    largest_first = np.argsort(-sides.prod(1), kind="stable").tolist()
    if areas is not None:
        for index in largest_first:
            _paint(picture, areas[index], colours[index], line)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas, "RGBA")
    limits = np.array([width, height, width, height])
    boxes = np.clip(boxes, 0, limits)
    corners = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1).astype(int)
    for index in largest_first:
        left, top, right, bottom = corners[index].tolist()
        if right > left and bottom > top:
            box = (left, top, right - 1, bottom - 1)
            if areas is None:
                draw.rectangle(box, outline=colours[index], width=line)
            else:  # beside the mask a box says little: fainter
                draw.rectangle(box, outline=(*colours[index], 140), width=(line + 1) // 2)
    order = largest_first if confidences is None else np.argsort(-confidences, kind="stable").tolist()
    numbers = [""] * count if confidences is None else [f"{score:.2f}" for score in confidences]
    shown = [readable(name, NAME_LETTERS) for name in names]
    texts = [f"{shown[label]} {number}".strip() for label, number in zip(labels, numbers, strict=True)]
    tags = _Tags(width, height)
    if tags.share(texts) > _TAG_SHARE and len(set(labels.tolist())) == 1:
        texts = numbers  # hundreds of one name say nothing
    for index in order:
        tags.draw(draw, texts[index], corners, index, colours[index])
    return np.asarray(canvas)


def _paint(picture: Picture, mask: Array, colour: Colour, line: int) -> None:
    """Blend one mask into the picture, its rim opaque."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside, part = mask[window], picture[window]
    rim = inside & _grown(np.pad(~inside, line, constant_values=True), line)[line:-line, line:-line]
    painted = overlay(part, np.where(inside, 0, -1), [colour], alpha=0.45)
    painted[rim] = colour
    part[...] = painted


class _Tags:
    """Places for small texts in a picture, none over another."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        letters = round(8 + (width * height) ** 0.5 / 85)
        self.font, self.margin = load_font(letters), max(1, letters // 6)
        self.tag_height = letters + 2 * self.margin
        self.taken = np.zeros((0, 4), dtype=int)

    def _tag_width(self, text: str) -> int:
        return int(self.font.getlength(text)) + 2 * self.margin + 1

    def share(self, texts: Sequence[str]) -> float:
        """Share of the picture that tags of the texts cover."""
        return sum(map(self._tag_width, texts)) * self.tag_height / (self.width * self.height)

    def draw(self, draw: ImageDraw.ImageDraw, text: str, corners: Array, index: int, colour: Colour) -> None:
        """Draw the tag of one object at its box, if there is room.

        Args:
            draw: what to draw on.
            text: shortened if the picture is too narrow for it.
            corners: ``(N, 4)`` boxes of all objects.
            index: of the object.
            colour: of the tag.
        """
        while text and self._tag_width(text) > self.width:
            text = text[:-2] + "…" if len(text) > 2 else ""
        width, height = self._tag_width(text), self.tag_height
        covered = (self.taken[:, 2:] - self.taken[:, :2]).prod(1).sum() + width * height
        if not text or (len(self.taken) and covered > _TAG_SHARE * self.width * self.height):
            return
        areas = (corners[:, 2:] - corners[:, :2]).prod(1)
        left, top, right, bottom = corners[index].tolist()
        if left >= right or top >= bottom:  # outside the picture
            return
        for x, y in (
            (left, top - height),
            (left, top),
            (left, bottom),
            (right - width, top - height),
            (left, bottom - height),
        ):
            x = min(max(x, 0), self.width - width)
            place = np.array([x, y, x + width, y + height])
            if (
                0 <= y <= self.height - height
                and not _common(place, self.taken).any()
                and not (_common(place, corners) > 0.3 * areas).any()
            ):
                self.taken = np.vstack([self.taken, place])
                draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
                middle, ink = y + height / 2, _DARK if _is_light(colour) else _LIGHT
                draw.text((x + self.margin, middle), text, font=self.font, fill=ink, anchor="lm")
                return


def _common(place: Array, others: Array) -> Array:
    """Pixels that a box has in common with each of the others."""
    sides = np.minimum(place[2:], others[:, 2:]) - np.maximum(place[:2], others[:, :2])
    return np.maximum(sides, 0).prod(1)


def _boundaries(segments: Array, line: int) -> Array:
    """Pixels at which a segment meets another, as a line of about that width."""
    edge = np.zeros(segments.shape, dtype=bool)
    edge[:, :-1] |= segments[:, :-1] != segments[:, 1:]
    edge[:-1] |= segments[:-1] != segments[1:]
    return _grown(edge, (line - 1) // 2)


def colour_segments(
    segments: Array | Tensor,
    labels: Sequence[int] | Array | Tensor,
    palette: Sequence[Colour],
    is_thing: Sequence[bool],
    image: Array | Tensor | None = None,
    alpha: float = 0.6,
) -> Picture:
    """Paint a panoptic segmentation: stuff in the colour of its class, each thing in a shade of it.

    Args:
        segments: ``(H, W)``, integers: j for the j-th segment, from 1; whatever else is void and grey.
        labels: ``(N,)``, integers ``0..K-1``: the class of each segment.
        palette: RGB of the K classes.
        is_thing: for each class whether it has instances.
        image: ``(H, W, 3)`` uint8; where given, the colours are blended over it, and void keeps the image.
        alpha: weight of the colours over an image, 0 to 1.

    Returns:
        ``(H, W, 3)`` uint8, segments set off by a thin line: black between two light colours, else white.

    Raises:
        ValueError: for arrays of other shapes, or a label without a colour.
    """
    labels = _checked_labels(labels, min(len(palette), len(is_thing)), "palette and is_thing").tolist()
    places = as_mask(segments).astype(np.int64) - 1
    things = instance_colours([label for label in labels if is_thing[label]], palette)
    colours = [things.pop(0) if is_thing[label] else palette[label] for label in labels]
    places[(places < 0) | (places >= len(colours))] = -1
    picture = colour_mask(places, colours) if image is None else overlay(image, places, colours, alpha)
    line = _line_width(*places.shape)
    edge = _boundaries(places, line)
    dark = np.array([not _is_light(colour) for colour in [*colours, IGNORED_COLOUR]])[places]
    white = _grown(dark, line)  # where either side is dark
    picture[edge & white], picture[edge & ~white] = _LIGHT, _DARK
    return picture


def plot_precision_recall(
    curves: Mapping[str, Sequence[float] | Array | Tensor],
    *,
    title: str = "",
    dark: bool = False,
    size: tuple[float, float] = (5.2, 3.4),
) -> Figure:
    """Plot precision over recall, each name with the mean of its curve, which is its average precision.

    Args:
        curves: for each name the 101 precisions at the recalls 0, 0.01, ..., 1, as
            :meth:`freqfusion.metrics.CocoMetric.compute` gives them. A curve of NaN (there was nothing to find) is
            named, but not drawn.
        title: set above, on the left.
        dark: for a dark page; else for a white one. Both have a transparent ground.
        size: width and height in inches.

    Raises:
        ValueError: for a curve of another length, or with values below 0 or above 1.
    """
    recalls = np.linspace(0, 1, 101).tolist()
    points = {}
    for name, curve in curves.items():
        values = np.asarray(curve, dtype=np.float64)
        if values.shape != (101,) or (values < 0).any() or (values > 1).any():
            raise ValueError(
                f"the curve {name!r} must have 101 precisions from 0 to 1, got the shape {values.shape} and values "
                f"from {values.min(initial=np.inf)} to {values.max(initial=-np.inf)}"
            )
        mean = "no objects" if np.isnan(values).any() else f"AP {values.mean():.3f}"
        points[f"{name}, {mean}"] = list(zip(recalls, values.tolist(), strict=True))
    figure = plot_curves(
        points, title=title, x_label="recall", y_label="precision", whole_steps=False, dark=dark, size=size
    )
    figure.axes[0].set_xlim(0, 1)
    figure.axes[0].set_ylim(0, 1.02)
    return figure
