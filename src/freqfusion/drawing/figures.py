"""Pictures of segmentations: colour masks, overlays, legends, error maps, strips and learning curves.

Images are ``(H, W, 3)`` uint8 RGB, masks ``(H, W)`` integer class indices; NumPy arrays, or CPU tensors
of these shapes. Whatever is not a class of the palette (255, as a rule: ignored) is drawn in grey.
"""

import io
import os
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from freqfusion._files import write_atomically
from freqfusion._text import readable

Array = NDArray[Any]
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

IGNORED_COLOUR: Colour = (128, 128, 128)
NAME_LETTERS = 60
"""How many letters of a class's name pictures show."""
WRONG_COLOUR: Colour = (255, 96, 32)
CORRECT_COLOUR: Colour = (24, 24, 28)

# Okabe and Ito's palette, told apart by every common kind of colour vision (jfly.uni-koeln.de/color, 2008);
# each entry is (on white, on black), the second lighter where the first would sink into a dark page.
_LINE_COLOURS = (
    ("#0072B2", "#56B4E9"),
    ("#D55E00", "#F28E2B"),
    ("#009E73", "#2CC79B"),
    ("#CC79A7", "#E3A5C7"),
    ("#7A5C00", "#F0E442"),
)
_LINE_STYLES = ("-", "-", "--", "-.", ":")


def as_picture(image: Array | Tensor) -> Picture:
    """The image as an array; a ValueError if it is not ``(H, W, 3)`` uint8."""
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"expected an image of shape (H, W, 3) and dtype uint8, got shape {array.shape} and dtype "
            f"{array.dtype}; move the channels of a tensor last with .permute(1, 2, 0)"
        )
    return array


def as_mask(mask: Array | Tensor) -> Array:
    """The mask as an array; a ValueError if it is not ``(H, W)`` of integers."""
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            f"expected a mask of shape (H, W) with integer class indices, got shape {array.shape} and "
            f"dtype {array.dtype}"
        )
    return array


def check_same_size(first: Array, second: Array, names: str) -> None:
    """Raise a ValueError that begins with ``names`` unless both have one height and width."""
    if first.shape[:2] != second.shape[:2]:
        raise ValueError(f"{names} differ in size: {first.shape[:2]} and {second.shape[:2]}")


