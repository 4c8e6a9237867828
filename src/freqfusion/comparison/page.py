"""What a comparison leaves behind: its table, as CSV, JSON and Markdown, and a page with curves and pictures."""

import csv
import io
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import freqfusion
from freqfusion._files import write_atomically
from freqfusion.comparison.pictures import draw_pictures
from freqfusion.comparison.runs import LABELS, Comparison, Method, mean
from freqfusion.drawing.figures import figure_bytes, picture_strip, plot_bars, plot_curves, save_png
from freqfusion.drawing.page_parts import (
    Bars,
    Block,
    Code,
    Curve,
    Curves,
    Figures,
    Report,
    Section,
    Strip,
    Table,
    Text,
    write_report,
)

CURVES = 5
"""How many of the leading methods the curves show; more could not be told apart."""
HIGHLIGHT = "freqfusion"
_MEANING = {
    "miou": "mIoU: intersection over union, averaged over the classes.",
    "boundary_iou": "Boundary IoU: the same for the band of each region along its own boundary (Cheng et al., "
    "CVPR 2021).",
    "box_ap": "AP: COCO's average precision, averaged over classes and over IoU thresholds of 0.5 to 0.95.",
    "pq": "PQ: panoptic quality, averaged over the classes (Kirillov et al., CVPR 2019).",
}


def _number(value: float | None, style: str = ".2f") -> str:
    return "-" if value is None else format(value, style)


def score(method: Method, metric: str) -> str:
    """Mean, and standard deviation where there is one."""
    deviation = method.deviation(metric)
    return _number(method.mean(metric)) + ("" if deviation is None else f" ± {deviation:.2f}")


def method_table(comparison: Comparison) -> Table:
    """A row for every method, for the screen and the page alike."""
    rows = []
    for method in comparison.methods:
        difference = _number(method.difference, "+.2f")
        if method.p_value is not None:
            difference += " (<0.001)" if method.p_value < 0.001 else f" ({method.p_value:.3f})"
        scores = [score(method, name) for name in comparison.headline]
        size, time = f"{method.runs[0].parameters / 1e6:.2f} M", f"{method.seconds:.0f} s"
        rows.append([method.name, str(len(method.runs)), *scores, difference, size, time])
    labels = [f"{LABELS[name]}, %" for name in comparison.headline]
    leaders = [_leader(comparison, name) for name in comparison.headline]
    header = ["method", "seeds", *labels, "difference (p)", "parameters", "training"]
    best = {column: place for column, place in enumerate(leaders, 2) if place is not None}
    return Table(header, rows, best, note=_note(comparison))


def _leader(comparison: Comparison, metric: str) -> int | None:
    """The place of the method with the best mean; None where, as printed, there are several or none."""
    means = [_number(method.mean(metric)) for method in comparison.methods]
    best = max(means, key=lambda mean: -1.0 if mean == "-" else float(mean))
    return means.index(best) if means.count(best) == 1 and len(means) > 1 else None


def headline(comparison: Comparison) -> str:
    """The outcome in one sentence."""
    methods, metric = comparison.methods, comparison.headline[0]
    scores = [_number(method.mean(metric)) for method in methods]
    if len(methods) == 1:
        text = f"{methods[0].name} has {scores[0]} % {LABELS[metric]}"
    elif scores[0] == scores[1]:
        text = f"{methods[0].name} and {methods[1].name} are level with {scores[0]} % {LABELS[metric]}"
    else:
        text = f"{methods[0].name} leads with {scores[0]} % {LABELS[metric]}"
        seeds = [[run.seed for run in method.runs] for method in methods[:2]]
        if (
            scores[1] != "-" and seeds[0] == seeds[1]
        ):  # else the paired difference of the table is another one
            text += f", {float(scores[0]) - float(scores[1]):.2f} points before {methods[1].name}"
    for other in comparison.headline[1:]:
        place = _leader(comparison, other)
        if place:
            best = _number(methods[place].mean(other))
            text += f"; {methods[place].name} has the best {LABELS[other]} ({best} %)"
    return text


def _note(comparison: Comparison) -> str:
    """What a reader must know of the table."""
    judged = "the last validation in training, no epoch picked"
    if comparison.runs[0].step is None:
        judged = f"freqfusion {'test' if comparison.split == 'test' else 'validate'}, of the checkpoint it was given"
    lines = [f"Metrics of each run are those of {judged}: mean and standard deviation over the seeds."]
    lines += [text for name, text in _MEANING.items() if name in comparison.metrics]
    if len(comparison.methods) > 1:
        lines.append(
            f"Difference: mean difference to {comparison.baseline} in {LABELS[comparison.headline[0]]} over the "
            "seeds both have, with the p value of the paired t test over these seeds (none for a single seed; at "
            "three seeds the test is weak, and it does not correct for the number of methods)."
        )
    return " ".join(lines)


