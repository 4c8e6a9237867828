"""Upsampled features as pictures and as a page with an explorer."""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import freqfusion
from freqfusion.analysis.explorer import BUDGET, MAX_CELLS, MAX_DIMS, Scene, build_explorer, thin
from freqfusion.drawing.figures import Picture, as_picture, picture_strip
from freqfusion.drawing.page_parts import Code, Html, Report, Section, Strip, Text, write_report

COARSE = "coarse"
"""The encoder's own features among the variants."""
COLOURS = 3
QUANTILES = (0.01, 0.99)
"""Of a principal component over the coarse features: what is drawn dark, and what bright."""
COLUMNS = 4
"""Pictures beside each other in a file, at most; more go below."""
PAGE = 1080
"""Width that the pictures of an image fill on the page, pixels."""


class PrincipalColours:
    """Colours for features: their first three principal components as red, green and blue.

    Axes and scale are those of the features it is made from, so that the same colour means the same features in every
    map that it draws.

    Args:
        features: ``(C, h, w)``, floating point, finite.

    >>> features = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])[:, None]
    >>> PrincipalColours(features)(features)[0, :, 0].tolist()
    [0, 127, 255]
    """

    def __init__(self, features: Tensor) -> None:
        pixels = features.detach().cpu().flatten(1).mT.double()  # not every device has doubles
        self.centre = pixels.mean(0)
        pixels = pixels - self.centre
        _, axes = torch.linalg.eigh(pixels.mT @ pixels)  # ascending
        axes = axes[:, -COLOURS:].flip(1)
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        self.axes = axes * largest.sign()  # an axis has no sign of its own
        self.low, self.high = (pixels @ self.axes).quantile(torch.tensor(QUANTILES).double(), dim=0)

    def __call__(self, features: Tensor) -> Picture:
        """``(C, H, W)`` as ``(H, W, 3)`` uint8; values beyond the scale are drawn as its ends."""
        axes = self.axes.float().to(features.device)
        values = torch.einsum("chw,cd->hwd", features.detach().float(), axes).cpu().double()
        values -= self.centre @ self.axes
        spread = (self.high - self.low).clamp_min(torch.finfo(torch.float32).tiny)
        shades = ((values - self.low) / spread).clamp(0, 1) * 255
        picture = np.zeros((*features.shape[-2:], COLOURS), np.uint8)
        picture[..., : shades.shape[2]] = shades.byte().numpy()
        return picture


@dataclass(frozen=True)
class Upsampled:
    """An image and what was made of it."""

    name: str
    image: Picture
    colours: Mapping[str, Picture]
    """By variant, :data:`COARSE` first."""
    maps: Mapping[str, np.ndarray]
    """By variant, ``(h, w, C)`` as :func:`~freqfusion.analysis.explorer.thin` makes them, for the explorer."""


def cells_of(images: int, variants: int) -> int:
    """How many pixels of a map the explorer of so many images with so many maps each has room for."""
    return min(4 * MAX_CELLS, max(MAX_CELLS, BUDGET // (max(1, images) * variants * MAX_DIMS)))


def observe_maps(name: str, image: Tensor, maps: Iterable[tuple[str, Tensor]], cells: int) -> Upsampled:
    """Draw maps and keep of them what a page needs.

    Args:
        name: of the image.
        image: ``(3, H, W)`` in [0, 1].
        maps: variants with their features ``(C, h, w)``, one at a time; the first gives the colours of all.
        cells: pixels of a map that are kept.

    Raises:
        ValueError: for values that are not finite.
    """
    colours: PrincipalColours | None = None
    drawn, kept = {}, {}
    for variant, features in maps:
        kept[variant] = thin(features, cells)
        colours = colours or PrincipalColours(features)
        drawn[variant] = colours(features)
    picture = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Upsampled(name, as_picture(picture), drawn, kept)


def draw_strip(upsampled: Upsampled) -> Picture:
    """The image and its maps side by side, all at the size of the largest."""
    pictures = {"image": upsampled.image, **upsampled.colours}
    size = max((picture.shape[:2] for picture in pictures.values()), key=math.prod)
    titles = list(pictures)
    shown = [_resized(picture, size) for picture in pictures.values()]
    columns = math.ceil(len(shown) / math.ceil(len(shown) / COLUMNS))  # rows of about one length
    strips = [
        picture_strip([shown[start : start + columns]], titles[start : start + columns])
        for start in range(0, len(shown), columns)
    ]
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate(
        [
            np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255)
            for strip in strips
        ]
    )


def _resized(picture: Picture, size: tuple[int, int]) -> Picture:
    """Of that height and width; enlarged pixels stay squares."""
    smaller = size[1] < picture.shape[1]
    how = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize(size[::-1], how))


def write_upsampled(
    images: Sequence[Upsampled], out: Path, encoder: str, notes: Sequence[str] = (), command: str = ""
) -> None:
    """Write ``report.html`` with the pictures and an explorer of single pixels.

    Args:
        images: at least one, all with the same variants.
        out: the folder.
        encoder: whose features they are.
        notes: what the reader must know, such as that weights are random.
        command: how to do it again.

    Raises:
        ValueError: for more images than fit on a page.
    """
    variants = list(images[0].maps)
    scenes = [
        Scene(one.name, {encoder: one.maps}, np.full(one.image.shape[:2], -1), one.image) for one in images
    ]
    several = len(variants) > 2
    explorer = build_explorer(scenes, [], [], (variants[1 if several else 0], variants[-1]))
    kept = [packed.kept for packed in explorer.packed.values()]
    methods = ", ".join(variants[1:])
    report = Report(
        title="freqfusion features",
        headline=f"Features of {encoder}, upsampled",
        lede=f"What the features of a frozen encoder look like at the resolution of the image, by {methods}.",
        sections=[
            Section("", [*map(Text, notes), *map(_strip, images)]),
            Section(
                "Explorer",
                [
                    Text(
                        "Click a pixel: each map shows how alike the features of all others are to it. Both maps "
                        "share one scale. A good map is bright on the thing that was clicked and dark beyond "
                        "its edge."
                    ),
                    Html(explorer.html),
                    Text(
                        f"Features are held here with 8 bits on at most {explorer.dims} principal axes, which keep "
                        f"{100 * min(kept):.1f} % to {100 * max(kept):.1f} % of a map's squared length; of large "
                        "maps some pixels were picked, evenly spread."
                    ),
                ],
            ),
            Section(
                "How it was done",
                [
                    Text(
                        "Each image went through the encoder once; its last layer after the final norm is called "
                        f"{COARSE}, unless the command names layers. Colours are the first three principal "
                        f"components of the {COARSE} features, the same axes and scale in all pictures of an image: "
                        "the same colour means the same features."
                    ),
                    *([Code(command)] if command else []),
                ],
            ),
        ],
        footer=f"freqfusion {freqfusion.__version__}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}.",
    )
    write_report(out / "report.html", report)


def _strip(one: Upsampled) -> Strip:
    pictures = {"image": one.image, **one.colours}
    width = PAGE // min(len(pictures), COLUMNS)
    height = max(1, round(width * one.image.shape[0] / one.image.shape[1]))
    return Strip(
        list(pictures), [[_resized(picture, (height, width)) for picture in pictures.values()]], one.name
    )
