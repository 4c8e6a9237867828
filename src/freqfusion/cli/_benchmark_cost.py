"""The command ``freqfusion benchmark --cost``: tables on screen, as CSV, JSON and Markdown, and a plot."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freqfusion._files import write_atomically
from freqfusion._optional import require
from freqfusion.benchmarks import cost
from freqfusion.benchmarks.cost import Cost, Latency

if TYPE_CHECKING:
    from rich.table import Table

FIGURES_HEADER = ("parameters", "GFLOPs forward", "GFLOPs backward", "kept MiB")
SITES_HEADER = ("method", *FIGURES_HEADER, "forward ms", "backward ms")
MODELS_HEADER = ("model", "method", *FIGURES_HEADER)


def run_cost(
    methods: list[str],
    out: Path,
    device: str | None = None,
    quality: tuple[str, Mapping[str, float]] | None = None,
    rounds: int | None = None,
) -> None:
    """Measure what methods cost, print the tables, and write ``cost.csv``, ``cost.json`` and ``cost.md``.

    Args:
        methods: names of :func:`freqfusion.fusion.list_fusions`, each once.
        out: folder of the files; made where it is missing.
        device: where memory and latency are measured; None for the accelerator if there is one, else the CPU.
        quality: a metric, and its value in percent of some of the methods; where given, ``quality_latency.png`` is
            drawn.
        rounds: how many times each latency is sampled; 5 if not given.

    Raises:
        ImportError: where a package of the tables or of the plot is absent.
        ValueError: for an unknown or repeated method, an absent device, fewer than one round, or the quality of
            a method that is not measured.
    """
    rounds = cost.ROUNDS if rounds is None else rounds
    for method in quality[1] if quality else ():
        if method not in methods:
            raise ValueError(
                f"there is a quality of {method!r}, which is not measured; the methods are {', '.join(methods)}"
            )
    for package in ("rich", "matplotlib") if quality else ("rich",):
        require(package, "train")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    place = cost.choose_device(device)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(done: int, total: int, step: str) -> None:
            progress.update(task, completed=done, total=total, description=step)

        costs = cost.measure_costs(methods, place, rounds, show)
    machine = cost.describe_machine(place)
    notes = _notes(machine, rounds)
    sites = [row for row in costs if row.place == cost.THREE_SITES]
    site_rows = [
        (row.method, *_figures(row), _latency(row.forward_ms), _latency(row.backward_ms)) for row in sites
    ]
    model_rows = [(row.place, row.method, *_figures(row)) for row in costs if row.place != cost.THREE_SITES]
    problems = [f"{row.method}, {row.place}: {row.note}" for row in costs if row.note]

    content = {
        "machine": machine,
        "rounds": rounds,
        "notes": notes,
        "costs": [asdict(row) for row in costs],
    }
    write_atomically(out / "cost.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(out / "cost.csv", _csv(costs).encode())
    page = [
        "# Costs",
        notes["sites"],
        _markdown(SITES_HEADER, site_rows),
        notes["models"],
        _markdown(MODELS_HEADER, model_rows),
        notes["counting"],
        *(f"- {problem}" for problem in problems),
    ]
    write_atomically(out / "cost.md", ("\n\n".join(page) + "\n").encode())
    if quality:
        _plot(sites, quality, machine, out / "quality_latency.png")

    console.print(_table(SITES_HEADER, site_rows, "Three FPN sites"))
    console.print(_table(MODELS_HEADER, model_rows, "Models"))
    for line in (*notes.values(), *problems):
        console.print(line, style="dim", markup=False, highlight=False)
    console.print(f"Written: {out / 'cost.md'}, with cost.csv and cost.json", markup=False, highlight=False)


def read_quality(path: Path, methods: list[str]) -> tuple[str, dict[str, float]]:
    """The metric that ranks in a ``results.json`` of ``freqfusion compare``, and its means of some methods.

    Raises:
        ValueError: for another file, or one that has none of the methods.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, label = content["metric"]["name"], str(content["metric"]["label"])
        means = {entry["method"]: entry["metrics"][name]["mean"] for entry in content["methods"]}
        values = {method: float(means[method]) for method in methods if means.get(method) is not None}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the results.json of freqfusion compare ({error!r})") from error
    if not values:
        raise ValueError(f"{path} has none of the methods {', '.join(methods)}, but {', '.join(means)}")
    return label, values


