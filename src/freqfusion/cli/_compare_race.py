"""The race of ``freqfusion compare``: checks, runs with a live table, results."""

import shlex
import time
from datetime import timedelta
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from freqfusion._files import write_atomically
from freqfusion.cli._lightning import CommandLine, UsageError, report_usage_error
from freqfusion.comparison import race, race_page
from freqfusion.comparison.race import Job, Slot
from freqfusion.tasks.image_data import available_cores
from freqfusion.tasks.semantic import SegmentationModule

SETTINGS = "settings.txt"


def run_race(
    methods: list[str],
    seeds: int,
    out: Path,
    config: Path,
    words: list[str],
    *,
    command: str,
    leaders: int | None,
    jobs: int | None,
    images: bool,
) -> int:
    """Run the race and write its results; returns the exit code.

    Args:
        methods: names of fusion methods.
        seeds: how many.
        out: folder of the race.
        config: the recipe.
        words: further words of ``fit``.
        command: the line that repeats the race, for its page.
        leaders: how many of the best methods of the first seed run the other seeds; None: all.
        jobs: runs side by side; None: as many as the machine has room for.
        images: show the data set's images in the pictures.
    """
    fit_words = ["--config", str(config), *words]
    recipe = config.read_text(encoding="utf-8")
    settings = f"{recipe}\n# {shlex.join(words)}\n"
    try:
        _check_settings(out / SETTINGS, settings)
        # What is wrong with the recipe, the data or a method is found here, before the first run.
        for method in methods:
            check = [*fit_words, *race.job_words(race.job_of(out, method, 0)), "--resume"]
            line = CommandLine("fit", "", check)
            if not isinstance(line.model, SegmentationModule):
                raise UsageError(
                    f"{config} is of the task {line.model.task}, but a race ranks semantic segmentation: fit each "
                    "method by itself (--model.fusion NAME)"
                )
            line.datamodule.setup("fit")
    except UsageError as error:
        return report_usage_error("compare", error)
    write_atomically(out / SETTINGS, settings.encode())

    console = Console()
    slots = race.make_slots(jobs, available_cores(), torch.cuda.device_count())
    console.print(
        f"methods: {len(methods)}, seeds: {seeds}, runs side by side: {len(slots)}; results in {out}",
        highlight=False,
        markup=False,
    )
    everyone = methods if leaders is None else []
    runs = [race.job_of(out, method, 0) for method in methods]
    runs += [race.job_of(out, method, seed) for seed in range(1, seeds) for method in everyone]
    _run_shown(runs, runs, slots, fit_words, console)
    if leaders is not None:
        first = [run for run in race.collect(out) if run.seed == 0 and run.method in methods]
        best = [standing.method for standing in race.rank(first)[:leaders]]
        more = [race.job_of(out, method, seed) for seed in range(1, seeds) for method in best]
        runs += more
        _run_shown(more, runs, slots, fit_words, console)

    failed = [job for job in runs if job.state == "failed"]
    for job in failed:
        console.print(
            f"{job.method}, seed {job.seed} failed: {race.why_failed(job)} (see {job.folder / race.LOG})",
            highlight=False,
            markup=False,
        )
    standings = race.rank(race.collect(out))
    if standings:
        setting = race_page.Setting(out.name, command, recipe, leaders)
        race_page.write_results(out, standings, setting, images=images)
        table = Table(*race_page.HEADER, box=SIMPLE_HEAD, padding=(0, 0))
        for column in table.columns[1:]:
            column.justify = "right"
        for row in race_page.table_rows(standings):
            table.add_row(*map(Text, row))
        console.print(table)
        console.print(race_page.headline(standings) + ".", highlight=False, markup=False)
        console.print(f"The page with bars, curves and pictures: {out / 'report.html'}", markup=False)
    return 1 if failed else 0


def _check_settings(path: Path, settings: str) -> None:
    """Refuse to mix a race with another one in the same folder."""
    if path.exists() and path.read_text(encoding="utf-8") != settings:
        raise UsageError(
            f"{path.parent} holds a race with other settings (see {path}): choose another folder with --out, "
            "give the same recipe and options, or delete that file if what differs does not matter"
        )


def _run_shown(
    jobs: list[Job], shown: list[Job], slots: list[Slot], words: list[str], console: Console
) -> None:
    """Run ``jobs`` under a live table of ``shown``; where there is no terminal, with a line a change."""
    if not console.is_terminal:
        states: dict[str, str] = {}
        race.run_jobs(jobs, slots, words, lambda: _print_changes(jobs, states, console))
        return
    began = time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        race.run_jobs(
            jobs,
            slots,
            words,
            lambda: live.update(_live_table(shown, time.monotonic() - began), refresh=True),
        )


def _live_table(jobs: list[Job], seconds: float) -> Table:
    done = sum(job.state == "done" for job in jobs)
    caption = f"{done} of {len(jobs)} runs done, {timedelta(seconds=int(seconds))} since the start"
    table = Table("method", "seeds done", "running", "mIoU, %", "boundary IoU, %", caption=caption)
    for method in dict.fromkeys(job.method for job in jobs):
        own = [job for job in jobs if job.method == method]
        running = [_progress(job) for job in own if job.state == "running"]
        running += [f"[red]seed {job.seed} failed[/]" for job in own if job.state == "failed"]
        scores = [job.scores() for job in own if job.state == "done"]
        means = [f"{sum(column) / len(scores):.2f}" for column in zip(*scores, strict=True)] or ["", ""]
        table.add_row(Text(method), f"{len(scores)} of {len(own)}", ", ".join(running), *means)
    return table


def _progress(job: Job) -> str:
    done, steps = job.progress()
    return f"seed {job.seed}: step {done} of {steps}" if steps else f"seed {job.seed} starts"


def _print_changes(jobs: list[Job], states: dict[str, str], console: Console) -> None:
    for job in jobs:
        name = f"{job.method}, seed {job.seed}"
        if job.state not in ("waiting", states.get(name)):
            states[name] = job.state
            scores = (
                "mIoU {:.2f} %, boundary IoU {:.2f} %".format(*job.scores()) if job.state == "done" else ""
            )
            console.print(f"{name}: {job.state} {scores}".rstrip(), highlight=False, markup=False)
