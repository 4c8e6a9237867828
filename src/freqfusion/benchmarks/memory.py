"""Peak memory of a case: each contestant runs it once, on a CPU in a fresh process."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from freqfusion.benchmarks.cases import BOTH, FORWARD, Case, Problem

STATUS = Path("/proc/self/status")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Probe:
    """What the first run of each pass took."""

    seconds: dict[str, float]
    peak_bytes: dict[str, int | None]
    """Above what was held before, the results included; None where the system does not tell."""


class Meter:
    """Peak memory since it was made, beyond what was held then.

    On the CPU: resident memory of the process as Linux counts it. On CUDA: what torch allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        elif self._counts_resident():
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            self._start = status_bytes("VmRSS")

    def peak(self) -> int | None:
        """Bytes, or None where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        return max(0, status_bytes("VmHWM") - self._start) if self._counts_resident() else None

    def _counts_resident(self) -> bool:
        return self._device.type == "cpu" and STATUS.exists()


def status_bytes(name: str, path: Path = STATUS) -> int:
    (line,) = (line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _limit_memory() -> None:
    """Let an allocation beyond what is free fail, rather than make the machine swap or kill other processes."""
    if STATUS.exists():
        import resource  # not on every system

        free = status_bytes("MemAvailable", Path("/proc/meminfo"))
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = status_bytes("VmData") + free
        resource.setrlimit(
            resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )


def _shrunk(case: Case) -> Case:
    """A case that loads the same code, too small to leave memory that the measured case could use again."""

    def limit(size: tuple[int, int], longest: int) -> tuple[int, int]:
        return min(size[0], longest), min(size[1], longest)

    shape = case.shape
    coarse, fine = (64, 64) if case.operation.whole_model else (8, 16)
    small = replace(shape, batch=1, coarse=limit(shape.coarse, coarse), fine=limit(shape.fine, fine))
    return replace(case, shape=small)


def _run(case: Case, contestant: str, device: torch.device, dtype: torch.dtype) -> Probe:
    small = Problem(_shrunk(case), contestant, device, dtype)
    small.forward()
    small.forward_backward()
    problem = Problem(case, contestant, device, dtype)
    meter = Meter(device)

    start = time.perf_counter()
    outputs = problem.forward()
    problem.wait()
    forward_seconds = time.perf_counter() - start
    forward_peak = meter.peak()

    problem.make_gradients(outputs)
    given = sum(gradient.nbytes for gradient in problem.gradients)  # part of the question, not of the pass
    del outputs
    start = time.perf_counter()
    gradients = problem.forward_backward()
    problem.wait()
    both_seconds = time.perf_counter() - start
    both_peak = meter.peak()
    del gradients  # held until now, for they are results
    if forward_peak is not None and both_peak is not None:
        both_peak = max(forward_peak, both_peak - given)
    return Probe({FORWARD: forward_seconds, BOTH: both_seconds}, {FORWARD: forward_peak, BOTH: both_peak})


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _answer(
    connection: Connection, threads: int, measure: Callable[..., object], arguments: Sequence[object]
) -> None:
    """Run in the fresh process."""
    torch.set_num_threads(threads)
    _limit_memory()
    # whatever goes wrong for one contestant must not cost the others' figures
    try:
        connection.send(measure(*arguments))
    except Exception as error:
        connection.send(_first_line(error))


def probe(case: Case, contestant: str, device: torch.device, dtype: torch.dtype, threads: int) -> Probe:
    """Run both passes of a case once, on a CPU in a fresh process.

    On CUDA torch counts what it allocates, so this process serves; a fresh one would take seconds to start.

    Args:
        case: what to compute.
        contestant: of :func:`freqfusion.benchmarks.cases.list_contestants`, but not the compiled one: its
            compiler would be measured too.
        device: where.
        dtype: of inputs and weights.
        threads: of the CPU.

    Raises:
        RuntimeError: if the passes do not run; the message says why, for one too little memory.
    """
    return run_apart(_run, (case, contestant, device, dtype), device, threads)


def run_apart(
    measure: Callable[..., Result], arguments: Sequence[object], device: torch.device, threads: int
) -> Result:
    """What a function of a module gives, run in a fresh process for the CPU and in this one for CUDA.

    Raises:
        RuntimeError: if it does not run; the message says why.
    """
    if device.type == "cuda":
        try:
            return measure(*arguments)
        except Exception as error:
            raise RuntimeError(_first_line(error)) from error
        finally:
            torch.cuda.empty_cache()
    # A server that has imported torch forks a process per call, in milliseconds; importing takes seconds.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver") if forks else multiprocessing.get_context("spawn")
    # what the first call of a registered operator imports, which is slow too
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, threads, measure, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        answer: Result | str = ours.recv()
    except EOFError:
        process.join()
        answer = f"its process ended with code {process.exitcode}; -9 is the system's when memory runs out"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer
