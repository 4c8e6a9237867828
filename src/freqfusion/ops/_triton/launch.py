"""What all kernels share: tuning, the launch, and a first kernel to see whether any runs."""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._triton import INTERPRETED, recorded

Configuration = dict[str, int]
"""Tile sizes and the options of Triton (``num_warps``, ``num_stages``) that a kernel is launched with."""

VARIABLE = "FREQFUSION_TUNE"
TUNING = os.environ.get(VARIABLE, "") not in ("", "0")
"""Whether the first call of a kind measures all configurations; otherwise the first one serves."""

_log = logging.getLogger(__name__)
_fastest: dict[Hashable, Configuration] = {}


def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0: of a device or of what is compiled for; 90 in the interpreter."""
    if _instead.take is not None:
        return _instead.capability
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Launch(NamedTuple):
    """How to run a kernel on tensors of some shapes, strides, dtypes and alignment."""

    programs: Callable[[Configuration], int]
    """Their number under a configuration. All lie on the first axis of the grid, the only one that may be longer than
    65535."""
    numbers: Sequence[float]
    """Arguments of the kernel after its tensors."""
    choices: Sequence[Configuration]
    """Its configurations, the one that is known to be fast first."""
    constants: dict[str, Any]
    """Its other constants."""


class _Instead(threading.local):
    """What happens in a thread to kernels instead of running them: see :func:`instead_of_running`."""

    take: Callable[[Any, Sequence[Tensor | None], Launch], object] | None = None
    capability = 0


_instead = _Instead()


@contextmanager
def instead_of_running(
    take: Callable[[Any, Sequence[Tensor | None], Launch], object], capability: int
) -> Iterator[None]:
    """This thread hands the kernels that it launches to ``take``; their choice is that for a compute capability."""
    before = _instead.take, _instead.capability
    _instead.take, _instead.capability = take, capability
    try:
        yield
    finally:
        _instead.take, _instead.capability = before


_noted: set[Hashable] = set()
"""Kinds of kernels that operators launched whose gradient was recorded."""
pending: dict[Hashable, Future[None]] = {}
"""Kinds of kernels that :mod:`freqfusion.ops._triton.ahead` compiles, or has compiled and nobody asked for."""
_remembered: dict[Hashable, Callable[..., object]] = {}
REMEMBERED = 4096
"""Launches at most that are kept; then all are forgotten, for so many sizes will hardly come again."""
ALIGNED = 64
"""Bytes: no access is wider, so no launch depends on more of where a tensor begins."""


def launch(
    kernel: Any, tensors: Sequence[Tensor | None], prepare: Callable[..., Launch], *options: Hashable
) -> None:
    """Run a kernel on the device of its tensors.

    To find out how takes as long as a small kernel runs. It is done once for tensors that lie alike.

    Args:
        kernel: compiled by Triton on its first call of a kind.
        tensors: its first arguments; the first of them is not None.
        prepare: returns how to run it, from ``options`` and how ``tensors`` lie, never from their values.
        options: what else matters to it.
    """
    if _instead.take is not None:
        _instead.take(kernel, tensors, prepare(*tensors, *options))
        return
    first = tensors[0]
    assert first is not None
    device = first.device.index
    lies = [x if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNED) for x in tensors]
    # kernels live as long as their modules; what ran without gradients may not have been noted
    key = (id(kernel), prepare, device, options, recorded.now, *lies)
    run = _remembered.get(key)
    here = device is None or device == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(device):
        if run is not None:
            run(*tensors)
            return
        run = _first_run(kernel, tensors, prepare(*tensors, *options))
    if len(_remembered) >= REMEMBERED:
        _remembered.clear()
    _remembered[key] = run


def _options(how: Launch) -> dict[str, Any]:
    """Products are added in one rounding, which newer releases of Triton do on request alone."""
    return how.constants | {"enable_fp_fusion": True} | how.choices[0]


def compiled(kernel: Any, tensors: Sequence[Tensor | None], how: Launch) -> Any:
    """A kernel as Triton compiles it for such tensors, whose values do not matter."""
    return kernel.warmup(*tensors, *how.numbers, grid=(1,), **_options(how))


def kind_of(kernel: Any, tensors: Sequence[Tensor | None], how: Launch) -> Hashable:
    """Nearly what a kernel is compiled for: Triton may compile it again for strides of one."""
    return id(kernel), *_options(how).items(), *(x if x is None else x.dtype for x in tensors)


def note(kernel: Any, tensors: Sequence[Tensor | None], how: Launch) -> None:
    """That a kernel is about to be compiled, or was; waits for a thread that compiles it, if one has begun to."""
    kind = kind_of(kernel, tensors, how)
    if recorded.now and kind not in _noted:
        _noted.add(kind)
        recorded.compiled = True
    job = pending.pop(kind, None)
    if job and not job.cancel() and (error := job.exception()):
        _log.debug("%s could not be compiled ahead", kernel.__name__, exc_info=error)


def _first_run(kernel: Any, tensors: Sequence[Tensor | None], how: Launch) -> Callable[..., object]:
    """Run a kernel; returns what runs it on other tensors that lie alike."""
    options = _options(how)
    if TUNING and not INTERPRETED and len(how.choices) > 1:
        options |= _measured(kernel, tensors, how)
    elif not INTERPRETED:
        note(kernel, tensors, how)
    grid, numbers = (how.programs(options), 1, 1), how.numbers
    built = kernel[grid](*tensors, *numbers, **options)
    if INTERPRETED:
        return lambda *tensors: kernel[grid](*tensors, *numbers, **options)
    # what Triton compiled takes all arguments in their order, and looks at none of them again
    names = kernel.arg_names[len(tensors) + len(numbers) :]
    rest = (*numbers, *(options[name] for name in names))
    compiled = built[grid]
    return lambda *tensors: compiled(*tensors, *rest)


def _measured(kernel: Any, tensors: Sequence[Tensor | None], how: Launch) -> Configuration:
    """The fastest configuration of a kernel for arguments of about this size, measured once in a process."""
    sizes = (
        x.dtype if isinstance(x, Tensor) else x and int(x).bit_length() for x in (*tensors, *how.numbers)
    )
    key = (kernel.__name__, *sizes, *how.constants.items())
    if key not in _fastest:
        from triton.testing import do_bench

        def run(chosen: Configuration) -> None:
            options = how.constants | {"enable_fp_fusion": True} | chosen
            kernel[(how.programs(chosen),)](*tensors, *how.numbers, **options)

        _fastest[key] = min(how.choices, key=lambda chosen: do_bench(lambda: run(chosen)))
    return _fastest[key]


@triton.jit
def _one(out):
    tl.store(out, 1.0)


def probe(device: torch.device) -> None:
    out = torch.zeros(1, device=device)
    with torch.cuda.device_of(out):
        _one[(1,)](out)
    if float(out) != 1:
        raise RuntimeError(f"it wrote {float(out)} instead of 1")
