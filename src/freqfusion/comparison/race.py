"""The fair race: one network trained once per fusion method and seed, all else equal, and what came out.

Every run is a process of ``freqfusion fit`` with the same settings; only ``--model.fusion`` and ``--seed``
differ. Data order and augmentation follow from the seed alone, and so do the first weights of all that the
networks share (see :func:`freqfusion.fusion.create_fusion`). Runs go on where they were interrupted.
"""

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freqfusion.tasks.image_data import default_workers
from freqfusion.training.callbacks import FACTS, HISTORY

RESULTS = "val_metrics.json"
LOG = "log.txt"
CHECKPOINT_STEPS = 100
LOG_STEPS = 10
"""Steps between two signs of life of a run."""


@dataclass
class Job:
    """One run: a method, a seed and the folder of its files."""

    method: str
    seed: int
    folder: Path
    state: str = "waiting"
    """``waiting``, ``running``, ``done`` or ``failed``."""
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def progress(self) -> tuple[int, int]:
        """Steps done and steps to do; (0, 0) before the run has begun."""
        facts = _read_json(self.folder / FACTS)
        rows = read_history(self.folder)
        return (int(float(rows[-1]["step"])) if rows else 0, int(facts["steps"])) if facts else (0, 0)

    def exit_code(self) -> int | None:
        """How its process ended; None while it runs, or where none was started."""
        return None if self.process is None else self.process.poll()

    def scores(self) -> tuple[float, float]:
        """mIoU and boundary IoU of the latest validation, percent; NaN before the first."""
        results = _read_json(self.folder / RESULTS)
        return 100 * results.get("miou", math.nan), 100 * results.get("boundary_iou", math.nan)

    def is_done(self) -> bool:
        """Whether the run has come to its end and was judged there."""
        facts, results = _read_json(self.folder / FACTS), _read_json(self.folder / RESULTS)
        return bool(facts and results) and int(results["step"]) == int(facts["steps"])


@dataclass(frozen=True)
class Outcome:
    """What one complete run gave; scores in percent, those of the last validation (no epoch is picked)."""

    method: str
    seed: int
    folder: Path
    parameters: int
    seconds: float
    """Time of training without validation."""
    miou: float
    boundary_iou: float
    classes: dict[str, dict[str, float | None]]
    """IoU and boundary IoU (0 to 1) of each class; None where it is absent."""
    curve: list[tuple[int, float, float]]
    """Step, mIoU and boundary IoU at each validation."""


@dataclass(frozen=True)
class Standing:
    """A method's place, with mean and standard deviation over its seeds."""

    method: str
    outcomes: tuple[Outcome, ...]
    difference: float | None
    """Mean of its mIoU minus the leader's over the seeds both have; None for the leader."""
    p_value: float | None
    """Of the paired t test against the leader over those seeds; None with fewer than two."""

    def mean(self, score: str) -> float:
        """Mean over the seeds of a field of :class:`Outcome`."""
        return statistics.mean(getattr(outcome, score) for outcome in self.outcomes)

    def spread(self, score: str) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        values = [getattr(outcome, score) for outcome in self.outcomes]
        return statistics.stdev(values) if len(values) > 1 else None


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a file, empty where there is none (files are written whole, so never half of one)."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content


