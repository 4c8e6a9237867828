"""The fair race: one network trained once per fusion method and seed, all else equal.

Every run is a process of ``freqfusion fit`` with the same settings; only ``--model.fusion`` and ``--seed``
differ. Data order and augmentation follow from the seed alone, and so do the first weights of all that the
networks share (see :func:`freqfusion.fusion.create_fusion`). Runs go on where they were interrupted.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from freqfusion.comparison.runs import LABELS, find_headline, is_complete, read_history, read_json
from freqfusion.tasks.image_data import default_workers
from freqfusion.training.callbacks import FACTS

FIRST = ("bilinear", "freqfusion", "carafe", "dysample+")
"""The methods that are run before the others: a race that is cut short has them."""
LOG = "log.txt"
CHECKPOINT_STEPS = 100
LOG_STEPS = 10
"""Steps between two signs of life of a run."""


def in_order(methods: Sequence[str]) -> list[str]:
    """The names of methods with the :data:`FIRST` ones in front.

    >>> in_order(["a2u", "carafe", "bilinear"])
    ['bilinear', 'carafe', 'a2u']
    """
    return [*(name for name in FIRST if name in methods), *(name for name in methods if name not in FIRST)]


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
        facts, rows = read_json(self.folder / FACTS), read_history(self.folder)
        return (int(float(rows[-1]["step"])) if rows else 0, int(facts["steps"])) if facts else (0, 0)

    def exit_code(self) -> int | None:
        """How its process ended; None while it runs, or where none was started."""
        return None if self.process is None else self.process.poll()

    def scores(self) -> dict[str, float]:
        """The first metrics of the latest validation by label, percent; none before it."""
        results = read_json(self.folder / "val_metrics.json")
        names = find_headline(results.get("classes", {}))
        return {LABELS[name]: 100 * results[name] for name in names if results.get(name) is not None}

    def is_done(self) -> bool:
        """Whether the run has come to its end and was judged there."""
        done, steps = self.progress()
        return done == steps and is_complete(self.folder)


def job_of(out: Path, method: str, seed: int) -> Job:
    """The run of a method and a seed in the folder of a race."""
    return Job(method, seed, out / method / f"seed_{seed}")


@dataclass(frozen=True)
class Slot:
    """Room for one run at a time."""

    threads: int
    device: int | None
    """Index of a CUDA device; None: the CPU."""


def make_slots(count: int | None, runs: int, cores: int, devices: int) -> list[Slot]:
    """Room for runs side by side, cores and CUDA devices dealt out evenly.

    Args:
        count: how many; None: one for each device, or for each core where there is no device.
        runs: how many there are at all; more room is not made.
        cores: CPU cores at hand.
        devices: CUDA devices at hand.

    >>> make_slots(None, runs=9, cores=2, devices=0)
    [Slot(threads=1, device=None), Slot(threads=1, device=None)]
    """
    count = min(count or devices or cores, runs)
    threads = max(1, cores // count)
    return [Slot(threads, index % devices if devices else None) for index in range(count)]


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    words: Sequence[str],
    watch: Callable[[], None],
    end: float = math.inf,
) -> None:
    """Run ``freqfusion fit`` for every job that is not done, as many at a time as there are slots.

    A run that fails is marked so and does not stop the others; its output is in its ``log.txt``. Whatever
    ends this function early ends the runs too; they go on from their last checkpoint the next time.

    Args:
        jobs: changed in place: their ``state``.
        slots: see :func:`make_slots`.
        words: the words of the command line of ``fit`` that all runs share.
        watch: called about twice a second, and after every change.
        end: a time of :func:`time.monotonic` at which the runs are ended, if they are not done; they are ``waiting``
            then.
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
                if index not in running and waiting and time.monotonic() < end:
                    running[index] = waiting.pop(0)
                    _start(running[index], slot, words)
            watch()
            if time.monotonic() >= end:
                break
            if running:
                time.sleep(0.5)
    finally:
        for job in running.values():
            if job.process is not None:
                job.process.terminate()
        for job in running.values():
            if job.process is not None:
                job.process.wait()
            job.state = "done" if job.is_done() else "waiting"
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
        judged = read_json(job.folder / "val_metrics.json").get("step", "none")
        return (
            f"it ended at step {done} of {steps} and was last judged at step {judged}: let the run end with a "
            "validation, e.g. by a check_val_every_n_epoch that divides max_epochs"
        )
    return text
