"""The race of ``freqfusion compare`` and ``quickstart``: checks, runs with a live table, and what came out."""

import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from freqfusion._cores import available_cores
from freqfusion._files import write_atomically
from freqfusion.cli._lightning import CommandLine, UsageError, report_usage_error
from freqfusion.comparison import page, race
from freqfusion.comparison.race import Job, Slot
from freqfusion.comparison.runs import Comparison, compare_runs, is_complete
from freqfusion.tasks.image_data import CACHE_VARIABLE

SETTINGS = "settings.txt"
CACHE = ".cache"
"""A folder of the race, while it runs, with the decoded data set, which all runs map into memory."""
_OF_LEADERS = (
    "All methods ran with the first seed; the best {} then ran with the others too, so their lead over the rest is "
    "partly the luck of that seed."
)


def run_race(
    methods: list[str],
    seeds: Sequence[int],
    out: Path,
    config: Path,
    words: list[str],
    *,
    command: str,
    title: str,
    leaders: int | None = None,
    jobs: int | None = None,
    baseline: str | None = None,
    explanation: Sequence[str] = (),
    images: bool = True,
    minutes: float = math.inf,
) -> int:
    """Train what is missing in the folder of a race and compare all that is complete; returns the exit code.

    Args:
        methods: names of fusion methods.
        seeds: of each method's runs.
        out: folder of the race.
        config: the recipe.
        words: further words of ``fit``.
        command: the words of the command that repeats the race, for its page.
        title: of the page.
        leaders: how many of the best methods of the first seed run the other seeds; None: all.
        jobs: runs side by side; None: what the machine has room for.
        baseline: what others are held against; the leader if not given.
        explanation: paragraphs of the page.
        images: show the data set's images in the pictures.
        minutes: after so many the runs are ended, and those that are complete compared.
    """
    end = time.monotonic() + 60 * minutes
    fit_words = ["--config", str(config), *words]
    settings = f"{config.read_text(encoding='utf-8')}\n# {shlex.join(words)}\n"
    try:
        _check_settings(out / SETTINGS, settings)
        # What is wrong with the recipe, the data or a method is found here, before the first run.
        for method in methods:
            check = [*fit_words, *race.job_words(race.job_of(out, method, seeds[0])), "--resume"]
            data = CommandLine("fit", "", check).datamodule
            data.setup("fit")
    except UsageError as error:
        return report_usage_error(command.split()[1], error)
    write_atomically(out / SETTINGS, settings.encode())

    console = Console()
    runs = [race.job_of(out, method, seeds[0]) for method in methods]
    rest = [race.job_of(out, method, seed) for seed in seeds[1:] for method in methods]
    slots = race.make_slots(jobs, len(runs + rest), available_cores(), torch.cuda.device_count())
    console.print(
        f"methods: {len(methods)}, seeds: {len(seeds)}, runs side by side: {len(slots)}; results in {out}",
        highlight=False,
        markup=False,
    )
    if leaders is None:
        runs += rest
    with _decoded_once(data, out / CACHE, any(not job.is_done() for job in (*runs, *rest))):
        _run_shown(runs, runs, slots, fit_words, console, end)
        done = [job.folder for job in runs if job.state == "done"]
        if leaders is not None and done:
            best = {str(m.runs[0].settings["model.fusion"]) for m in compare_runs(done).methods[:leaders]}
            more = [job for job in rest if job.method in best]
            runs += more
            _run_shown(more, runs, slots, fit_words, console, end)

    left = [f"{job.method}, seed {job.seed}" for job in runs if job.state == "waiting"]
    if left:
        console.print(
            f"left after {minutes:g} minutes: {'; '.join(left)}. The same line goes on with them.",
            highlight=False,
            markup=False,
        )
    failed = [job for job in runs if job.state == "failed"]
    for job in failed:
        console.print(
            f"{job.method}, seed {job.seed} failed: {race.why_failed(job)} (see {job.folder / race.LOG})",
            highlight=False,
            markup=False,
        )
    complete = [folder for folder in sorted(out.glob("*/seed_*")) if is_complete(folder)]
    if complete:
        lede = "" if leaders is None else _OF_LEADERS.format(leaders)
        known = {folder.parent.name for folder in complete}
        comparison = compare_runs(complete, baseline=baseline if baseline in known else None)
        notes = page.write_comparison(
            out, comparison, title=title, command=command, lede=lede, explanation=explanation, images=images
        )
        show(comparison, notes, out, console)
    return 1 if failed else 0


