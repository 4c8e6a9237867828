"""What a race leaves behind: the table as CSV, JSON and Markdown, and a page with bars, curves and pictures."""

import csv
import io
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import freqfusion
from freqfusion._files import write_atomically
from freqfusion.comparison.race import Standing
from freqfusion.data.transforms import eval_transform
from freqfusion.drawing.figures import (
    Picture,
    colour_mask,
    densest_window,
    draw_box,
    error_map,
    figure_bytes,
    picture_strip,
    plot_bars,
    plot_curves,
    save_png,
)
from freqfusion.drawing.page import (
    Bars,
    Code,
    Curve,
    Curves,
    Report,
    Section,
    Strip,
    Swatches,
    Table,
    Text,
    write_report,
)
from freqfusion.tasks.image_data import SegmentationData
from freqfusion.tasks.semantic import IGNORE_INDEX
from freqfusion.training.checkpoints import LAST, load_checkpoint, read_checkpoint

HEADER = [
    "method",
    "seeds",
    "mIoU, %",
    "boundary IoU, %",
    "behind (p)",
    "parameters",
    "training",
]
CURVES = 5
"""How many of the leading methods the curves show; more could not be told apart."""
SCENES = 3
METHODS_A_STRIP = 7
COLUMN = 208
"""Width of a picture, pixels."""
THIN = 5
"""Parts of a region that a square of this side, in pixels, does not fit into count as thin."""
TABLE_NOTE = (
    "Scores of each run's last validation, no epoch picked: mean and standard deviation over the seeds. mIoU: "
    "intersection over union, averaged over the classes. Boundary IoU: the same for the band of each region "
    "along its own boundary (Cheng et al., CVPR 2021). Behind: mean difference to the leader in mIoU over the "
    "seeds both have, with the p value of the paired t test over these seeds (none for a single seed; at three "
    "seeds the test is weak, and it does not correct for the number of methods)."
)


@dataclass(frozen=True)
class Setting:
    """How a race was run, for its page."""

    title: str
    command: str
    config: str
    """The recipe's text."""
    leaders: int | None
    """How many leading methods of the first seed ran the other seeds; None: all."""


def score(standing: Standing, name: str) -> str:
    """Mean, and standard deviation where there is one."""
    spread = standing.spread(name)
    return f"{standing.mean(name):.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def table_rows(standings: Sequence[Standing]) -> list[list[str]]:
    """A row of :data:`HEADER` for every method."""
    rows = []
    for standing in standings:
        behind = "" if standing.difference is None else f"{standing.difference:+.2f}"
        if standing.p_value is not None:
            behind += " (<0.001)" if standing.p_value < 0.001 else f" ({standing.p_value:.3f})"
        rows.append(
            [
                standing.method,
                str(len(standing.outcomes)),
                score(standing, "miou"),
                score(standing, "boundary_iou"),
                behind or "-",
                f"{standing.outcomes[0].parameters / 1e6:.2f} M",
                f"{standing.mean('seconds'):.0f} s",
            ]
        )
    return rows


def headline(standings: Sequence[Standing]) -> str:
    """The outcome in one sentence."""
    first = standings[0]
    boundary = max(standings, key=lambda standing: standing.mean("boundary_iou"))
    text = f"{first.method} leads with {first.mean('miou'):.1f} % mIoU"
    if len(standings) > 1:
        text += f", {first.mean('miou') - standings[1].mean('miou'):.1f} points before {standings[1].method}"
    if boundary is not first:
        text += f"; {boundary.method} has the best boundaries ({boundary.mean('boundary_iou'):.1f} %)"
    return text


