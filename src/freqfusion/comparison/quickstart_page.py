"""The page of the quickstart: what came out, how it was learned, and what both networks see."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import freqfusion
from freqfusion.comparison.quickstart import (
    BATCH,
    BOUNDARY_WIDTH,
    LR,
    METHODS,
    SIZE,
    TEST_SCENES,
    VAL_SCENES,
    Comparison,
    Run,
)
from freqfusion.data.transforms import eval_transform
from freqfusion.drawing.figures import (
    colour_mask,
    densest_window,
    draw_box,
    error_map,
    picture_strip,
    save_png,
    zoom,
)
from freqfusion.drawing.page import (
    Code,
    Curve,
    Curves,
    Figures,
    Report,
    Section,
    Strip,
    Swatches,
    Table,
    Text,
    write_report,
)
from freqfusion.tasks.semantic import SegmentationModule

SCORES = {"miou": "mIoU", "boundary_iou": "boundary IoU"}
SHOWN_SCENES = 4
DETAIL = 32
"""Side of the enlarged square, pixels."""

_TITLES = ["image", "truth", *METHODS.values(), *(f"errors, {name}" for name in METHODS.values())]
_TABLE_NOTE = (
    "mIoU: intersection over union, averaged over the classes. Boundary IoU: the same for the band of each "
    f"region within {BOUNDARY_WIDTH} pixels of its own boundary (Cheng et al., CVPR 2021). Both in percent; bold "
    "leads."
)
_STRIPS_TEXT = (
    f"The first {SHOWN_SCENES} scenes of the test set, not picked. Below each, enlarged, the square where the "
    "two networks together make most errors. Errors are orange."
)
_METHOD = (
    "A segmentation network decides what it sees on coarse feature maps and where it ends on fine ones; joining "
    "the two is where boundaries get lost. Bilinear upsampling blurs the coarse map across object boundaries "
    "and spreads wrong features inside objects.",
    "FreqFusion predicts, for every pixel, a smoothing kernel for the coarse map that evens out the inside of "
    "objects, and offsets that resample features near a boundary from the consistent inside. From the fine map "
    "it takes the high frequencies, which carry the outline, and adds them back sharpened.",
)


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


def leads(runs: dict[str, Run]) -> dict[str, float]:
    """By how many points FreqFusion leads (negative: trails) in each score, as it is printed.

    The difference is that of the rounded figures, so that the text never contradicts the table.
    """
    return {
        score: round(
            round(100 * runs["freqfusion"].test[score], 1) - round(100 * runs["bilinear"].test[score], 1), 1
        )
        for score in SCORES
    }


def table_rows(runs: dict[str, Run]) -> tuple[list[str], list[list[str]], dict[int, int]]:
    """Header, rows and (column to row) the leader in each score, for the screen and the page alike."""
    header = ["", "mIoU", "boundary IoU", "parameters", "training time"]
    rows = [
        [
            METHODS[fusion],
            _percent(run.test["miou"]),
            _percent(run.test["boundary_iou"]),
            f"{run.parameters:,}",
            f"{run.train_seconds:.0f} s",
        ]
        for fusion, run in runs.items()
    ]
    best = {}
    for column in (1, 2):
        values = [float(row[column]) for row in rows]
        if values[0] != values[1]:
            best[column] = values.index(max(values))
    return header, rows, best


def headline(runs: dict[str, Run]) -> str:
    """The outcome in one sentence, whichever way it went."""
    lead = leads(runs)
    miou, boundary = lead["miou"], lead["boundary_iou"]
    if miou > 0 and boundary > 0:
        return f"FreqFusion leads by {miou:.1f} points of mIoU and {boundary:.1f} points of boundary IoU"
    if miou < 0 and boundary < 0:
        return f"FreqFusion trails by {-miou:.1f} points of mIoU and {-boundary:.1f} points of boundary IoU"
    return f"A mixed outcome: FreqFusion against bilinear is {miou:+.1f} in mIoU, {boundary:+.1f} in boundary IoU"


@torch.no_grad()
def _predictions(modules: dict[str, SegmentationModule], sample: dict[str, Any]) -> dict[str, Any]:
    images = eval_transform()(sample)["image"][None]
    return {fusion: module.eval().predict(images).argmax(1)[0].numpy() for fusion, module in modules.items()}


def _scene_strip(
    number: int, sample: dict[str, Any], predictions: dict[str, Any], palette: Sequence[tuple[int, int, int]]
) -> Strip:
    """Two rows of one scene: the whole of it, and the detail with most errors of the two networks together."""
    image = sample["image"].permute(1, 2, 0).numpy()
    truth = sample["mask"].numpy().astype(np.int64)
    pictures = [
        image,
        colour_mask(truth, palette),
        *(colour_mask(prediction, palette) for prediction in predictions.values()),
        *(error_map(prediction, truth, image=image) for prediction in predictions.values()),
    ]
    wrong = {fusion: prediction != truth for fusion, prediction in predictions.items()}
    top, left = densest_window(sum(errors.astype(np.int64) for errors in wrong.values()), DETAIL)
    boxed = [draw_box(zoom(picture, 2), (2 * top, 2 * left, 2 * DETAIL, 2 * DETAIL)) for picture in pictures]
    factor = 2 * SIZE[1] // DETAIL  # both rows get the same width
    detail = [zoom(picture[top : top + DETAIL, left : left + DETAIL], factor) for picture in pictures]
    shares = ", ".join(f"{errors.mean():.1%} with {METHODS[fusion]}" for fusion, errors in wrong.items())
    return Strip(_TITLES, [boxed, detail], f"Test scene {number}. Wrong pixels: {shares}.")


def write_page(out: Path, comparison: Comparison) -> None:
    """Write ``report.html``, and two of its strips as ``strips.png``, into the folder ``out``."""
    scenes, palette = comparison.data.dataset("test"), comparison.data.palette
    strips = []
    for index in range(SHOWN_SCENES):
        predictions = _predictions(comparison.modules, scenes[index])
        strips.append(_scene_strip(index + 1, scenes[index], predictions, palette))
    save_png(out / "strips.png", picture_strip([row for strip in strips[:2] for row in strip.rows], _TITLES))
    write_report(out / "report.html", _report(comparison, strips))


def _report(comparison: Comparison, strips: Sequence[Strip]) -> Report:
    runs, data, steps, seed = comparison.runs, comparison.data, comparison.steps, comparison.seed
    lead = leads(runs)
    bilinear, ours = runs["bilinear"], runs["freqfusion"]
    header, rows, best = table_rows(runs)
    more = ours.parameters / bilinear.parameters - 1
    longer = ours.train_seconds / bilinear.train_seconds - 1
    figures = Figures(
        [
            *(
                (
                    f"{lead[score]:+.1f}",
                    f"points of {name}",
                    f"{_percent(bilinear.test[score])} to {_percent(ours.test[score])}",
                )
                for score, name in SCORES.items()
            ),
            (f"{more:+.0%}", "parameters", f"{bilinear.parameters:,} to {ours.parameters:,}"),
            (
                f"{longer:+.0%}",
                "training time",
                f"{bilinear.train_seconds:.0f} s to {ours.train_seconds:.0f} s",
            ),
        ]
    )
    curves = Curves(
        [
            Curve(title, {METHODS[fusion]: getattr(run, name) for fusion, run in runs.items()}, y_label=label)
            for title, name, label in (
                ("Validation mIoU", "val_miou", "%"),
                ("Validation boundary IoU", "val_boundary_iou", "%"),
                ("Training loss", "losses", "cross entropy"),
            )
        ],
        note=f"Scores during training are on {VAL_SCENES} validation scenes, those of the table on "
        f"{TEST_SCENES} test scenes that neither network met before.",
    )
    classes = Table(
        [
            "class",
            *(f"IoU, {name}" for name in METHODS.values()),
            *(f"boundary IoU, {name}" for name in METHODS.values()),
        ],
        [
            [
                name,
                *(_percent(run.test["iou"][index]) for run in runs.values()),
                *(_percent(run.test["boundary_iou_per_class"][index]) for run in runs.values()),
            ]
            for index, name in enumerate(data.classes)
        ],
    )
    return Report(
        title="freqfusion quickstart",
        headline=headline(runs),
        lede=f"One small segmentation network, trained twice for {steps:,} steps on synthetic scenes: once "
        "with bilinear upsampling in its feature pyramid, once with FreqFusion. All else is equal. "
        f"One seed ({seed}); differences of a few tenths of a point are within what another seed changes.",
        sections=[
            Section("", [figures, Table(header, rows, best, note=_TABLE_NOTE)]),
            Section("How they learned", [curves]),
            Section(
                "What they see",
                [
                    Text(_STRIPS_TEXT),
                    Swatches(data.classes, data.palette),
                    *strips,
                ],
            ),
            Section("Class by class", [classes]),
            Section("What FreqFusion does", [Text(text) for text in _METHOD]),
            Section(
                "How it was done",
                [
                    Text(
                        f"Scenes of {SIZE[0]}x{SIZE[1]} pixels, made from the seed; {BATCH} new ones a step, none "
                        "seen twice, the same for both networks and in the same order. AdamW, learning rate "
                        f"{LR:g} with linear warm-up over {steps // 20} steps and linear decay to zero. The two "
                        "networks start from the same weights wherever they share a parameter. The time covers "
                        f"forward pass, backward pass and update on the CPU (threads: {torch.get_num_threads()})."
                    ),
                    Code(f"python -m freqfusion quickstart --minutes {comparison.minutes:g} --seed {seed}"),
                ],
            ),
        ],
        footer=f"freqfusion {freqfusion.__version__}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}. FreqFusion: Chen, Fu, Gu, Yan, Harada and Huang, “Frequency-aware feature "
        "fusion for dense image prediction”, IEEE TPAMI 2024.",
    )