def _class_table(comparison: Comparison) -> Table:
    """The metrics of each class by method."""
    classes = comparison.runs[0].classes
    columns = [name for name in next(iter(classes.values()), {}) if "50" not in name]

    def cell(method: Method, label: str) -> str:
        values = [[run.classes[label].get(name) for run in method.runs] for name in columns]
        return " / ".join(_number(mean([v for v in entry if v is not None]), ".1f") for entry in values)

    rows = [[method.name, *(cell(method, label) for label in classes)] for method in comparison.methods]
    labels = " / ".join(LABELS.get(name, name) for name in columns)
    return Table(["method", *classes], rows, note=f"{labels} in percent, mean over the seeds.")


def _metric_table(comparison: Comparison) -> Table:
    """All metrics by method."""
    names = comparison.metrics
    rows = [[method.name, *(score(method, name) for name in names)] for method in comparison.methods]
    return Table(["method", *(LABELS[name] for name in names)], rows, note="Percent.")


def _markdown(table: Table) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _mean_curves(comparison: Comparison, metric: str) -> dict[str, list[tuple[float, float]]]:
    """For each leading method the validations that all its runs have, averaged over the seeds."""
    curves = {}
    for method in comparison.methods[:CURVES]:
        runs = [dict(run.curve(metric)) for run in method.runs]
        steps = [step for step in runs[0] if all(step in run for run in runs)]
        curves[method.name] = [(float(step), sum(run[step] for run in runs) / len(runs)) for step in steps]
    return {name: points for name, points in curves.items() if points}


def _bars(comparison: Comparison, metric: str) -> dict[str, list[float]]:
    return {method.name: values for method in comparison.methods if (values := method.values(metric))}


def write_comparison(
    out: Path,
    comparison: Comparison,
    *,
    title: str,
    command: str,
    lede: str = "",
    explanation: Sequence[str] = (),
    images: bool = True,
    root: str | None = None,
) -> list[str]:
    """Write ``results.csv`` (a row per run), ``results.json``, ``results.md``, the figures and ``report.html``.

    Args:
        out: their folder.
        comparison: what they say.
        title: of the page.
        command: the line that repeats it.
        lede: what else is to be said at the top.
        explanation: paragraphs on the methods.
        images: show the data set's images in the pictures; False where they must not be passed on.
        root: folder of the data, where it is not that of the runs.

    Returns:
        What the user must know: of runs that are left out, and why there are no pictures.
    """
    notes = list(comparison.left_out)
    pictures: Sequence[Block] = ()
    try:
        pictures = draw_pictures(comparison, root, images=images)
    except (ImportError, OSError, ValueError) as error:
        notes.append(f"there are no pictures: {error}")
    _write_tables(out, comparison, command)
    for metric in comparison.headline:
        height = 1.2 + 0.3 * len(comparison.methods)
        if len(bars := _bars(comparison, metric)) > 1:
            figure = plot_bars(
                bars, title=LABELS[metric], x_label="%", highlight=HIGHLIGHT, size=(5.2, height)
            )
            write_atomically(out / f"bars_{metric}.png", figure_bytes(figure))
    first = comparison.headline[0]
    figure = plot_curves(_mean_curves(comparison, first), title=f"Validation {LABELS[first]}", y_label="%")
    write_atomically(out / "curves.png", figure_bytes(figure))
    strips = [block for block in pictures if isinstance(block, Strip)]
    for number, strip in enumerate(strips, 1):
        save_png(out / f"strip_{number}.png", picture_strip(strip.rows, strip.titles))
    sections = _sections(comparison, command, pictures, explanation, notes)
    footer = f"freqfusion {freqfusion.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}."
    lede = f"{_lede(comparison)} {lede}".strip()
    write_report(out / "report.html", Report(title, headline(comparison), lede, sections, footer))
    return notes


def _write_tables(out: Path, comparison: Comparison, command: str) -> None:
    metrics, runs = comparison.metrics, [(m.name, run) for m in comparison.methods for run in m.runs]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", *metrics, "parameters", "seconds", "run"])
    for name, run in runs:
        figures = [run.metrics[metric] for metric in metrics]
        writer.writerow([name, run.seed, *figures, run.parameters, run.seconds, run.folder])
    write_atomically(out / "results.csv", text.getvalue().encode())
    content = {
        "command": command,
        "split": comparison.split,
        "metric": {"name": comparison.headline[0], "label": LABELS[comparison.headline[0]]},
        "baseline": comparison.baseline,
        "left_out": comparison.left_out,
        "methods": [
            {
                "method": method.name,
                "settings": {key: method.runs[0].settings.get(key) for key in comparison.differing},
                "seeds": [run.seed for run in method.runs],
                "metrics": {
                    name: {"mean": method.mean(name), "deviation": method.deviation(name)} for name in metrics
                },
                "difference": method.difference,
                "p_value": method.p_value,
                "parameters": method.runs[0].parameters,
                "seconds": method.seconds,
            }
            for method in comparison.methods
        ],
        "runs": [
            {
                "method": name,
                "seed": run.seed,
                "run": str(run.folder),
                "step": run.step,
                "metrics": {metric: run.metrics[metric] for metric in metrics},
                "classes": run.classes,
                "curves": {metric: run.curve(metric) for metric in comparison.headline},
            }
            for name, run in runs
        ],
    }
    write_atomically(out / "results.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    singles = [
        [f"{name}, seed {run.seed}", *(_number(run.metrics[m]) for m in metrics), f"{run.seconds:.0f} s"]
        for name, run in runs
    ]
    labels = [f"{LABELS[name]}, %" for name in metrics]
    tables = [
        method_table(comparison),
        Table(["run", *labels, "training time"], singles),
        _metric_table(comparison),
        _class_table(comparison),
    ]
    write_atomically(out / "results.md", ("\n\n".join(map(_markdown, tables)) + "\n").encode())