def show(comparison: Comparison, notes: Sequence[str], out: Path, console: Console) -> None:
    """Print the table and the outcome, and where the page is."""
    shown = page.method_table(comparison)
    table = Table(*shown.header, box=SIMPLE_HEAD, padding=(0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in shown.rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for line in (*notes, page.headline(comparison)):
        console.print(f"{line}.", highlight=False, markup=False)
    console.print(f"The page with curves and pictures: {out / 'report.html'}", highlight=False, markup=False)


def _check_settings(path: Path, settings: str) -> None:
    """Refuse to mix a race with another one in the same folder."""
    if path.exists() and path.read_text(encoding="utf-8") != settings:
        raise UsageError(
            f"{path.parent} holds a race with other settings (see {path}): choose another folder with --out, "
            "give the same recipe and options, or delete that file if what differs does not matter"
        )


@contextmanager
def _decoded_once(data: Any, folder: Path, needed: bool) -> Iterator[None]:
    """Decode the data set for all runs that are started inside, if it is to be cached."""
    if not (needed and data.hparams["cache"]):
        yield
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a race that was killed
    folder.mkdir(parents=True)
    try:
        data.share(folder)
        os.environ[CACHE_VARIABLE] = str(folder.resolve())
        yield
    finally:
        os.environ.pop(CACHE_VARIABLE, None)
        shutil.rmtree(folder, ignore_errors=True)


def _run_shown(
    jobs: list[Job], shown: list[Job], slots: list[Slot], words: list[str], console: Console, end: float
) -> None:
    """Run ``jobs`` under a live table of ``shown``; where there is no terminal, with a line a change."""
    if not console.is_terminal:
        states: dict[str, str] = {}
        race.run_jobs(jobs, slots, words, lambda: _print_changes(jobs, states, console), end)
        return
    began = time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        race.run_jobs(
            jobs,
            slots,
            words,
            lambda: live.update(_live_table(shown, time.monotonic() - began), refresh=True),
            end,
        )


def _live_table(jobs: list[Job], seconds: float) -> Table:
    done = sum(job.state == "done" for job in jobs)
    caption = f"{done} of {len(jobs)} runs done, {timedelta(seconds=int(seconds))} since the start"
    table = Table("method", "seeds done", "running", "mean so far", caption=caption)
    for method in dict.fromkeys(job.method for job in jobs):
        own = [job for job in jobs if job.method == method]
        running = [_progress(job) for job in own if job.state == "running"]
        running += [f"[red]seed {job.seed} failed[/]" for job in own if job.state == "failed"]
        scores = [job.scores() for job in own if job.state == "done"]
        means = (
            {name: sum(entry.get(name, 0.0) for entry in scores) / len(scores) for name in scores[0]}
            if scores
            else {}
        )
        table.add_row(Text(method), f"{len(scores)} of {len(own)}", ", ".join(running), _shown(means))
    return table


def _shown(scores: dict[str, float]) -> str:
    return ", ".join(f"{label} {value:.2f} %" for label, value in scores.items())


def _progress(job: Job) -> str:
    done, steps = job.progress()
    return f"seed {job.seed}: step {done} of {steps}" if steps else f"seed {job.seed} starts"


def _print_changes(jobs: list[Job], states: dict[str, str], console: Console) -> None:
    for job in jobs:
        name = f"{job.method}, seed {job.seed}"
        if job.state not in ("waiting", states.get(name)):
            states[name] = job.state
            scores = _shown(job.scores()) if job.state == "done" else ""
            console.print(f"{name}: {job.state} {scores}".rstrip(), highlight=False, markup=False)
