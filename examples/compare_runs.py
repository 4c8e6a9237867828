"""Compare run folders of ``freqfusion fit``, of any task: mean and spread, learning curves, picture strips.

    python examples/compare_runs.py --out OUT \
        --method Bilinear runs/bilinear_s0 runs/bilinear_s1 runs/bilinear_s2 \
        --method FreqFusion runs/freqfusion_s0 runs/freqfusion_s1 runs/freqfusion_s2

Figures are those of each run's last validation, so no epoch is picked. The strips show the first run of each
method on validation images spread evenly over the set; pass ``--data-root`` where the data has moved.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from freqfusion.data.transforms import eval_transform
from freqfusion.drawing.detections import colour_segments, draw_objects
from freqfusion.drawing.figures import (
    Picture,
    colour_mask,
    error_map,
    learning_curve,
    picture_strip,
    save_png,
    zoom,
)
from freqfusion.tasks.base import TaskModule
from freqfusion.tasks.registry import find_task
from freqfusion.training import load_checkpoint
from freqfusion.training.checkpoints import read_checkpoint, task_of

IMAGES = 4
SURE = 0.5
"""The least score of an object that is drawn."""


def read_history(run: Path, column: str) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv`` that hold a validation."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row[column]]


def mean(scores: list[float | None], decimals: int = 1) -> str:
    """Percent; empty where there was nothing to judge."""
    values = [100 * score for score in scores if score is not None]
    return f"{statistics.mean(values):.{decimals}f}" if values else ""


def spread(scores: list[float | None]) -> str:
    """Mean and, of several, standard deviation, likewise."""
    values = [100 * score for score in scores if score is not None]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(scores, 2)}{deviation}"


def table(methods: dict[str, list[Path]], figures: Mapping[str, str]) -> str:
    """Markdown: mean and standard deviation over the runs, in percent, then each run."""
    dashes = " --- |" * len(figures)
    lines = [f"| method | runs | {' | '.join(figures.values())} |", f"| --- | --- |{dashes}"]
    singles = [f"| run | {' | '.join(figures.values())} |", f"| --- |{dashes}"]
    for method, runs in methods.items():
        last = [json.loads((run / "val_metrics.json").read_text()) for run in runs]
        cells = [spread([values[name] for values in last]) for name in figures]
        lines.append(f"| {method} | {len(runs)} | {' | '.join(cells)} |")
        for run, values in zip(runs, last, strict=True):
            singles.append(f"| {run.name} | {' | '.join(spread([values[name]]) for name in figures)} |")
    return "\n".join([*lines, "", *singles])


def class_table(methods: dict[str, list[Path]], figures: Mapping[str, str]) -> str:
    """Markdown: the figures of each class, in percent, mean over the runs."""
    scores = {
        method: [json.loads((run / "val_metrics.json").read_text())["classes"] for run in runs]
        for method, runs in methods.items()
    }
    names = list(next(iter(scores.values()))[0])
    heads = [f"{method} {label}" for label in figures.values() for method in methods]
    lines = [f"| class | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for name in names:
        cells = [mean([run[name][key] for run in runs]) for key in figures for runs in scores.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(methods: dict[str, list[Path]], figures: Mapping[str, str], out: Path) -> None:
    """Mean over the runs of each method, at each validation."""
    for key, name in figures.items():
        column, curves = f"val_{key}", {}
        for method, runs in methods.items():
            histories = [read_history(run, column) for run in runs]
            curves[method] = [
                (float(rows[0]["step"]), 100 * statistics.mean(float(row[column]) for row in rows))
                for rows in zip(*histories, strict=True)
            ]
        learning_curve(curves, out / f"{key}.png", title=f"{name} on validation", y_label="%")


def draw_mask(module: Any, sample: dict[str, Any]) -> list[Picture]:
    prediction = module.predict(eval_transform()(sample)["image"][None]).argmax(1)[0].numpy()
    return [
        colour_mask(prediction, module.palette),
        error_map(prediction, torch.as_tensor(sample["mask"]).numpy()),
    ]


def draw_found(module: Any, sample: dict[str, Any]) -> list[Picture]:
    found = module([sample["image"]])[0]
    if "segments" in found:
        picture = colour_segments(
            found["segments"], found["segment_labels"], module.palette, module.hparams["things"]
        )
        return [picture]
    sure = found["scores"] >= SURE
    masks = found["masks"][sure].squeeze(1) > 0.5 if "masks" in found else None
    parts = [found[name][sure].numpy() for name in ("boxes", "labels")]
    return [
        draw_objects(
            byte_image(sample), *parts, module.classes, module.palette, found["scores"][sure].numpy(), masks
        )
    ]


def draw_truth(module: Any, sample: dict[str, Any]) -> Picture:
    if "mask" in sample:
        return colour_mask(torch.as_tensor(sample["mask"]).numpy(), module.palette)
    if "segments" in sample:
        return colour_segments(sample["segments"], sample["labels"], module.palette, module.hparams["things"])
    single = ~sample["iscrowd"]
    masks = sample["masks"][single].numpy() if "masks" in sample else None
    boxes, labels = (sample[name][single].numpy() for name in ("boxes", "labels"))
    return draw_objects(byte_image(sample), boxes, labels, module.classes, module.palette, masks=masks)


def byte_image(sample: dict[str, Any]) -> Any:
    return (255 * sample["image"]).round().byte().permute(1, 2, 0).numpy()


def draw_strips(
    methods: dict[str, list[Path]], modules: dict[str, TaskModule], data_root: str | None, out: Path
) -> None:
    """Truth, then what each method's first run predicts (photographs are the data set's to show)."""
    first = next(iter(methods.values()))[0]
    content = read_checkpoint(first / "last.ckpt")
    options = content["datamodule_hyper_parameters"]
    data: Any = find_task(task_of(content))[1](**{**options, "root": data_root or options["root"]})
    split = options["val_split"]
    semantic = task_of(content) == "semantic"
    draw: Callable[[Any, Any], list[Picture]] = draw_mask if semantic else draw_found
    length = len(data.dataset(split))
    rows: list[list[Picture]] = []
    for index in range(0, length, max(1, length // IMAGES))[:IMAGES]:
        sample = data.sample(split, index) if semantic else data.transform("eval")(data.dataset(split)[index])
        row = [draw_truth(next(iter(modules.values())), sample)]
        for module in modules.values():
            row += draw(module, sample)
        factor = max(1, round(480 / row[0].shape[1]))
        rows.append([zoom(picture, factor) for picture in row])
    titles = ["truth"]
    for method in methods:
        titles += [method, f"{method}: errors"] if semantic else [method]
    height, width = np.max([row[0].shape[:2] for row in rows], axis=0)
    rows = [[centred(picture, int(height), int(width)) for picture in row] for row in rows]
    save_png(out / "strips.png", picture_strip(rows, titles, font_size=28))


def centred(picture: Picture, height: int, width: int) -> Picture:
    """On white, so that pictures of several sizes make one strip."""
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", action="append", required=True, metavar=("NAME", "RUN"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--data-root", help="the data set's folder [that of the runs]")
    args = parser.parse_args()
    methods = {name: [Path(run) for run in runs] for name, *runs in args.method}
    for name, runs in methods.items():
        if not runs:
            parser.error(f"--method {name} needs at least one run folder after the name")
        for run in runs:
            path = run / "val_metrics.json"
            if not path.is_file() or "step" not in json.loads(path.read_text()):
                parser.error(
                    f"{path} is not of a validation in training; freqfusion validate may have replaced it"
                )
    modules = {method: load_checkpoint(runs[0] / "last.ckpt")[0] for method, runs in methods.items()}
    module = next(iter(modules.values()))
    if any(other.figures != module.figures for other in modules.values()):
        parser.error("the runs are of different tasks")
    figures = {name: label for name, label in module.figures.items() if name != "loss"}
    print(table(methods, figures), end="\n\n")
    print(class_table(methods, {figure.name: figure.label for figure in module.class_figures}))
    draw_curves(methods, {name: figures[name] for name in module.headline}, args.out)
    draw_strips(methods, modules, args.data_root, args.out)
    print(f"\npictures in {args.out}")


if __name__ == "__main__":
    main()