def markdown(standings: Sequence[Standing]) -> str:
    """The table, then every run, for a page of results."""
    lines = [f"| {' | '.join(HEADER)} |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(standings)]
    lines += ["", "| run | mIoU, % | boundary IoU, % | training time |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {run.method}, seed {run.seed} | {run.miou:.2f} | {run.boundary_iou:.2f} | {run.seconds:.0f} s |"
        for standing in standings
        for run in standing.outcomes
    ]
    return "\n".join(lines) + "\n"


def class_rows(standings: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of IoU / boundary IoU by method and class, mean over the seeds."""
    names = list(standings[0].outcomes[0].classes)

    def cell(standing: Standing, name: str) -> str:
        texts = []
        for key in ("iou", "boundary_iou"):
            values = [value for run in standing.outcomes if (value := run.classes[name][key]) is not None]
            texts.append(f"{100 * sum(values) / len(values):.1f}" if values else "-")
        return " / ".join(texts)

    rows = [[standing.method, *(cell(standing, name) for name in names)] for standing in standings]
    return ["method", *names], rows


def write_results(out: Path, standings: Sequence[Standing], setting: Setting, *, images: bool = True) -> None:
    """Write ``results.csv`` (a row a run), ``results.json``, ``results.md``, the figures and ``report.html``.

    Args:
        out: folder of the race.
        standings: see :func:`freqfusion.comparison.race.rank`.
        setting: how it was run.
        images: show the data set's images in the pictures; False where they must not be passed on.
    """
    runs = [run for standing in standings for run in standing.outcomes]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "miou", "boundary_iou", "parameters", "seconds"])
    writer.writerows(
        [run.method, run.seed, run.miou, run.boundary_iou, run.parameters, run.seconds] for run in runs
    )
    write_atomically(out / "results.csv", text.getvalue().encode())
    content = {
        "command": setting.command,
        "standings": [
            {
                "method": standing.method,
                "seeds": [run.seed for run in standing.outcomes],
                "miou": standing.mean("miou"),
                "miou_std": standing.spread("miou"),
                "boundary_iou": standing.mean("boundary_iou"),
                "boundary_iou_std": standing.spread("boundary_iou"),
                "difference": standing.difference,
                "p_value": standing.p_value,
                "parameters": standing.outcomes[0].parameters,
                "seconds": standing.mean("seconds"),
            }
            for standing in standings
        ],
        "runs": [
            {"method": run.method, "seed": run.seed, "classes": run.classes, "curve": run.curve}
            for run in runs
        ],
    }
    write_atomically(out / "results.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    header, rows = class_rows(standings)
    classes = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    classes += [f"| {' | '.join(row)} |" for row in rows]
    write_atomically(out / "results.md", (markdown(standings) + "\n" + "\n".join(classes) + "\n").encode())
    for name, title in (("miou", "mIoU"), ("boundary_iou", "Boundary IoU")):
        values = {s.method: [getattr(run, name) for run in s.outcomes] for s in standings}
        figure = plot_bars(
            values, title=title, x_label="%", highlight="freqfusion", size=(5.2, 1.2 + 0.3 * len(standings))
        )
        write_atomically(out / f"bars_{name}.png", figure_bytes(figure))
    figure = plot_curves(mean_curves(standings[:CURVES], 1), title="Validation mIoU", y_label="%")
    write_atomically(out / "curves.png", figure_bytes(figure))
    data = race_data(standings)
    strips = draw_strips(standings, data, images=images)
    for number, strip in enumerate(strips, 1):
        save_png(out / f"strip_{number}.png", picture_strip(strip.rows, strip.titles))
    write_report(out / "report.html", _report(standings, setting, data, strips))


def mean_curves(standings: Sequence[Standing], place: int) -> dict[str, list[tuple[float, float]]]:
    """For each method the validations of its runs, averaged over the seeds.

    Args:
        standings: the methods.
        place: of the score in a row of :attr:`Outcome.curve`.
    """
    return {
        standing.method: [
            (rows[0][0], sum(row[place] for row in rows) / len(rows))
            for rows in zip(*(run.curve for run in standing.outcomes), strict=True)
        ]
        for standing in standings
    }


def race_data(standings: Sequence[Standing]) -> SegmentationData:
    """The data of the race, as its first run's checkpoint describes it."""
    content = read_checkpoint(standings[0].outcomes[0].folder / LAST)
    return SegmentationData(**content["datamodule_hyper_parameters"])


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


def _fit_width(picture: Picture, width: int) -> Picture:
    """Nearest-neighbour copy of the given width, so that pixels stay to be seen."""
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    rows = np.arange(height) * picture.shape[0] // height
    columns = np.arange(width) * picture.shape[1] // width
    return picture[rows][:, columns]


def draw_strips(standings: Sequence[Standing], data: SegmentationData, *, images: bool = True) -> list[Strip]:
    """Pictures of some validation images: each method's prediction and errors, whole and enlarged.

    The images are spread evenly over the set. The enlarged square is the same for all methods: where the
    truth has most thin structure. Each method is shown with its first seed.

    Args:
        standings: the methods, in the order of the columns.
        data: of the race.
        images: show the images; False: the truth alone.
    """
    split = data.hparams["val_split"]
    length = len(data.dataset(split))
    indices = sorted({step * length // SCENES for step in range(SCENES)})
    samples = [data.sample(split, index) for index in indices]
    predictions: list[dict[str, Picture]] = [{} for _ in samples]
    for standing in standings:
        module: Any = load_checkpoint(standing.outcomes[0].folder / LAST)[0]
        for sample, shown in zip(samples, predictions, strict=True):
            with torch.no_grad():
                batch = eval_transform()(sample)["image"].as_subclass(Tensor)[None]
                shown[standing.method] = module.predict(batch).argmax(1)[0].numpy()
    strips = []
    for sample, shown in zip(samples, predictions, strict=True):
        strips += _scene_strips(sample, shown, data.palette, images)
    return strips


def _scene_strips(
    sample: dict[str, Any],
    predictions: dict[str, Any],
    palette: Sequence[tuple[int, int, int]],
    images: bool,
) -> list[Strip]:
    mask = sample["mask"].as_subclass(Tensor)
    truth = mask.numpy().astype(np.int64)
    image = sample["image"].permute(1, 2, 0).numpy()
    ground = image if images else None
    side = min(max(24, truth.shape[1] // 5), *truth.shape)
    top, left = densest_window(thin_parts(mask).numpy(), side)

    def whole_and_detail(picture: Picture) -> tuple[Picture, Picture]:
        detail = _fit_width(picture[top : top + side, left : left + side], COLUMN)
        whole = _fit_width(picture, COLUMN)
        up, before, size = (round(length * COLUMN / picture.shape[1]) for length in (top, left, side))
        return draw_box(whole, (up, before, size, size)), detail

    coloured_truth = colour_mask(truth, palette)
    first = [whole_and_detail(image if images else coloured_truth), whole_and_detail(coloured_truth)]
    names = list(predictions)
    strips = []
    for start in range(0, len(names), METHODS_A_STRIP):
        shown = names[start : start + METHODS_A_STRIP]
        coloured = [first[0], *(whole_and_detail(colour_mask(predictions[name], palette)) for name in shown)]
        errors = [
            first[1],
            *(whole_and_detail(error_map(predictions[name], truth, image=ground)) for name in shown),
        ]
        rows = [[pair[place] for pair in row] for place in (0, 1) for row in (coloured, errors)]
        title = "image / truth" if images else "truth"
        strips.append(Strip([title, *shown], rows, f"Validation image {sample['name']}: {', '.join(shown)}."))
    return strips


def _report(
    standings: Sequence[Standing], setting: Setting, data: SegmentationData, strips: Sequence[Strip]
) -> Report:
    leaders = standings[:CURVES]
    curves = Curves(
        [
            Curve("Validation mIoU", mean_curves(leaders, 1), y_label="%"),
            Curve("Validation boundary IoU", mean_curves(leaders, 2), y_label="%"),
        ],
        note=f"The leading {len(leaders)} methods, mean over the seeds; those of all are in results.json.",
    )
    bars = Curves(
        [
            Bars(
                title,
                {s.method: [getattr(run, name) for run in s.outcomes] for s in standings},
                x_label="%",
                highlight="freqfusion",
            )
            for title, name in (("mIoU", "miou"), ("Boundary IoU", "boundary_iou"))
        ],
        note="Bars: means. Dots: single seeds. The axis does not start at zero.",
    )
    header, rows = class_rows(standings)
    seeds = max(len(standing.outcomes) for standing in standings)
    chosen = (
        ""
        if setting.leaders is None
        else f" All methods ran with the first seed; the best {setting.leaders} then ran with the others too, so "
        "their lead over the rest is partly the luck of that seed."
    )
    return Report(
        title=f"freqfusion compare: {setting.title}",
        headline=headline(standings),
        lede=f"One network, trained once per fusion method and seed ({seeds} at most): same data in the same "
        f"order, same augmentation, schedule and first weights where shared. Only the fusion differs.{chosen}",
        sections=[
            Section("", [Table(HEADER, table_rows(standings), _best(standings), note=TABLE_NOTE), bars]),
            Section("How they learned", [curves]),
            Section(
                "What they see",
                [
                    Text(
                        f"{SCENES} validation images spread evenly over the set, not picked; first seed of each "
                        "method. For each: predictions, errors (orange), and both enlarged where the truth "
                        "has most thin structure, the same square for all."
                    ),
                    Swatches(data.classes, data.palette),
                    *strips,
                ],
            ),
            Section(
                "Class by class",
                [Table(header, rows, note="IoU / boundary IoU in percent, mean over the seeds.")],
            ),
            Section("How it was done", [Code(setting.command), Code(setting.config)]),
        ],
        footer=f"freqfusion {freqfusion.__version__}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}.",
    )


def _best(standings: Sequence[Standing]) -> dict[int, int]:
    """Column to row of the best mean in each score."""
    boundary = [standing.mean("boundary_iou") for standing in standings]
    return {2: 0, 3: boundary.index(max(boundary))}