def _notes(machine: Mapping[str, Any], rounds: int) -> dict[str, str]:
    """What a reader must know of the figures."""

    def pair(size: tuple[int, int]) -> str:
        height, width = size
        return f"{height}x{width} to {2 * height}x{2 * width}"

    height, width = cost.IMAGE
    return {
        "sites": f"Sum of three sites with {cost.CHANNELS} channels on both sides: "
        f"{', '.join(map(pair, cost.SITES))}; batch 1, float32. Latency: one site, {pair(cost.LATENCY_SITE)}, "
        f"median ± half the interquartile range of {rounds} interleaved rounds on {machine['device_name']} "
        f"({machine['device']}, {machine['threads']} threads), PyTorch {machine['torch']}.",
        "models": f"Whole models: one image of {height}x{width}, {cost.NUM_CLASSES} classes, float32. "
        "Memory is what torch's own operators keep.",
        "counting": "GFLOPs: 2 a multiply-add of convolutions, matrix products and reassembly; elementwise "
        "arithmetic, softmax, normalisation, interpolation and grid_sample count as nothing. Kept: distinct "
        "storages that a forward pass leaves to the backward pass, besides inputs, parameters and buffers.",
    }


def _figures(row: Cost) -> tuple[str, ...]:
    return (
        _cell(row.parameters, 1, ",d"),
        _cell(row.flops_forward, 1e9, ",.2f"),
        _cell(row.flops_backward, 1e9, ",.2f"),
        _cell(row.saved_bytes, 2**20, ",.1f"),
    )


def _cell(value: int | None, unit: float, style: str) -> str:
    return "-" if value is None else format(value if unit == 1 else value / unit, style)


def _latency(latency: Latency | None) -> str:
    if latency is None:
        return "-"
    digits = max(0, 3 - len(str(int(latency.median))))  # three significant ones, unless there are more
    return f"{latency.median:.{digits}f} ± {(latency.upper - latency.lower) / 2:.{digits}f}"


def _csv(costs: Sequence[Cost]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    passes = ("forward_ms", "backward_ms")
    counts = ("place", "method", "parameters", "weights", "flops_forward", "flops_backward", "saved_bytes")
    quartiles = ("median", "lower", "upper")
    writer.writerow([*counts, *(f"{name}_{part}" for name in passes for part in quartiles), "note"])
    for row in costs:
        times = [getattr(getattr(row, name), part, None) for name in passes for part in quartiles]
        writer.writerow([*(getattr(row, name) for name in counts), *times, row.note])
    return buffer.getvalue()


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = [index for index, name in enumerate(header) if name in ("method", "model")]
    rule = ["---" if index in text else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> "Table":
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in header:
        text = name in ("method", "model")
        table.add_column(name.replace(" ", "\n"), justify="left" if text else "right", no_wrap=True)
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        last = header[0] == "model" and following is not None and following[0] != row[0]
        table.add_row(*map(escape, row), end_section=last)  # a gap between two models
    return table


def _plot(
    sites: Sequence[Cost], quality: tuple[str, Mapping[str, float]], machine: Mapping[str, Any], path: Path
) -> None:
    from freqfusion.drawing.figures import figure_bytes, plot_scatter

    metric, values = quality
    points = {
        row.method: (row.forward_ms.median, values[row.method])
        for row in sites
        if row.forward_ms is not None and row.method in values
    }
    figure = plot_scatter(
        points,
        title="Quality against latency",
        x_label=f"forward pass, ms ({machine['device_name']})",
        y_label=f"{metric}, %",
    )
    write_atomically(path, figure_bytes(figure))
