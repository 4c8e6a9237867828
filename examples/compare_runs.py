"""Compare run folders of ``freqfusion fit``: a table of mean and spread, learning curves, picture strips.

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
from pathlib import Path

import torch

from freqfusion.analysis.figures import (
    Picture,
    colour_mask,
    error_map,
    learning_curve,
    picture_strip,
    save_png,
    zoom,
)
from freqfusion.data.transforms import eval_transform
from freqfusion.training import SegmentationData, load_checkpoint
from freqfusion.training.checkpoints import read_checkpoint

FIGURES = {"val_miou": "mIoU", "val_boundary_iou": "boundary IoU", "val_pixel_accuracy": "pixel accuracy"}
IMAGES = 4


def read_history(run: Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv`` that hold a validation."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["val_miou"]]


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def table(methods: dict[str, list[Path]]) -> str:
    """Markdown: mean and standard deviation over the runs, in percent, then each run."""
    lines = [f"| method | runs | {' | '.join(FIGURES.values())} |", "| --- | --- | --- | --- | --- |"]
    for method, runs in methods.items():
        last = [read_history(run)[-1] for run in runs]
        cells = [spread([100 * float(row[key]) for row in last]) for key in FIGURES]
        lines.append(f"| {method} | {len(runs)} | {' | '.join(cells)} |")
    lines += ["", f"| run | {' | '.join(FIGURES.values())} |", "| --- | --- | --- | --- |"]
    for runs in methods.values():
        for run in runs:
            row = read_history(run)[-1]
            lines.append(f"| {run.name} | {' | '.join(f'{100 * float(row[key]):.2f}' for key in FIGURES)} |")
    return "\n".join(lines)


def class_table(methods: dict[str, list[Path]]) -> str:
    """Markdown: IoU and boundary IoU of each class, in percent, mean over the runs."""
    scores = {
        method: [json.loads((run / "val_metrics.json").read_text())["classes"] for run in runs]
        for method, runs in methods.items()
    }
    names = list(next(iter(scores.values()))[0])
    heads = [f"{method} {figure}" for figure in ("IoU", "boundary IoU") for method in methods]
    lines = [f"| class | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for name in names:
        cells = [
            f"{100 * statistics.mean(run[name][key] for run in runs):.1f}"
            for key in ("iou", "boundary_iou")
            for runs in scores.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(methods: dict[str, list[Path]], out: Path) -> None:
    """Mean over the runs of each method, at each validation."""
    for key, name in (("val_miou", "mIoU"), ("val_boundary_iou", "boundary IoU")):
        curves = {}
        for method, runs in methods.items():
            histories = [read_history(run) for run in runs]
            curves[method] = [
                (float(rows[0]["step"]), 100 * statistics.mean(float(row[key]) for row in rows))
                for rows in zip(*histories, strict=True)
            ]
        learning_curve(
            curves, out / f"{key.removeprefix('val_')}.png", title=f"{name} on validation", y_label="%"
        )


def draw_strips(methods: dict[str, list[Path]], data_root: str | None, out: Path) -> None:
    """Truth, then prediction and errors of each method's first run (photographs are the data set's to show)."""
    modules = {method: load_checkpoint(runs[0] / "last.ckpt")[0] for method, runs in methods.items()}
    first = next(iter(methods.values()))[0]
    options = read_checkpoint(first / "last.ckpt")["datamodule_hyper_parameters"]
    data = SegmentationData(**{**options, "root": data_root or options["root"]})
    split = options["val_split"]
    length = len(data.dataset(split))
    rows: list[list[Picture]] = []
    for index in range(0, length, length // IMAGES)[:IMAGES]:
        sample = data.sample(split, index)
        truth = torch.as_tensor(sample["mask"]).numpy()
        row = [colour_mask(truth, data.palette)]
        for module in modules.values():
            prediction = module.predict(eval_transform()(sample)["image"][None]).argmax(1)[0].numpy()
            row += [colour_mask(prediction, data.palette), error_map(prediction, truth)]
        rows.append([zoom(picture, 2) for picture in row])
    titles = ["truth"]
    for method in methods:
        titles += [method, f"{method}: errors"]
    save_png(out / "strips.png", picture_strip(rows, titles, font_size=28))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", action="append", required=True, metavar=("NAME", "RUN"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--data-root", help="the data set's folder [that of the runs]")
    args = parser.parse_args()
    methods = {name: [Path(run) for run in runs] for name, *runs in args.method}
    print(table(methods), class_table(methods), sep="\n\n")
    draw_curves(methods, args.out)
    draw_strips(methods, args.data_root, args.out)
    print(f"\npictures in {args.out}")


if __name__ == "__main__":
    main()
