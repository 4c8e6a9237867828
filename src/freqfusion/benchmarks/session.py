"""One run from the machine's limits to the files."""

import datetime
import itertools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import freqfusion
from freqfusion._files import write_atomically
from freqfusion.benchmarks.cases import Case, list_contestants
from freqfusion.benchmarks.cost import describe_machine
from freqfusion.benchmarks.machine import measure_limits
from freqfusion.benchmarks.report import GROWTH_HEADER, HEADER, TEXT_COLUMNS, TRAINING_HEADER, Report
from freqfusion.benchmarks.runner import Settings, measure_case, prefixed, thread_count
from freqfusion.benchmarks.scaling import measure_scaling
from freqfusion.benchmarks.training import LAYOUTS, Network, measure_training
from freqfusion.ops import available_backends

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 104
"""Columns of the widest table."""


def run_benchmark(
    cases: Sequence[Case],
    settings: Settings,
    out: Path,
    *,
    compiled: bool = False,
    scaling: bool = False,
    networks: Sequence[Network] = (),
    minutes: float = math.inf,
    command: str = "",
) -> None:
    """Measure, print tables, and write ``benchmark.json``, ``benchmark.md`` and the plots.

    ``benchmark.json`` is written after every case, so a run that is stopped keeps what it has measured.

    Args:
        cases: of :func:`freqfusion.benchmarks.cases.make_cases`.
        settings: how to measure.
        out: folder of the files; made where it is missing.
        compiled: with :func:`torch.compile` as a contestant.
        scaling: also measure how the cost of FreqFusion grows.
        networks: of :data:`freqfusion.benchmarks.training.NETWORKS`, whose training steps are measured.
        minutes: after which no further case is begun; the page names what was left out.
        command: that was given, for the page.

    Raises:
        ImportError: where a package of the tables or of the plots is absent.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from freqfusion.benchmarks.plots import draw
    from freqfusion.drawing.figures import figure_bytes

    end = time.monotonic() + 60 * minutes
    console = Console()
    console.width = max(console.width, WIDTH)
    contestants = list_contestants(compiled)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress, thread_count(settings.threads):
        task = progress.add_task("limits of the machine")

        def show(what: str) -> None:
            progress.update(task, description=what)

        conditions = _conditions(settings, command)
        report = Report(conditions, measure_limits(settings.device, settings.dtype))

        def keep() -> None:
            write_atomically(out / "benchmark.json", report.json().encode())

        for number, case in enumerate(cases, 1):
            if time.monotonic() > end:
                report.unbegun.append(str(case))
                continue
            place = f"case {number} of {len(cases)}: "
            report.results += measure_case(case, contestants, settings, prefixed(show, place))
            keep()
            if case is cases[-1] or cases[number].shape != case.shape or time.monotonic() > end:
                progress.console.print(_table(str(case.shape), HEADER, report.rows(case.shape)))
        if scaling and time.monotonic() > end:
            report.unbegun.append("scaling")
        elif scaling:
            for point in measure_scaling(contestants, settings, show):
                report.points.append(point)
                keep()
                if time.monotonic() > end:
                    report.unbegun.append(f"scaling beyond {point.axis.name} {point.value}")
                    break
            progress.console.print(_table("How FreqFusion grows", GROWTH_HEADER, report.growth_rows()))
        for network, channels_last in itertools.product(networks, (False, True)):
            if time.monotonic() > end:
                report.unbegun.append(f"training {network.name}, {LAYOUTS[channels_last]}")
                continue
            report.training += measure_training(network, channels_last, settings, prefixed(show, "training "))
            keep()
        if report.training:
            progress.console.print(_table("Training steps", TRAINING_HEADER, report.training_rows()))
        keep()
        show("plots")
        pictures = {name: figure_bytes(figure) for name, figure in draw(report).items()}
    for name, data in pictures.items():
        write_atomically(out / name, data)
    write_atomically(out / "benchmark.md", report.markdown(list(pictures)).encode())
    for title, lines in (("Losses", report.losses()), ("Left out", report.absences())):
        for line in lines:
            console.print(f"{title}: {line}", markup=False, highlight=False)
    console.print(report.summary(), style="dim", markup=False, highlight=False)
    console.print(
        f"Written: {out / 'benchmark.md'}, with benchmark.json and plots", markup=False, highlight=False
    )


def _conditions(settings: Settings, command: str) -> dict[str, Any]:
    load = " ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return {
        **describe_machine(settings.device),
        "freqfusion": freqfusion.__version__,
        "backends": available_backends(),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "rounds": settings.rounds,
        "date": datetime.date.today().isoformat(),
        "load": load,
        "command": command,
    }


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in header:
        table.add_column(
            name.replace(" ", "\n"), justify="left" if name in TEXT_COLUMNS else "right", no_wrap=True
        )
    for row, following in itertools.zip_longest(rows, rows[1:]):
        last = following is not None and following[:2] != row[:2]  # a gap between two passes
        table.add_row(*map(escape, row), end_section=last)
    return table
