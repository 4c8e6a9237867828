"""A page to try the released networks: plain upsampling beside FreqFusion, errors, and the similarity explorer.

    python space/app.py

Everything stays on the machine that runs it: no usage figures are sent, and the page loads nothing from elsewhere.
"""

import html
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from freqfusion._text import readable
from freqfusion.analysis.explorer import Scene, build_explorer, thin
from freqfusion.analysis.measure import AFTER, BEFORE
from freqfusion.analysis.record import Recorded, record_features
from freqfusion.data import read_image, read_mask
from freqfusion.data.images import header_size
from freqfusion.drawing.detections import draw_objects
from freqfusion.drawing.figures import Picture, error_map, format_share, overlay
from freqfusion.drawing.page_parts import Html, Report, Section, render
from freqfusion.metrics import SegmentationMetrics
from freqfusion.prediction.pixels import predict_mask
from freqfusion.training import load_checkpoint
from freqfusion.zoo import released

LONGEST = 1024
"""Longer side of a picture, pixels; what is larger is scaled down."""
MOST_PIXELS = 50_000_000
SURE = 0.5
"""The least score of an object that is drawn and counted."""
CELLS = 64 * 64
"""Pixels of a map in the explorer, at most."""
BOUNDARY = 2
"""Width of the band of boundary IoU, pixels."""
PLAIN = {"_bilinear": "bilinear", "_nearest": "nearest"}
"""What the name of a network's plain partner ends with, and how that upsamples."""
COLOURS = ((240, 200, 80), (86, 180, 233), (204, 121, 167), (0, 158, 115), (213, 94, 0))
INTRO = """# FreqFusion: sharper features for dense prediction
Choose a network and drop a picture of its kind; without one you see its example. The networks are small."""
CSS = ".prose th, .prose td { word-break: normal; overflow-wrap: normal }"
EXPLAINED = (
    "Click a pixel: each map shows how alike the features of all others are to it, before the fusion (the coarse map "
    "enlarged bilinearly) and after. A good map is bright on the thing that was clicked and dark beyond its edge."
)


@dataclass(frozen=True)
class Result:
    """What a network makes of a picture."""

    picture: Picture
    labels: Tensor | None
    """``(H, W)``: the class of every pixel; of objects with masks 1 where there is one; None for boxes alone."""
    counts: dict[str, str]
    """By class its share of the pixels, or its number of objects."""
    maps: dict[str, Recorded]
    """What went into and came out of the network's fusions."""


def partner(name: str) -> tuple[str, str] | None:
    """The plain partner of a network, if there is one, and how that upsamples."""
    found = ((name + end, how) for end, how in PLAIN.items())
    return next((one for one in found if one[0] in released.list_released()), None)


@cache
def load(name: str) -> Any:
    """A released network with its classes, as ``freqfusion predict`` uses it."""
    return load_checkpoint(released.released_folder(name))[0]


def run(name: str, image: Tensor) -> Result:
    """Put an image ``(3, H, W)`` uint8 through a released network."""
    module = load(name)
    pixels, classes = image.permute(1, 2, 0).numpy(), module.classes
    palette = [COLOURS[index % len(COLOURS)] for index in range(len(classes))]
    with record_features(module.network) as maps:
        if module.task == "semantic":
            labels = predict_mask(module.network, image).long()
            shares = torch.bincount(labels.flatten(), minlength=len(classes)) / labels.numel()
            counts = {c: format_share(float(share)) for c, share in zip(classes, shares, strict=True)}
            picture = overlay(pixels, labels - int(classes[0] == "background"), palette)
            return Result(picture, labels, counts, dict(maps))
        found = module.network.find([image / 255], module.inference)[0]
    sure = {key: value[found["scores"] >= SURE] for key, value in found.items()}
    masks = sure["masks"][:, 0] if "masks" in sure else None
    drawn = draw_objects(pixels, sure["boxes"], sure["labels"], classes, palette, sure["scores"], masks)
    numbers = torch.bincount(sure["labels"], minlength=len(classes)).tolist()
    counts = {c: str(number) for c, number in zip(classes, numbers, strict=True)}
    labels = None if masks is None else masks.any(0).long()
    return Result(drawn, labels, counts, unpadded(module, image, maps))