def read_history(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv``; none where there is no such file."""
    try:
        with (folder / HISTORY).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def job_of(out: Path, method: str, seed: int) -> Job:
    """The run of a method and a seed in the folder of a race."""
    return Job(method, seed, out / method / f"seed_{seed}")


@dataclass(frozen=True)
class Slot:
    """Room for one run at a time."""

    threads: int
    device: int | None
    """Index of a CUDA device; None: the CPU."""


def make_slots(count: int | None, cores: int, devices: int) -> list[Slot]:
    """Room for ``count`` runs side by side, cores and CUDA devices dealt out evenly.

    Args:
        count: how many; None: one for each device, or for each core where there is no device.
        cores: CPU cores at hand.
        devices: CUDA devices at hand.

    >>> make_slots(None, cores=2, devices=0)
    [Slot(threads=1, device=None), Slot(threads=1, device=None)]
    """
    count = count or devices or cores
    threads = max(1, cores // count)
    return [Slot(threads, index % devices if devices else None) for index in range(count)]


def run_jobs(
    jobs: Sequence[Job], slots: Sequence[Slot], words: Sequence[str], watch: Callable[[], None]
) -> None:
    """Run ``freqfusion fit`` for every job that is not done, as many at a time as there are slots.

    A run that fails is marked so and does not stop the others; its output is in its ``log.txt``. Whatever
    ends this function early ends the runs too; they go on from their last checkpoint the next time.

    Args:
        jobs: changed in place: their ``state``.
        slots: see :func:`make_slots`.
        words: the words of the command line of ``fit`` that all runs share.
        watch: called about twice a second, and after every change.
    """
    waiting = [job for job in jobs if not job.is_done()]
    for job in jobs:
        job.state = "waiting" if job in waiting else "done"
    running: dict[int, Job] = {}
    try:
        while waiting or running:
            for index, slot in enumerate(slots):
                if index in running and (code := running[index].exit_code()) is not None:
                    job = running.pop(index)
                    job.state = "done" if code == 0 and job.is_done() else "failed"
                if index not in running and waiting:
                    running[index] = waiting.pop(0)
                    _start(running[index], slot, words)
            watch()
            if running:
                time.sleep(0.5)
    finally:
        for job in running.values():
            if job.process is not None:
                job.process.terminate()
        for job in running.values():
            if job.process is not None:
                job.process.wait()
    watch()


def _start(job: Job, slot: Slot, words: Sequence[str]) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(slot.threads)}
    if slot.device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot.device)
    workers = ["--data.workers", str(default_workers(slot.threads))]
    command = [sys.executable, "-m", "freqfusion", "fit", *workers, *words, *job_words(job), "--resume"]
    with (job.folder / LOG).open("wb") as log:
        job.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    job.state = "running"


def job_words(job: Job) -> list[str]:
    """The words of ``fit`` by which one run differs from the others."""
    return [
        *("--model.fusion", job.method),
        *("--seed", str(job.seed)),
        *("--out", str(job.folder)),
        *("--checkpoint_steps", str(CHECKPOINT_STEPS)),
        *("--log_steps", str(LOG_STEPS)),
    ]


def why_failed(job: Job) -> str:
    """The last line that a failed run printed, or what else was wrong with it."""
    lines = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    text = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    done, steps = job.progress()
    if job.exit_code() == 0 and steps:
        judged = _read_json(job.folder / RESULTS).get("step", "none")
        return (
            f"it ended at step {done} of {steps} and was last judged at step {judged}: let the run end with a "
            "validation, e.g. by a check_val_every_n_epoch that divides max_epochs"
        )
    return text


def collect(out: Path) -> list[Outcome]:
    """The complete runs in the folder of a race, whenever they were made."""
    outcomes = []
    for folder in sorted(out.glob("*/seed_*")):
        job = Job(folder.parent.name, int(folder.name.removeprefix("seed_")), folder)
        if not job.is_done():
            continue
        facts, results, rows = _read_json(folder / FACTS), _read_json(folder / RESULTS), read_history(folder)
        outcomes.append(
            Outcome(
                method=job.method,
                seed=job.seed,
                folder=folder,
                parameters=int(facts["parameters"]),
                seconds=float(rows[-1]["seconds"]),
                miou=100 * results["miou"],
                boundary_iou=100 * results["boundary_iou"],
                classes=results["classes"],
                curve=[
                    (
                        int(float(row["step"])),
                        100 * float(row["val_miou"]),
                        100 * float(row["val_boundary_iou"]),
                    )
                    for row in rows
                    if row["val_miou"]
                ],
            )
        )
    return outcomes


def rank(outcomes: Iterable[Outcome]) -> list[Standing]:
    """The methods by mean mIoU, best first."""
    by_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.method, []).append(outcome)
    order = sorted(by_method, key=lambda name: -statistics.mean(run.miou for run in by_method[name]))
    standings: list[Standing] = []
    for method in order:
        runs = tuple(sorted(by_method[method], key=lambda run: run.seed))
        difference = p_value = None
        if method != order[0]:
            leader = {run.seed: run.miou for run in by_method[order[0]]}
            differences = [run.miou - leader[run.seed] for run in runs if run.seed in leader]
            difference = statistics.mean(differences) if differences else None
            p_value = paired_p_value(differences)
        standings.append(Standing(method, runs, difference, p_value))
    return standings


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p value of the paired t test: how often pairs without a true difference differ this much.

    Args:
        differences: one a pair; fewer than two give None.

    >>> paired_p_value([1.0]) is None, round(paired_p_value([1.0, 2.0, 3.0]), 4)
    (True, 0.0742)
    """
    count = len(differences)
    if count < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(count)
    mean = statistics.mean(differences)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 1 - _student_within(abs(mean / error), count - 1)


def _student_within(t: float, degrees: int) -> float:
    """Chance that Student's t lies within +-t (Abramowitz and Stegun, 1964, equations 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees % 2:
        term, total = cosine, 0.0
        for k in range(3, degrees + 1, 2):
            total += term
            term *= cosine**2 * (k - 1) / k
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 0.0
    for k in range(2, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return sine * total
