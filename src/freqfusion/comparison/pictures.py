"""What the methods of a comparison see: the same images for all, as truth and as predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion._spread import spread
from freqfusion.comparison.runs import Comparison
from freqfusion.drawing.figures import Picture, colour_mask, draw_box, error_map
from freqfusion.drawing.page_parts import Strip, Swatches, Text
from freqfusion.tasks.names import find_task
from freqfusion.tasks.pictures import (
    SURE,
    draw_found,
    draw_truth,
    image_bytes,
    predict_labels,
    read_sample,
    resized,
)
from freqfusion.tasks.semantic import IGNORE_INDEX
from freqfusion.training.checkpoints import LAST, load_checkpoint, read_checkpoint, task_of

IMAGES = 3
METHODS_A_STRIP = 7
COLUMN, PAGE = 208, 1080
"""Least width of a picture, and the width that a strip fills where it has few; pixels."""
THIN = 5
"""Parts of a region that a square of this side, in pixels, does not fit into count as thin."""


def draw_pictures(
    comparison: Comparison, root: str | None = None, *, images: bool = True
) -> list[Text | Swatches | Strip]:
    """Truth and predictions on some images, spread evenly over the split that was judged.

    Each method is shown with ``last.ckpt`` of its first seed. Of semantic segmentation there are errors too, and an
    enlarged part, the same for all methods: where the truth has most thin structure.

    Args:
        comparison: the methods, in the order of the columns.
        root: folder of the data, where it is not that of the runs.
        images: show the images; False: the truth alone.

    Raises:
        OSError, ValueError: where data or a checkpoint is missing.
    """
    paths = {method.name: method.runs[0].folder / LAST for method in comparison.methods}
    content = read_checkpoint(next(iter(paths.values())))
    options = dict(content["datamodule_hyper_parameters"])
    data: Any = find_task(task_of(content))[1](**{**options, "root": root or options["root"]})
    split = options[f"{comparison.split}_split"]
    samples = [read_sample(data, split, index) for index in spread(len(data.dataset(split)), IMAGES)]
    columns = [_truth(data, sample, images) for sample in samples]
    title, semantic = next(iter(columns[0])), "mask" in samples[0]
    for name, path in paths.items():
        module = load_checkpoint(path)[0]
        for sample, pictures in zip(samples, columns, strict=True):
            with torch.no_grad():
                pictures[name] = _prediction(module, data, sample, images)
    strips = []
    for sample, pictures in zip(samples, columns, strict=True):
        window = _thin_window(sample["mask"].as_subclass(Tensor)) if semantic else None
        first, names = pictures.pop(title), list(pictures)
        for start in range(0, len(names), METHODS_A_STRIP):
            part = {name: pictures[name] for name in names[start : start + METHODS_A_STRIP]}
            strips.append(
                _strip({title: first, **part}, window, f"Image {sample['name']}: {', '.join(part)}.")
            )
    shown = f"predictions (boxes of a score of at least {SURE:g})"
    if semantic:
        shown = "predictions, errors (orange), and both enlarged where the truth has most thin structure"
    told = (
        f"{len(samples)} images spread evenly over the split {split}, not picked; last.ckpt of each method's first "
        f"seed. For each: {shown}."
    )
    return [Text(told), Swatches(data.classes, data.palette), *strips]


def _truth(data: Any, sample: dict[str, Any], images: bool) -> dict[str, list[Picture]]:
    """The first column: its title and its pictures."""
    truth = draw_truth(data, sample, images)
    if "mask" not in sample:
        return {"truth": [truth]}
    return {"image / truth": [image_bytes(sample["image"]), truth]} if images else {"truth": [truth, truth]}


def _prediction(module: Any, data: Any, sample: dict[str, Any], images: bool) -> list[Picture]:
    """A column of the same pictures."""
    if "mask" not in sample:
        return [draw_found(module, data, sample, images)]
    labels = predict_labels(module, sample)
    ground = image_bytes(sample["image"]) if images else None
    truth = sample["mask"].as_subclass(Tensor).numpy()
    return [colour_mask(labels, data.palette), error_map(labels, truth, image=ground)]


def thin_parts(mask: Tensor) -> Tensor:
    """Where the regions of a label map are thin: what is left when each is opened with a square of ``THIN`` pixels.

    Args:
        mask: ``(H, W)`` class indices; 255 is no region.

    Returns:
        ``(H, W)`` bool.
    """
    labels = mask[None, None].float()
    pad = (THIN // 2,) * 4

    def window(x: Tensor, value: float) -> Tensor:
        return F.max_pool2d(F.pad(x, pad, value=value), THIN, stride=1)

    # A pixel is inside if its whole window (mirrored border) has one label; a region's opening is all within
    # reach of an inside pixel, and that pixel's label is the region's own.
    mirrored = F.pad(labels, pad, mode="replicate")
    high, low = F.max_pool2d(mirrored, THIN, stride=1), -F.max_pool2d(-mirrored, THIN, stride=1)
    core = (high == low).float()
    return ((window(core, 0.0) == 0) & (labels != IGNORE_INDEX))[0, 0]


def _thin_window(mask: Tensor) -> tuple[slice, slice]:
    """Rows and columns, in the proportions of the mask, of the part with most thin structure."""
    height, width = mask.shape
    wide = min(max(24, width // 5), width)
    tall = max(1, round(wide * height / width))
    sums = F.avg_pool2d(thin_parts(mask)[None].float(), (tall, wide), stride=1)[0]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return slice(top, top + tall), slice(left, left + wide)


def _strip(
    columns: Mapping[str, Sequence[Picture]], window: tuple[slice, slice] | None, caption: str
) -> Strip:
    """The columns' pictures row by row; enlarged parts stand beside them if there is room, else below."""
    titles = list(columns)
    beside = window is not None and len(titles) <= 3
    width = max(COLUMN, PAGE // (len(titles) * (1 + beside)))
    height = max(1, round(width * columns[titles[0]][0].shape[0] / columns[titles[0]][0].shape[1]))
    rows = [
        [resized(picture, (height, width)) for picture in row] for row in zip(*columns.values(), strict=True)
    ]
    if window is None:
        return Strip(titles, rows, caption)
    parts = [
        [resized(picture[window], (height, width)) for picture in row]
        for row in zip(*columns.values(), strict=True)
    ]
    full = columns[titles[0]][0].shape[1]
    top, left, below, right = (
        round(place * width / full)
        for place in (window[0].start, window[1].start, window[0].stop, window[1].stop)
    )
    for inset in (0, 1):  # two pixels, which a smaller page does not swallow
        box = (top + inset, left + inset, below - top - 2 * inset, right - left - 2 * inset)
        rows = [[draw_box(picture, box) for picture in row] for row in rows]
    if not beside:
        return Strip(titles, [*rows, *parts], caption)
    titles += [f"{title}, enlarged" for title in titles]
    return Strip(titles, [[*whole, *part] for whole, part in zip(rows, parts, strict=True)], caption)
