"""Measures cases: contestants take turns, and each round gives a ratio of its own."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from freqfusion.benchmarks.cases import COMPILED, PASSES, PEER, Case, Problem, Work, least_work, why_not
from freqfusion.benchmarks.memory import Probe, probe

ROUNDS = 7
BUDGET_SECONDS = 10.0
"""A contestant takes part in as many rounds of a pass as fit in this time, in one at least."""
WARM_UP_SECONDS = 2.0
"""A pass that takes longer gains nothing worth waiting for from a warm-up."""
MIN_SECONDS = 0.02
"""A turn repeats a pass until it is this long: shorter ones drown in the noise of the clock."""

Step = Callable[[str], None]
"""Told before each step what comes."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    rounds: int = ROUNDS


@dataclass(frozen=True)
class Result:
    """One pass of one contestant in one case; without samples ``note`` says why it did not run."""

    case: Case
    contestant: str
    pass_name: str
    work: Work
    samples: tuple[float, ...] = ()
    """Seconds of one pass, a round each."""
    ratio: float | None = None
    """How many times as fast as the peer: the median over the rounds that both took part in."""
    peak_bytes: int | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        samples = torch.tensor(self.samples, dtype=torch.float64)
        return float(samples.quantile(0.75) - samples.quantile(0.25)) / 2


def prefixed(step: Step, prefix: str) -> Step:
    """``step`` that is told ``prefix`` first, every time."""
    return lambda what: step(prefix + what)


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Let torch have so many threads on the CPU for the while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def median_ratio(peer: Sequence[float], own: Sequence[float]) -> float | None:
    """Median over the rounds of the peer's time by one's own; None where the peer did not run.

    >>> median_ratio([8.0, 9.0, 20.0], [2.0, 3.0])
    3.5
    """
    ratios = [theirs / ours for theirs, ours in zip(peer, own, strict=False)]  # rounds of both
    return statistics.median(ratios) if ratios else None


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    expected: Mapping[str, float],
    wait: Callable[[], object] = lambda: None,
    step: Step = lambda what: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time calls in interleaved rounds, so that a busy spell of the machine meets all of them.

    Who goes first changes from round to round. Calls warm up before, unless they are expected to take longer
    than :data:`WARM_UP_SECONDS`.

    Args:
        calls: what to time.
        rounds: how many at most; a call takes part in as many as fit in the budget, in one at least.
        expected: seconds of a call, where known.
        wait: returns when the device has done what the calls asked for; once a turn.
        step: told before each step.

    Returns:
        For each call the seconds of every round it took part in, always the first ones; and for each call that
        failed, why.
    """

    def measure(name: str, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            calls[name]()
        wait()
        return (time.perf_counter() - start) / repeats

    samples: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    repeats: dict[str, int] = {}
    turns: dict[str, int] = {}
    for name in calls:
        seconds = expected.get(name, 0.0)
        if seconds <= WARM_UP_SECONDS:
            step(f"{name}, warm-up")
            try:  # whatever one contestant raises must not cost the others' figures
                measure(name, 1)
                seconds = measure(name, 1)
            except Exception as error:
                failures[name] = str(error).strip().partition("\n")[0] or type(error).__name__
                continue
        repeats[name] = math.ceil(MIN_SECONDS / seconds)
        turns[name] = max(1, min(rounds, int(BUDGET_SECONDS / (repeats[name] * seconds))))
        samples[name] = []
    for number in range(rounds):
        names = [name for name in samples if turns[name] > number]
        first = number % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            step(f"{name}, round {number + 1} of {rounds}")
            samples[name].append(measure(name, repeats[name]))
    return samples, failures


def _wait(problems: Iterable[Problem]) -> None:
    for problem in problems:
        problem.wait()


def measure_case(
    case: Case, contestants: Sequence[str], settings: Settings, step: Step = lambda what: None
) -> list[Result]:
    """Measure both passes of a case: memory first, in processes of their own, then time.

    Args:
        case: what to compute.
        contestants: of :func:`freqfusion.benchmarks.cases.list_contestants`, the peer first.
        settings: how.
        step: told before each step.

    Returns:
        A result a pass and contestant, pass by pass.
    """
    notes: dict[str, str] = {}
    probes: dict[str, Probe] = {}
    problems: dict[str, Problem] = {}
    for name in contestants:
        notes[name] = why_not(case, name, settings.device, settings.dtype)
        if notes[name]:
            continue
        if name != COMPILED:
            step(f"{case}: {name}, memory")
            try:
                probes[name] = probe(case, name, settings.device, settings.dtype, settings.threads)
            except RuntimeError as error:
                notes[name] = str(error)
                continue
        problems[name] = Problem(case, name, settings.device, settings.dtype)
    work = least_work(case, settings.dtype)
    results = []
    for pass_name in PASSES:
        with thread_count(settings.threads):
            samples, failures = take_turns(
                {name: partial(problem.run, pass_name) for name, problem in problems.items()},
                settings.rounds,
                {name: seen.seconds[pass_name] for name, seen in probes.items()},
                partial(_wait, problems.values()),
                prefixed(step, f"{case}: {pass_name}, "),
            )
        for name in contestants:
            own = samples.get(name, [])
            results.append(
                Result(
                    case,
                    name,
                    pass_name,
                    work[pass_name],
                    tuple(own),
                    median_ratio(samples.get(PEER, []), own),
                    probes[name].peak_bytes[pass_name] if name in probes else None,
                    notes[name] or failures.get(name, ""),
                )
            )
    return results
