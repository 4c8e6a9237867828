"""Kernels of a backward pass, compiled on other cores while the forward pass goes on.

A first step waits for its compiler, one kernel after the other, and the backward pass has two thirds of them. So
when an operator has compiled a kernel, its derivative is rehearsed: it runs on tensors that nobody filled, and a few
threads compile what it would launch (the compiler lets go of Python's lock). What the rehearsal does not foresee, or
has no time for, is compiled when it is launched, as without it.
"""

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from freqfusion._cores import available_cores
from freqfusion.ops._triton import launch

THREADS = max(1, min(3, available_cores() - 1))
"""At most at a time. One core is left for the forward pass, which compiles too; more than three find little to do."""

PARSES_IN_THREADS = not ((3, 11) <= sys.version_info < (3, 11, 8) or (3, 12) <= sys.version_info < (3, 12, 2))
"""Whether threads may parse Python, as Triton does when it compiles: in those releases one of two that do may get a
SystemError, see https://github.com/python/cpython/issues/106905."""

_log = logging.getLogger(__name__)
_jobs: deque[tuple[Future[None], Callable[[], None]]] = deque()
_free = threading.Semaphore(THREADS)


def _work() -> None:
    """Do what is to be done, but begin nothing more once the program wants to end: it waits for this thread."""
    try:
        while _jobs and threading.main_thread().is_alive():
            job, function = _jobs.popleft()
            if not job.set_running_or_notify_cancel():
                continue
            try:
                function()
            except BaseException as error:  # or who waits for it would wait for ever
                job.set_exception(error)
            else:
                job.set_result(None)
    except IndexError:  # another thread took the last
        pass
    finally:
        _free.release()


def _submit(function: Callable[[], None]) -> Future[None]:
    """Where all threads are just ending, it stays undone until there is another job, or its result is asked for."""
    job: Future[None] = Future()
    _jobs.append((job, function))
    if _free.acquire(blocking=False):
        threading.Thread(target=_work, name="freqfusion-compile").start()
    return job


class _Rehearsed:
    """What a derivative asks of its context."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Their gradients are not looked at."""

    def set_materialize_grads(self, value: bool) -> None:
        """All are there."""


def rehearse(
    derivative: Callable[..., Any],
    setup_context: Callable[[Any, Any, Any], None],
    needs_input_grad: tuple[bool, ...],
    args: tuple[Any, ...],
    out: Any,
) -> None:
    """Start to compile what a derivative launches, where the gradients lie as the results do; raises nothing.

    Nothing is compiled ahead where Python cannot parse in threads.

    Args:
        derivative: the operator's, of a context and the gradients of its results.
        setup_context: fills that context from ``args`` and ``out``.
        needs_input_grad: which arguments want gradients.
        args: of the operator.
        out: its result or results.
    """
    if not PARSES_IN_THREADS:
        return
    fills = getattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    if torch.are_deterministic_algorithms_enabled() and fills:
        return  # tensors of the size of the maps would be filled
    try:
        device = next(x.device for x in args if isinstance(x, Tensor))
        context, results = _Rehearsed(needs_input_grad), _unfilled(out)

        def take(kernel: Any, tensors: Any, how: launch.Launch) -> None:
            kind = launch.kind_of(kernel, tensors, how)
            if kind not in launch.pending:
                launch.pending[kind] = _submit(partial(_compile, kernel, tensors, how, device))

        with launch.instead_of_running(take, launch.capability(device)):
            setup_context(context, tuple(_unfilled(x) for x in args), results)
            derivative(context, *(results if isinstance(results, tuple) else (results,)))
    except Exception:  # it costs the time that it was to save
        _log.debug("a derivative could not be rehearsed", exc_info=True)


def _unfilled(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_unfilled(part) for part in x)
    if not isinstance(x, Tensor):
        return x
    # not on "meta", whose operators may import a second's worth of Python; of these the wide ones are never touched
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


def _compile(kernel: Any, tensors: Any, how: launch.Launch, device: torch.device) -> None:
    if device.type != "cuda":
        launch.compiled(kernel, tensors, how)
        return
    with torch.cuda.device(device):
        built = launch.compiled(kernel, tensors, how)
        # for older releases of Triton a C compiler makes the launcher of each kernel
        driver.active.launcher_cls(built.src, built.metadata)