def _lede(comparison: Comparison) -> str:
    """How the outcome came about, in general."""
    seeds = max(len(method.runs) for method in comparison.methods)
    differing, runs = comparison.differing, comparison.runs
    known = any(key.startswith("trainer.") for key in runs[0].settings)  # of a run from Python they are not
    if differing == ["model.fusion"] and known:
        text = (
            f"One network, trained once per fusion method and seed ({seeds} at most): same data in the same order, "
            "same augmentation, schedule and first weights where shared. Only the fusion differs."
        )
    elif len(runs) == 1:
        text = "One run."
    else:
        text = f"{len(runs)} runs that differ in {', '.join([*differing, *(['the seed'] if seeds > 1 else [])])}."
    if seeds == 1 and len(comparison.methods) > 1:
        text += " One seed: differences of a few tenths of a point are within what another seed changes."
    return text


def _pair(comparison: Comparison) -> list[Block]:
    """Of two methods, the other against the baseline in large figures."""
    seeds = [[run.seed for run in method.runs] for method in comparison.methods]
    if len(seeds) != 2 or seeds[0] != seeds[1]:
        return []
    one, other = sorted(comparison.methods, key=lambda method: method.name != comparison.baseline)
    pairs = [(LABELS[name], one.mean(name), other.mean(name)) for name in comparison.headline]
    items = [
        (f"{b - a:+.2f}", f"points of {label}", f"{one.name} {a:.2f}, {other.name} {b:.2f}")
        for label, a, b in pairs
        if a is not None and b is not None
    ]
    sizes = [method.runs[0].parameters for method in (one, other)]
    items.append((f"{sizes[1] / sizes[0] - 1:+.0%}", "parameters", f"{sizes[0]:,} to {sizes[1]:,}"))
    if one.seconds:
        longer = f"{one.seconds:.0f} s to {other.seconds:.0f} s"
        items.append((f"{other.seconds / one.seconds - 1:+.0%}", "training time", longer))
    return [Figures(items)]


def _sections(
    comparison: Comparison,
    command: str,
    pictures: Sequence[Block],
    explanation: Sequence[str],
    notes: Sequence[str],
) -> list[Section]:
    bars = [
        Bars(LABELS[name], values, x_label="%", highlight=HIGHLIGHT)
        for name in comparison.headline
        if len(values := _bars(comparison, name)) > 1
    ]
    curves = [
        Curve(f"Validation {LABELS[name]}", _mean_curves(comparison, name), y_label="%")
        for name in comparison.headline
    ]
    curve_note = f"The leading methods, at most {CURVES}: mean over the seeds. All are in results.json."
    bars_note = "Bars: means. Dots: single seeds. The axis does not start at zero."
    drawn = [Curves(bars, note=bars_note)] if bars else []
    told = [Text(f"{note[0].upper()}{note[1:]}.") for note in notes]
    sections = [
        Section("", [*_pair(comparison), method_table(comparison), *drawn, *told]),
        Section("How they learned", [Curves(curves, note=curve_note)]),
        Section("What they see", pictures),
        Section("Class by class", [_class_table(comparison)]),
        Section("All metrics", [_metric_table(comparison)]),
        Section("What FreqFusion does", [Text(text) for text in explanation]),
    ]
    differing = comparison.differing
    settings: dict[str, dict[str, Any]] = {}
    for key, value in comparison.runs[0].method_settings.items():
        group, _, name = key.partition(".")
        if key not in differing and value is not None and (group != "trainer" or value is not False):
            settings.setdefault(group, {})[name] = value
    rows = [
        [method.name, *(str(method.runs[0].settings.get(key)) for key in differing)]
        for method in comparison.methods
    ]
    what = [Table(["method", *differing], rows)] if len(differing) > 1 else []
    common = yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False)
    done: list[Block] = [*what, Code(command), Text("The settings that all runs share:"), Code(common)]
    return [section for section in [*sections, Section("How it was done", done)] if section.blocks]
