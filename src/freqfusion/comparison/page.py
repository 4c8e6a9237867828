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
from freqfusion.drawing.page import (
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


def header(comparison: Comparison) -> list[str]:
    """Of :func:`table_rows`."""
    metrics = [f"{LABELS[name]}, %" for name in comparison.headline]
    return ["method", "seeds", *metrics, "difference (p)", "parameters", "training"]


def table_rows(comparison: Comparison) -> list[list[str]]:
    """A row for every method."""
    rows = []
    for method in comparison.methods:
        difference = _number(method.difference, "+.2f")
        if method.p_value is not None:
            difference += " (<0.001)" if method.p_value < 0.001 else f" ({method.p_value:.3f})"
        rows.append(
            [
                method.name,
                str(len(method.runs)),
                *(score(method, name) for name in comparison.headline),
                difference,
                f"{method.runs[0].parameters / 1e6:.2f} M",
                f"{method.seconds:.0f} s",
            ]
        )
    return rows


def _leader(comparison: Comparison, metric: str) -> int:
    """The place of the method with the best mean."""
    means = [-1.0 if (value := method.mean(metric)) is None else value for method in comparison.methods]
    return means.index(max(means))


def headline(comparison: Comparison) -> str:
    """The outcome in one sentence."""
    methods, metric = comparison.methods, comparison.headline[0]
    first, label = methods[0], LABELS[metric]
    text = f"{first.name} has {_number(first.mean(metric))} % {label}"
    if len(methods) > 1:
        best, second = first.mean(metric), methods[1].mean(metric)
        text = f"{first.name} leads with {_number(best)} % {label}"
        if best is not None and second is not None:
            text += f", {best - second:.2f} points before {methods[1].name}"
    for other in comparison.headline[1:]:
        best_method = methods[_leader(comparison, other)]
        if best_method is not first:
            text += (
                f"; {best_method.name} has the best {LABELS[other]} ({_number(best_method.mean(other))} %)"
            )
    return text


def _note(comparison: Comparison) -> str:
    """What a reader must know of the table."""
    trained = comparison.runs[0].step is not None
    judged = (
        "the last validation in training, no epoch picked"
        if trained
        else f"freqfusion {'test' if comparison.split == 'test' else 'validate'}, of the checkpoint that it was given"
    )
    meanings = [text for name, text in _MEANING.items() if name in comparison.metrics]
    lines = [
        f"Metrics of each run are those of {judged}: mean and standard deviation over the seeds.",
        *meanings,
    ]
    if len(comparison.methods) > 1:
        first = LABELS[comparison.headline[0]]
        lines.append(
            f"Difference: mean difference to {comparison.baseline} in {first} over the seeds both have, with the p "
            "value of the paired t test over these seeds (none for a single seed; at three seeds the test is weak, "
            "and it does not correct for the number of methods)."
        )
    return " ".join(lines)


def _class_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the metrics of each class by method, mean over the seeds."""
    classes = comparison.runs[0].classes
    columns = [name for name in next(iter(classes.values()), {}) if "50" not in name]

    def cell(method: Method, label: str) -> str:
        means = []
        for name in columns:
            values = [value for run in method.runs if (value := run.classes[label].get(name)) is not None]
            means.append(_number(mean(values), ".1f"))
        return " / ".join(means)

    rows = [[method.name, *(cell(method, label) for label in classes)] for method in comparison.methods]
    return ["method", *classes], rows


def _class_note(comparison: Comparison) -> str:
    names = [name for name in next(iter(comparison.runs[0].classes.values()), {}) if "50" not in name]
    return f"{' / '.join(LABELS.get(name, name) for name in names)} in percent, mean over the seeds."


def _metric_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of all metrics by method."""
    rows = [
        [method.name, *(score(method, name) for name in comparison.metrics)] for method in comparison.methods
    ]
    return ["method", *(LABELS[name] for name in comparison.metrics)], rows


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


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
    """Write ``results.csv`` (a row a run), ``results.json``, ``results.md``, the figures and ``report.html``.

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
        [
            f"{name}, seed {run.seed}",
            *(_number(run.metrics[metric]) for metric in comparison.headline),
            f"{run.seconds:.0f} s",
        ]
        for name, run in runs
    ]
    labels = [f"{LABELS[name]}, %" for name in comparison.headline]
    tables = [
        _markdown(header(comparison), table_rows(comparison)),
        _markdown(["run", *labels, "training time"], singles),
        _markdown(*_metric_table(comparison)),
        _markdown(*_class_table(comparison)),
    ]
    write_atomically(out / "results.md", ("\n\n".join(tables) + "\n").encode())


def _lede(comparison: Comparison) -> str:
    """How the outcome came about, in general."""
    seeds = max(len(method.runs) for method in comparison.methods)
    differing = comparison.differing
    if differing == ["model.fusion"]:
        text = (
            f"One network, trained once per fusion method and seed ({seeds} at most): same data in the same order, "
            "same augmentation, schedule and first weights where shared. Only the fusion differs."
        )
    else:
        text = "One run." if len(comparison.runs) == 1 else f"{len(comparison.runs)} runs that differ in "
        if len(comparison.runs) > 1:
            text += (
                f"{', '.join(differing) or 'the seed'}{' and the seed' if differing and seeds > 1 else ''}."
            )
    if seeds == 1 and len(comparison.methods) > 1:
        text += " One seed: differences of a few tenths of a point are within what another seed changes."
    return text


def _pair(comparison: Comparison) -> list[Block]:
    """Of two methods, the other against the baseline in large figures."""
    if len(comparison.methods) != 2:
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
    best = {2 + place: _leader(comparison, name) for place, name in enumerate(comparison.headline)}
    best = best if len(comparison.methods) > 1 else {}
    bars = [
        Bars(LABELS[name], values, x_label="%", highlight=HIGHLIGHT)
        for name in comparison.headline
        if len(values := _bars(comparison, name)) > 1
    ]
    curves = [
        Curve(f"Validation {LABELS[name]}", _mean_curves(comparison, name), y_label="%")
        for name in comparison.headline
    ]
    curve_note = "Mean over the seeds"
    curve_note += (
        f"; the leading {CURVES}, all are in results.json." if len(comparison.methods) > CURVES else "."
    )
    table = Table(header(comparison), table_rows(comparison), best, note=_note(comparison))
    bars_note = "Bars: means. Dots: single seeds. The axis does not start at zero."
    drawn = [Curves(bars, note=bars_note)] if bars else []
    sections = [
        Section("", [*_pair(comparison), table, *drawn, *map(_as_note, notes)]),
        Section("How they learned", [Curves(curves, note=curve_note)]),
        Section("What they see", pictures),
        Section("Class by class", [Table(*_class_table(comparison), note=_class_note(comparison))]),
        Section("All metrics", [Table(*_metric_table(comparison), note="Percent.")]),
        Section("What FreqFusion does", [Text(text) for text in explanation]),
    ]
    differing = comparison.differing
    settings: dict[str, dict[str, Any]] = {}
    for key, value in comparison.runs[0].method_settings.items():
        group, _, name = key.partition(".")
        told = value is not None and not (group == "trainer" and value is False)
        if key not in differing and told:
            settings.setdefault(group, {})[name] = value
    rows = [
        [method.name, *(str(method.runs[0].settings.get(key)) for key in differing)]
        for method in comparison.methods
    ]
    what = [Table(["method", *differing], rows)] if len(differing) > 1 else []
    common = yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False)
    done: list[Block] = [*what, Code(command), Text("The settings that all runs share:"), Code(common)]
    return [section for section in [*sections, Section("How it was done", done)] if section.blocks]


def _as_note(note: str) -> Text:
    return Text(f"{note[0].upper()}{note[1:]}.")