def _dimmed(image: Picture) -> Picture:
    """A dark greyscale ground, on which bright marks stand out."""
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.uint16)
    return np.repeat((CORRECT_COLOUR[0] + grey * 90 // 255).astype(np.uint8)[..., None], 3, axis=2)


def colour_mask(mask: Array | Tensor, palette: Sequence[Colour]) -> Picture:
    """Paint every pixel in the colour of its class.

    Args:
        mask: ``(H, W)`` class indices.
        palette: RGB of each class, 0 to 255.

    Returns:
        ``(H, W, 3)`` uint8; indices outside the palette are grey.
    """
    mask = as_mask(mask)
    colours = np.array([*palette, IGNORED_COLOUR], dtype=np.uint8)
    inside = (mask >= 0) & (mask < len(palette))
    return colours[np.where(inside, mask, len(palette))]


def overlay(
    image: Array | Tensor, mask: Array | Tensor, palette: Sequence[Colour], alpha: float = 0.55
) -> Picture:
    """Blend the colour mask over the image.

    Args:
        image: ``(H, W, 3)`` uint8.
        mask: ``(H, W)`` class indices.
        palette: RGB of each class.
        alpha: weight of the colours, 0 (image alone) to 1 (mask alone). Ignored pixels keep the image.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    image, mask = as_picture(image), as_mask(mask)
    check_same_size(image, mask, "image and mask")
    # Integer weights in 16 bits: float copies of a very large image would take twice the memory and more.
    weight = np.uint16(round(alpha * 256))
    blended = colour_mask(mask, palette).astype(np.uint16) * weight
    blended += image.astype(np.uint16) * (np.uint16(256) - weight)
    blended += np.uint16(128)
    inside = (mask >= 0) & (mask < len(palette))
    return np.where(inside[..., None], (blended >> 8).astype(np.uint8), image)


def error_map(
    pred: Array | Tensor,
    target: Array | Tensor,
    ignore_index: int = 255,
    image: Array | Tensor | None = None,
) -> Picture:
    """Show where a prediction is wrong: bright orange on a dark ground, ignored pixels grey.

    Args:
        pred: ``(H, W)`` predicted class indices.
        target: ``(H, W)`` true class indices.
        ignore_index: value of ``target`` that is not judged.
        image: ``(H, W, 3)`` uint8; where given, a dimmed greyscale of it is the ground.
    """
    pred, target = as_mask(pred), as_mask(target)
    check_same_size(pred, target, "prediction and truth")
    if image is None:
        result = np.full((*target.shape, 3), CORRECT_COLOUR, dtype=np.uint8)
    else:
        image = as_picture(image)
        check_same_size(image, target, "image and truth")
        result = _dimmed(image)
    ignored = target == ignore_index
    result[(pred != target) & ~ignored] = WRONG_COLOUR
    result[ignored] = IGNORED_COLOUR
    return result


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures, ``size`` in pixels."""
    # Matplotlib ships DejaVu, which has the letters of most languages; no system font is relied on.
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size)


def legend(
    names: Sequence[str],
    colours: Sequence[Colour],
    shares: Sequence[float] | None = None,
    *,
    font_size: int = 14,
    height: int | None = None,
) -> Picture:
    """Draw a legend on white: for each class a swatch, its name and its share of the pixels.

    Args:
        names: class names, in the order in which they are to appear.
        colours: their RGB colours.
        shares: their shares, 0 to 1; left out where None.
        font_size: pixels.
        height: height to fill; further columns are opened when the classes need more. None: one column.

    Returns:
        ``(height or as needed, W, 3)`` uint8. A ``height`` too small for eight rows grows to eight.
    """
    if len(names) != len(colours) or (shares is not None and len(shares) != len(names)):
        raise ValueError(
            f"names, colours and shares must be of one length, got {len(names)}, {len(colours)} and "
            f"{'none' if shares is None else len(shares)}"
        )
    names = [readable(name, NAME_LETTERS) for name in names]
    font = load_font(font_size)
    margin, swatch, row = font_size // 2 + 2, font_size, round(font_size * 1.6)
    room = None if height is None else (height - 2 * margin) // row
    rows = max(len(names), 1) if room is None else min(max(room, 8), max(len(names), 1))
    needed = 2 * margin + rows * row
    percents = [""] * len(names) if shares is None else [format_share(share) for share in shares]
    columns = [slice(start, start + rows) for start in range(0, len(names), rows)]
    name_widths = [max(round(font.getlength(name)) for name in names[column]) for column in columns]
    share_widths = [max(round(font.getlength(text)) for text in percents[column]) for column in columns]
    gap = font_size // 2
    share_widths = [width + 2 * gap if width else 0 for width in share_widths]
    widths = [
        swatch + gap + name + share + 2 * gap for name, share in zip(name_widths, share_widths, strict=True)
    ]
    canvas = Image.new(
        "RGB", (2 * margin + max(sum(widths) - 2 * gap, 1), max(needed, height or 0)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(canvas)
    left = margin
    for column, width, name_width, share_width in zip(
        columns, widths, name_widths, share_widths, strict=True
    ):
        right = left + swatch + gap + name_width + share_width
        for index, (name, colour, percent) in enumerate(
            zip(names[column], colours[column], percents[column], strict=True)
        ):
            top = margin + index * row + (row - swatch) // 2
            box = (left, top, left + swatch - 1, top + swatch - 1)
            draw.rectangle(box, fill=tuple(colour), outline=(90, 90, 90))
            middle = top + swatch // 2
            draw.text((left + swatch + gap, middle), name, font=font, fill=(20, 20, 20), anchor="lm")
            if percent:
                draw.text((right, middle), percent, font=font, fill=(90, 90, 90), anchor="rm")
        left += width
    return np.asarray(canvas)


def format_share(share: float) -> str:
    """A share as a percentage that never rounds something to nothing.

    >>> format_share(0.1234), format_share(0.00001), format_share(0.0)
    ('12.3%', '<0.1%', '0.0%')
    """
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def beside(left: Picture, right: Picture) -> Picture:
    """Two pictures side by side, both at the top, the lower one filled up with white."""
    height = max(left.shape[0], right.shape[0])
    canvas = np.full((height, left.shape[1] + right.shape[1], 3), 255, dtype=np.uint8)
    canvas[: left.shape[0], : left.shape[1]] = left
    canvas[: right.shape[0], left.shape[1] :] = right
    return canvas


def zoom(picture: Picture, factor: int) -> Picture:
    """Enlarge by a whole factor, each pixel to a square (nearest neighbour), so that pixels can be seen."""
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def densest_window(weights: Array, size: int) -> tuple[int, int]:
    """Top and left of the square of ``size`` pixels (the map's shorter side at most) with the largest sum.

    Args:
        weights: ``(H, W)`` whole numbers, or booleans, such as a map of errors.
        size: side of the square.
    """
    size = min(size, *weights.shape)
    sums = np.pad(weights.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    windows = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    top, left = np.unravel_index(windows.argmax(), windows.shape)
    return int(top), int(left)


def draw_box(picture: Picture, box: tuple[int, int, int, int], colour: Colour = (255, 255, 255)) -> Picture:
    """A copy with a one-pixel frame around ``(top, left, height, width)``, just inside the box."""
    top, left, height, width = box
    framed = Image.fromarray(as_picture(picture))
    ImageDraw.Draw(framed).rectangle((left, top, left + width - 1, top + height - 1), outline=tuple(colour))
    return np.asarray(framed)


def picture_strip(
    rows: Sequence[Sequence[Picture]],
    titles: Sequence[str],
    *,
    font_size: int = 16,
    gap: int = 8,
) -> Picture:
    """Set pictures in a grid on white, a title over each column.

    Args:
        rows: pictures of each row; all of one row of one height, all of one column of one width.
        titles: one for each column; a title wider than its column is set smaller until it fits.
        font_size: largest size of the titles, pixels.
        gap: pixels between and around the pictures.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(
            f"each row needs one picture for each of the {len(titles)} titles, got rows of "
            f"{[len(row) for row in rows]}"
        )
    widths = [picture.shape[1] for picture in rows[0]]
    heights = [row[0].shape[0] for row in rows]
    for row_index, row in enumerate(rows):
        for column_index, picture in enumerate(row):
            expected = (heights[row_index], widths[column_index])
            if picture.shape[:2] != expected:
                raise ValueError(
                    f"the picture in row {row_index}, column {column_index} has size {picture.shape[:2]}, "
                    f"its row and column need {expected}"
                )
    size = font_size
    while size > 6 and any(load_font(size).getlength(t) > w for t, w in zip(titles, widths, strict=True)):
        size -= 1
    header = round(size * 1.5) + gap
    canvas = Image.new(
        "RGB",
        (gap + sum(w + gap for w in widths), header + sum(h + gap for h in heights)),
        (255, 255, 255),
    )
    draw = ImageDraw.Draw(canvas)
    left = gap
    for column_index, (title, width) in enumerate(zip(titles, widths, strict=True)):
        middle = left + width / 2
        draw.text((middle, header // 2), title, font=load_font(size), fill=(20, 20, 20), anchor="mm")
        top = header
        for row, height in zip(rows, heights, strict=True):
            canvas.paste(Image.fromarray(as_picture(row[column_index])), (left, top))
            top += height + gap
        left += width + gap
    return np.asarray(canvas)


def png_bytes(picture: Array, palette: Sequence[Colour] | None = None) -> bytes:
    """A picture as PNG.

    Args:
        picture: ``(H, W, 3)`` uint8, ``(H, W)`` uint8 (greyscale, or indices where ``palette`` is given)
            or ``(H, W)`` uint16.
        palette: colours of a ``(H, W)`` uint8 picture, at most 256.
    """
    if not (
        (picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8)
        or (picture.ndim == 2 and picture.dtype in (np.uint8, np.uint16))
    ):
        raise ValueError(
            "expected (H, W, 3) uint8, (H, W) uint8 or (H, W) uint16, got "
            f"shape {picture.shape} and dtype {picture.dtype}"
        )
    image = Image.fromarray(np.ascontiguousarray(picture))
    if palette is not None:
        if image.mode != "L" or len(palette) > 256:
            raise ValueError(
                f"a palette needs a (H, W) uint8 picture and at most 256 colours, got dtype {picture.dtype} "
                f"and {len(palette)} colours"
            )
        image.putpalette([channel for colour in palette for channel in colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | Path, picture: Array, palette: Sequence[Colour] | None = None) -> None:
    """Write a PNG atomically; arguments as in :func:`png_bytes`."""
    write_atomically(path, png_bytes(picture, palette))


def save_index_png(path: str | Path, mask: Array | Tensor, palette: Sequence[Colour]) -> None:
    """Write class indices as a PNG whose pixel values are the indices.

    Up to 255 classes: 8 bits with the palette, so that viewers show the class colours. More: 16 bits grey.

    Args:
        path: the file.
        mask: ``(H, W)`` class indices.
        palette: RGB of each class; its length is the number of classes.
    """
    mask = as_mask(mask)
    wide = len(palette) > 255
    largest = 65535 if wide else 255
    if mask.size and not 0 <= int(mask.min()) <= int(mask.max()) <= largest:
        raise ValueError(f"indices must be 0 to {largest}, got {int(mask.min())} to {int(mask.max())}")
    if wide:
        save_png(path, mask.astype(np.uint16))
    else:
        rest = [IGNORED_COLOUR] * (256 - len(palette))
        save_png(path, mask.astype(np.uint8), [*palette, *rest])


def _dress(axes: Axes, title: str, x_label: str, y_label: str, ink: str, faint: str) -> None:
    """Titles, grid and ticks as every figure here has them."""
    axes.set_title(title, loc="left", fontsize=11, color=ink, fontweight="bold")
    axes.set_xlabel(x_label, fontsize=10, color=ink)
    axes.set_ylabel(y_label, fontsize=10, color=ink)
    axes.tick_params(colors=ink, labelsize=9, length=0)
    axes.grid(color=faint, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(faint)


def plot_curves(
    histories: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "",
    whole_steps: bool = True,
    log_y: bool = False,
    dark: bool = False,
    size: tuple[float, float] = (5.2, 3.4),
) -> Figure:
    """Plot named curves in one frame.

    Args:
        histories: for each name its points ``(step, value)``; few points get markers.
        title: set above, on the left.
        x_label, y_label: of the axes.
        whole_steps: ticks of the x axis at whole numbers only.
        log_y: a logarithmic y axis; values must be above 0.
        dark: for a dark page; else for a white one. Both have a transparent ground.
        size: width and height in inches.
    """
    ink, faint = ("#E8E8EA", "#3A3B40") if dark else ("#222222", "#DDDDDD")
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(histories.items()):
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            label=name,
            color=_LINE_COLOURS[index % len(_LINE_COLOURS)][dark],
            linestyle=_LINE_STYLES[index % len(_LINE_STYLES)],
            linewidth=1.8,
            marker="os^Dv"[index % 5] if len(points) <= 30 else None,
            markersize=4.5,
        )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole_steps))
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    _dress(axes, title, x_label, y_label, ink, faint)
    if histories:
        axes.legend(fontsize=9, frameon=False, labelcolor=ink)
    return figure


def plot_bars(
    values: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    x_label: str = "",
    highlight: str = "",
    dark: bool = False,
    size: tuple[float, float] = (5.2, 3.4),
) -> Figure:
    """Horizontal bars of means, first on top, with a dot for every value.

    Bars start where differences can be seen, not at zero; the axis says where.

    Args:
        values: for each name its values, at least one.
        title: set above, on the left.
        x_label: of the value axis.
        highlight: the name whose bar is set off.
        dark: for a dark page; else for a white one. Both have a transparent ground.
        size: width and height in inches.
    """
    ink, faint = ("#E8E8EA", "#3A3B40") if dark else ("#222222", "#DDDDDD")
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.subplots()
    means = [sum(entries) / len(entries) for entries in values.values()]
    every = [entry for entries in values.values() for entry in entries]
    room = max(max(every) - min(every), 1e-6)
    start = max(0.0, min(every) - 0.35 * room)
    for row, (name, entries) in enumerate(values.items()):
        colour = _LINE_COLOURS[name == highlight][dark]
        axes.barh(row, means[row] - start, left=start, color=colour, alpha=0.55, height=0.7)
        axes.scatter(entries, [row] * len(entries), s=14, color=ink, zorder=3)
        axes.text(max(entries) + 0.02 * room, row, f" {means[row]:.1f}", va="center", fontsize=8.5, color=ink)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlim(start, max(every) + 0.16 * room)
    _dress(axes, title, x_label, "", ink, faint)
    axes.grid(visible=False, axis="y")
    return figure


def plot_paired_bars(
    values: Mapping[str, Mapping[str, float]],
    *,
    title: str = "",
    x_label: str = "",
    dark: bool = False,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Horizontal bars from zero, for each row one bar a series; a row's bars stand together, with their values.

    Args:
        values: for each row, at least one, its finite values by series; a series may be missing in a row.
        title: set above, on the left.
        x_label: of the value axis.
        dark: for a dark page; else for a white one. Both have a transparent ground.
        size: width and height in inches; by default as high as the rows need.
    """
    ink, faint = ("#E8E8EA", "#3A3B40") if dark else ("#222222", "#DDDDDD")
    series = list(dict.fromkeys(name for row in values.values() for name in row))
    if size is None:
        size = (5.2, 1.1 + (0.2 * len(series) + 0.1) * len(values))
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.subplots()
    thickness = 0.84 / len(series)
    for place, name in enumerate(series):
        rows = [row for row, entry in enumerate(values.values()) if name in entry]
        widths = [entry[name] for entry in values.values() if name in entry]
        bars = axes.barh(
            [row + (place + 0.5) * thickness - 0.42 for row in rows],
            widths,
            height=0.92 * thickness,
            color=_LINE_COLOURS[place % len(_LINE_COLOURS)][dark],
            label=name,
        )
        axes.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=8, color=ink)
    # a dollar sign would begin a formula
    axes.set_yticks(range(len(values)), [readable(name, NAME_LETTERS).replace("$", r"\$") for name in values])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.axvline(0, color=ink, linewidth=0.8)
    _dress(axes, title, x_label, "", ink, faint)
    axes.grid(visible=False, axis="y")
    figure.legend(
        loc="outside lower center", ncols=min(len(series), 2), fontsize=9, frameon=False, labelcolor=ink
    )
    return figure


def plot_histograms(
    counts: Mapping[str, Sequence[float]],
    edges: Sequence[float],
    *,
    title: str = "",
    x_label: str = "",
    dark: bool = False,
    size: tuple[float, float] = (5.2, 3.4),
) -> Figure:
    """Histograms over the same bins as outlines in one frame, each as shares of its own sum.

    Args:
        counts: for each name how many values fell into each bin; with at least one value.
        edges: of the bins, one more than bins.
        title: set above, on the left.
        x_label: of the value axis.
        dark: for a dark page; else for a white one. Both have a transparent ground.
        size: width and height in inches.

    Raises:
        ValueError: for a histogram without values or of another number of bins.
    """
    ink, faint = ("#E8E8EA", "#3A3B40") if dark else ("#222222", "#DDDDDD")
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.subplots()
    for index, (name, entries) in enumerate(counts.items()):
        if len(entries) != len(edges) - 1 or not sum(entries) > 0:
            raise ValueError(
                f"the histogram {name!r} needs {len(edges) - 1} counts with a sum above 0, got {len(entries)} with "
                f"the sum {sum(entries)}"
            )
        colour = _LINE_COLOURS[index % len(_LINE_COLOURS)][dark]
        shares = 100 * np.asarray(entries, dtype=np.float64) / sum(entries)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.16)
        axes.stairs(
            shares,
            edges,
            label=name,
            color=colour,
            linewidth=1.8,
            linestyle=_LINE_STYLES[index % len(_LINE_STYLES)],
        )
    _dress(axes, title, x_label, "share, %", ink, faint)
    axes.legend(fontsize=9, frameon=False, labelcolor=ink)
    return figure


def plot_heat(
    maps: Mapping[str, Array],
    *,
    title: str = "",
    value_label: str = "",
    image: Array | None = None,
    extent: tuple[float, float, float, float] | None = None,
    x_label: str = "",
    y_label: str = "",
    dark: bool = False,
) -> Figure:
    """Maps of values side by side on one scale from zero, with a name over each.

    Args:
        maps: for each name its finite values of 0 or more ``(H, W)``; at least one map.
        title: set above, on the left.
        value_label: of the scale.
        image: ``(H', W', 3)`` uint8, of the same proportions, set to the left of the maps.
        extent: left, right, bottom and top of the maps for axes with ticks there and in the middle; without it there
            are no axes.
        x_label, y_label: of these axes.
        dark: for a dark page; else for a white one. Both have a transparent ground.
    """
    ink = "#E8E8EA" if dark else "#222222"
    panels = len(maps) + (image is not None)
    height, width = next(iter(maps.values())).shape
    labels = 0.0 if extent is None else 0.4
    size = (5.2, min((4.2 - labels) / panels * height / width, 5.2) + 0.65 + labels)
    figure = Figure(figsize=size, dpi=160, layout="compressed")
    frames = list(figure.subplots(1, panels, squeeze=False)[0])
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=ink, fontweight="bold")
    if image is not None:
        frames[0].imshow(as_picture(image))
        frames[0].set_title("image", fontsize=9, color=ink)
    largest = max(float(values.max()) for values in maps.values())
    for axes, (name, values) in zip(frames[panels - len(maps) :], maps.items(), strict=True):
        heat = axes.imshow(values, cmap="viridis", vmin=0, vmax=largest or 1, extent=extent, origin="upper")
        axes.set_title(name, fontsize=9, color=ink)
        axes.set_xlabel(x_label, fontsize=9, color=ink)
    frames[0].set_ylabel(y_label, fontsize=9, color=ink)
    for axes in frames:
        axes.tick_params(colors=ink, labelsize=8, length=0)
        left, right, bottom, top = extent or (0, 0, 0, 0)
        axes.set_xticks([left, (left + right) / 2, right] if extent else [])
        axes.set_yticks([bottom, (bottom + top) / 2, top] if extent and axes is frames[0] else [])
        axes.spines[:].set_visible(False)
    scale = figure.colorbar(heat, ax=frames, fraction=0.06, aspect=14, pad=0.02)
    scale.set_label(value_label, fontsize=9, color=ink)
    scale.ax.tick_params(colors=ink, labelsize=8, length=0)
    scale.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    scale.outline.set_visible(False)
    return figure


def plot_arrows(
    image: Array,
    places: Array,
    arrows: Array,
    *,
    title: str = "",
    unit: float = 1.0,
    unit_name: str = "pixels",
    dark: bool = False,
) -> Figure:
    """Arrows over a dimmed greyscale image, all magnified alike so that they can be seen; a key says by how much.

    Args:
        image: ``(H, W, 3)`` uint8.
        places: ``(N, 2)`` column and row where each arrow begins, in pixels of the image; at least one.
        arrows: ``(N, 2)`` its components along x and y (down), in pixels of the image.
        title: set above, on the left.
        unit: pixels of the image that the key counts as one.
        unit_name: what it calls them.
        dark: for a dark page; else for a white one. Both have a transparent ground.
    """
    ink = "#E8E8EA" if dark else "#222222"
    height, width = as_picture(image).shape[:2]
    figure = Figure(figsize=(5.2, min(5.0 * height / width, 6.5) + 0.8), dpi=160, layout="constrained")
    axes = figure.subplots()
    axes.imshow(_dimmed(image))
    axes.set_title(title, loc="left", fontsize=11, color=ink, fontweight="bold")
    axes.set_axis_off()
    # nearly all arrows end before the second next one begins; a few outliers do not shrink the rest
    room = 1.6 * np.sqrt(height * width / len(places))
    usual = float(np.quantile(np.hypot(*arrows.T), 0.95))
    magnified = room / usual if usual else 1.0
    quiver = axes.quiver(
        *places.T,
        *arrows.T,
        angles="xy",
        scale_units="xy",
        scale=1 / magnified,
        color=_LINE_COLOURS[1][1],
        width=0.004,
        headwidth=4,
        headlength=5,
        headaxislength=4.5,
    )
    key = float(f"{max(usual, 1e-3 * unit) / unit:.1g}")
    name = f"{key:g} {unit_name}"
    axes.quiverkey(
        quiver, 0.92, -0.05, key * unit, name, labelpos="W", labelcolor=ink, fontproperties={"size": 9}
    )
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    return figure


def figure_bytes(figure: Figure, file_format: str = "png", *, transparent: bool = False) -> bytes:
    """A Matplotlib figure as ``png``, ``svg`` or ``pdf``; no global state of pyplot is touched."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, transparent=transparent)
    return buffer.getvalue()


def learning_curve(
    histories: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "",
) -> None:
    """Plot named curves (see :func:`plot_curves`) on white and write them atomically.

    Args:
        histories: for each name its points ``(step, value)``.
        path: the file; its suffix (``.png``, ``.svg``, ``.pdf``) is the format.
        title: set above, on the left.
        x_label, y_label: of the axes.
    """
    figure = plot_curves(histories, title=title, x_label=x_label, y_label=y_label)
    write_atomically(path, figure_bytes(figure, Path(path).suffix.lstrip(".") or "png"))


def plot_scatter(
    points: Mapping[str, tuple[float, float]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    size: tuple[float, float] = (6.8, 4.4),
) -> Figure:
    """Plot named points, x on a logarithmic scale, each with its name beside it.

    A name moves away from its point, and gets a line to it, where others would cover it.

    Args:
        points: for each name ``(x, y)`` with ``x > 0``.
        title: set above, on the left.
        x_label, y_label: of the axes.
        size: width and height in inches.

    Raises:
        ValueError: for an x that is not above 0, or a coordinate that is not finite.
    """
    for name, (x, y) in points.items():
        if not (x > 0 and np.isfinite([x, y]).all()):
            raise ValueError(f"points must be finite with x above 0, got {(x, y)} for {name!r}")
    ink, faint, leader = "#222222", "#DDDDDD", "#999999"
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.margins(0.12)
    xs, ys = [x for x, _ in points.values()], [y for _, y in points.values()]
    axes.scatter(xs, ys, s=40, color=_LINE_COLOURS[0][0], zorder=3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    _dress(axes, title, x_label, y_label, ink, faint)
    figure.draw_without_rendering()  # after which the layout stays, and names can be placed in pixels
    figure.set_layout_engine("none")
    unit = figure.dpi / 72  # pixels of a typographic point
    centres = {name: axes.transData.transform(point) for name, point in points.items()}

    def around(centre: Array, radius: float) -> Bbox:
        return Bbox([centre - radius * unit, centre + radius * unit])

    marks = [around(centre, 4) for centre in centres.values()]
    names: list[Bbox] = []
    lines: list[Bbox] = []
    for name, centre in centres.items():
        extent = renderer.get_text_width_height_descent(name, FontProperties(size=9), False)[:2]
        places = []
        for distance, turn in product((7, 16, 28, 42, 58, 76, 96, 118), range(16)):
            direction = np.array([np.cos(turn * np.pi / 8), np.sin(turn * np.pi / 8)])
            sides = np.sign(direction.round(1)).astype(int)
            corner = centre + distance * unit * direction + (sides - 1) / 2 * extent
            box = Bbox([corner, corner + extent]).padded(unit)
            # at the first distance the name stands by its point, beyond it a line joins the two
            steps = np.arange(5, distance, 2) if distance > 7 else ()
            line = [around(centre + step * unit * direction, 0.5) for step in steps]
            outside = not all(axes.bbox.contains(*point) for point in box.get_points())
            crossing = any(dot.count_overlaps(names) for dot in line)
            badness = (
                outside or box.count_overlaps(names) > 0,
                box.count_overlaps([*marks, *lines]) > 0,
                distance + 40 * crossing,
            )
            places.append((badness, box, line, distance * direction, sides))
        _, box, line, offset, sides = min(places, key=lambda place: place[0])
        names.append(box)
        lines.extend(line)
        axes.annotate(
            name,
            points[name],
            tuple(offset),
            textcoords="offset points",
            ha=("center", "left", "right")[sides[0]],
            va=("center", "bottom", "top")[sides[1]],
            fontsize=9,
            color=ink,
            arrowprops={"arrowstyle": "-", "color": leader, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
            if line
            else None,
        )
    return figure