def unpadded(module: Any, image: Tensor, maps: dict[str, Recorded]) -> dict[str, Recorded]:
    """The part of a detector's maps that shows the image, without what it is filled up with."""
    batch, _ = module.network.network.transform([image / 255])
    (height, width), (full_height, full_width) = batch.image_sizes[0], batch.tensors.shape[-2:]
    down, across = height / full_height, width / full_width

    def cut(x: Tensor) -> Tensor:
        return x[..., : max(1, round(down * x.shape[-2])), : max(1, round(across * x.shape[-1]))]

    return {path: Recorded(*(tuple(map(cut, tensors)) for tensors in one)) for path, one in maps.items()}


def read(path: str, truth: str | None, count: int) -> tuple[Tensor, Tensor | None, str]:
    """Picture ``(3, H, W)`` and truth ``(H, W)``, made smaller where they are large, and a note on that.

    Args:
        path: of the picture.
        truth: of its mask: class indices, or of two classes anything above 0 in the foreground.
        count: of classes of pixels.

    Raises:
        ValueError: for a file that cannot be used.
    """
    height, width = header_size(Path(path))
    if height * width > MOST_PIXELS:
        raise ValueError(f"{path}: has more than {MOST_PIXELS // 10**6} megapixels. Make it smaller.")
    image, labels = read_image(path), None
    if truth is not None:
        labels = read_mask(truth)
        if labels.shape != (height, width):
            sizes = f"{labels.shape[1]}x{labels.shape[0]} pixels, the picture {width}x{height}"
            raise ValueError(f"{truth}: has {sizes}. Both must be of one size.")
        labels = (labels > 0).long() if count == 2 else labels
        if ((labels >= count) & (labels != 255)).any():
            raise ValueError(f"{truth}: must hold classes from 0 to {count - 1}, or 255: no truth.")
    if max(height, width) <= LONGEST:
        return image, labels, ""
    size = [max(1, round(side * LONGEST / max(height, width))) for side in (height, width)]
    if labels is not None:
        labels = TF.resize(labels[None], size, InterpolationMode.NEAREST_EXACT)[0]
    note = f"Scaled down from {width}x{height} to {size[1]}x{size[0]} pixels.\n\n"
    return TF.resize(image, size, antialias=True), labels, note


def judge(labels: Tensor, truth: Tensor, count: int) -> dict[str, str]:
    """Scores of one picture by name."""
    metric = SegmentationMetrics(count, boundary_width=BOUNDARY)
    metric.update(labels[None], truth[None])
    scores = metric.compute()
    told = {"mIoU": scores["miou"], f"boundary IoU, {BOUNDARY} pixels": scores["boundary_iou"].nanmean()}
    return {name: f"{float(value):.1%}" for name, value in told.items()}


def explore(name: str, image: Tensor, result: Result) -> str:
    """The explorer of the network's fusions as a page in a frame, which refers to nothing outside itself."""
    maps = {}
    for site, ((fine, coarse), (_, fused)) in result.maps.items():
        before = interpolate(coarse, fine.shape[-2:], mode="bilinear")
        maps[site] = {BEFORE: thin(before[0], CELLS), AFTER: thin(fused[0], CELLS)}
    scene = Scene(name, maps, np.full(image.shape[1:], -1), image.permute(1, 2, 0).numpy())
    parts = [Section("", [Html(build_explorer([scene], [], [], (BEFORE, AFTER)).html)])]
    page = html.escape(render(Report("Explorer", "What the fusion does to features", EXPLAINED, parts)))
    fit = "this.style.height = this.contentDocument.documentElement.scrollHeight + 'px'"
    style = "width: 100%; height: 700px; border: 0"
    return f'<iframe title="Explorer" srcdoc="{page}" onload="{fit}" style="{style}"></iframe>'


