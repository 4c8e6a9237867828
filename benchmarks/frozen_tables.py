"""The tables and curves of docs/results/pretrained.md, from the JSON files of benchmarks/frozen.py.

example:
  python benchmarks/frozen_tables.py docs/results/data/frozen-camvid.json --curves docs/results/pretrained/camvid.png
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from freqfusion.comparison.runs import paired_p_value
from freqfusion.drawing.figures import figure_bytes, plot_curves

Run = dict[str, Any]


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def gains(runs: dict[int, Run], baseline: dict[int, Run], metric: str) -> list[float]:
    """Over the baseline, for each seed that both ran: what is fair where some have more seeds than others."""
    return [run[metric] - baseline[seed][metric] for seed, run in runs.items() if seed in baseline]


def label(name: str) -> str:
    """``freqfusion?lr_factor=0.3`` in words."""
    return name.replace("?", ", ").replace("&", ", ")


def row(name: str, runs: dict[int, Run], baseline: dict[int, Run]) -> str:
    """Mean and deviation over the seeds; mean gain over the baseline, with the paired p value."""
    cells = [label(name), str(len(runs))]
    for metric in ("miou", "boundary_iou"):
        gained = gains(runs, baseline, metric)
        p_value = paired_p_value(gained)
        against = "" if runs is baseline or not gained else f"{mean(gained):+.2f}"
        cells.append(spread([run[metric] for run in runs.values()]))
        if p_value is not None and against:
            against += f" ({p_value:.3f})" if p_value >= 0.001 else " (< 0.001)"
        cells.append(against)
    cells.append(f"{next(iter(runs.values()))['parameters'] / 1e6:.2f} M")
    cells.append(f"{mean(run['curve'][-1][1] - run['curve'][-2][1] for run in runs.values()):+.2f}")
    return f"| {' | '.join(cells)} |"


def mean_curve(runs: dict[int, Run]) -> list[tuple[float, float]]:
    """Steps and mIoU."""
    curves = [run["curve"] for run in runs.values()]
    return [(points[0][0], mean(point[1] for point in points)) for points in zip(*curves, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--baseline", default="bilinear")
    parser.add_argument(
        "--curves", type=Path, metavar="PNG", help="of the leading three, FreqFusion and the baseline"
    )
    args = parser.parse_args()
    methods: dict[str, dict[int, Run]] = {}
    for run in json.loads(args.results.read_text(encoding="utf-8"))["runs"]:
        methods.setdefault(run["method"], {})[run["seed"]] = run
    baseline = methods[args.baseline]
    none = [float("-inf")]  # without a seed in common: at the end
    order = sorted(methods, key=lambda name: -mean(gains(methods[name], baseline, "miou") or none))
    against = f"against {args.baseline} (p)"
    print(
        f"| method | seeds | mIoU | {against} | boundary IoU | {against} | decoder's parameters | last fifth |"
    )
    print("| --- |" + " ---: |" * 7)
    for name in order:
        print(row(name, methods[name], baseline))
    if args.curves is not None:
        shown = [*order[:3], *(name for name in ("freqfusion", args.baseline) if name not in order[:3])]
        curves = {label(name): mean_curve(methods[name]) for name in shown}
        args.curves.parent.mkdir(parents=True, exist_ok=True)
        figure = plot_curves(curves, x_label="step", y_label="validation mIoU, %")
        args.curves.write_bytes(figure_bytes(figure))


if __name__ == "__main__":
    main()