def table(title: str, columns: dict[str, dict[str, str]]) -> str:
    """A table in Markdown: a column for each network, a row for each class or score."""
    rows = [[title, *columns], ["---", *["---:"] * len(columns)]]
    for name in next(iter(columns.values())):
        rows.append([readable(name, 60).replace("|", r"\|"), *(column[name] for column in columns.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n"


def show(name: str, picture: str | None, truth: str | None) -> tuple[Any, ...]:
    """What the page shows of a network and a picture; without a picture, of the network's example."""
    module, folder = load(name), Path(released.released_folder(name))
    if picture is None:
        known = folder / "truth.png"
        picture, truth = str(folder / "example.jpg"), truth or (str(known) if known.exists() else None)
    count = len(module.classes) if module.task == "semantic" else 2
    try:
        image, labels, text = read(picture, truth, count)
    except ValueError as error:
        told = str(error).replace(f"{Path(picture).parent}/", "").replace(f"{Path(truth or '').parent}/", "")
        raise gr.Error(html.escape(told), print_exception=False) from error
    result = run(name, image)
    plain = partner(name)
    results = {**({} if plain is None else {plain[1]: run(plain[0], image)}), "FreqFusion": result}
    pixels = image.permute(1, 2, 0).numpy()
    sides = [pixels] if plain is None else []
    names = f"{'the photograph' if plain is None else plain[1]} | FreqFusion"
    title = "share of the pixels" if module.task == "semantic" else f"objects of a score of {SURE:g} or more"
    text += table(title, {how: one.counts for how, one in results.items()})
    errors = gr.update(visible=False)
    judged = {how: one.labels for how, one in results.items() if one.labels is not None}
    if labels is not None and judged:
        wrong = [error_map(predicted, labels, image=pixels) for predicted in judged.values()]
        errors = gr.update(visible=True, value=(*sides, *wrong), label=f"Errors, orange: {names}")
        text += table("this one picture", {how: judge(x, labels, count) for how, x in judged.items()})
    elif truth is not None:
        text += "This network finds boxes, which a mask does not judge."
    slider = gr.update(value=(*sides, *(one.picture for one in results.values())), label=names)
    return slider, errors, text, explore(name, image, result)


def page() -> gr.Blocks:
    """The page."""
    names = [name for name in released.list_released() if not name.endswith(tuple(PLAIN))]
    if not names:
        raise SystemExit("No network is there to show. Run: python -m pip install freqfusion-weights")
    first = next(filter(partner, names), names[0])
    with gr.Blocks(title="FreqFusion", analytics_enabled=False) as blocks:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                network = gr.Dropdown(names, value=first, label="Network")
                picture = gr.File(label="Your picture", file_types=["image"], height=140)
                truth = gr.File(label="Its truth: a PNG, 0 is background", file_types=["image"], height=140)
            with gr.Column(scale=2, min_width=320):
                looks = {"format": "png", "interactive": False, "max_height": 560}
                slider = gr.ImageSlider(**looks)
                text = gr.Markdown()
                errors = gr.ImageSlider(**looks, visible=False)
        explorer = gr.HTML()
        inputs, outputs = [network, picture, truth], [slider, errors, text, explorer]
        options: Any = {"show_progress_on": slider, "api_visibility": "private"}
        gr.on([blocks.load, network.change, truth.upload, truth.clear], show, inputs, outputs, **options)
        # the truth of another picture would not fit
        forgotten = picture.change(lambda: None, None, truth, **options)
        forgotten.then(show, inputs, outputs, **options)
    return blocks


if __name__ == "__main__":
    page().launch(max_file_size="30mb", footer_links=[], css=CSS)
