"""Which implementation computes an operator: one predicate per backend chooses, forces and explains.

An operator enters itself into :data:`OPERATORS`, and its folder holds what computes it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from freqfusion.ops import _native, _triton
from freqfusion.ops._checks import check_filled, check_map, is_exporting, refuse_torchscript

BACKENDS = ("native", "triton", "torch")
"""In order of preference. ``native``: compiled CPU kernels; ``triton``: kernels for CUDA devices; ``torch``:
plain torch operators, on any device."""

UNASKED = tuple(name for name in BACKENDS if name != "triton" or not _triton.INTERPRETED)
"""Those that serve where none is named: Triton's interpreter is not among them, for it is slow."""

VARIABLE = "FREQFUSION_BACKEND"


class Operator(NamedTuple):
    """What the choice of a backend asks of an operator.

    ``tensors``: how many it takes first. ``kernels``: the backends that have kernels for it. ``cannot``: for such a
    backend and the tensors, why its kernels cannot compute the call, or ``""``. ``which_kernels``: where Triton has
    several, from the tensors, the groups and whether borders are mirrored, which serve; see :class:`Explanation`.
    """

    tensors: int
    kernels: tuple[str, ...]
    cannot: Callable[..., str] = lambda backend, *tensors: ""
    which_kernels: Callable[..., str] = lambda *call: ""


OPERATORS: dict[str, Operator] = {}


@cache
def implementation(operator: str, backend: str) -> ModuleType:
    """The module whose functions compute an operator, imported on first use: Triton's are slow to import."""
    return _native if backend == "native" else import_module(f"freqfusion.ops.{operator}.{backend}")


class Explanation(NamedTuple):
    """Which backend serves a call, and for every backend why it cannot, or ``""`` if it can.

    ``kernels``: where ``backend`` has several kernels for the call, which of them serve, and why not faster ones.
    """

    backend: str
    cannot: dict[str, str]
    kernels: str = ""


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_from_environment = os.environ.get(VARIABLE)
_preferred = None if not _from_environment else _check_name(_from_environment, VARIABLE)


def available_backends() -> dict[str, str]:
    """Every backend and why it is unusable on this machine, or ``""`` where it is usable.

    >>> available_backends()["torch"]
    ''
    """
    device = torch.device("cpu" if _triton.INTERPRETED else "cuda")
    return {"native": _native.REASON, "triton": _triton.cannot_run_on(device), "torch": ""}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer a backend for the calls inside; those that it cannot serve are computed as without it.

    It holds for the whole process and comes before the environment variable ``FREQFUSION_BACKEND``, which is
    read at import; an operator's argument ``backend`` comes before both, and raises instead of giving way.

    >>> with use_backend("torch"):
    ...     explain("carafe", torch.zeros(1, 4, 3, 3), torch.zeros(1, 9, 6, 6)).backend
    'torch'
    """
    global _preferred
    before, _preferred = _preferred, _check_name(name, "name")
    try:
        yield
    finally:
        _preferred = before


def needs_composite(*tensors: Tensor) -> bool:
    """Whether only torch's own operators will do: under export, and for forward-mode and other transforms."""
    if torch.compiler.is_compiling():
        return is_exporting()
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return forward_ad._current_level >= 0 or any(wrapped(tensor) for tensor in tensors)


def _cannot(backend: str, operator: str, tensors: tuple[Tensor, ...]) -> str:
    """Why ``backend`` cannot compute the call, or ``""``."""
    if backend == "torch":
        return ""
    if backend == "native" and _native.REASON:
        return _native.REASON
    if tensors[0].ndim == 5 and backend == "triton":
        return "it has no kernels for volumes (B, C, D, H, W)"
    if needs_composite(*tensors):
        return "torch.export and the transforms of torch.func know only torch's own operators"
    known = OPERATORS[operator]
    if backend not in known.kernels:
        return f"it has no kernel for {operator}"
    kernels = _native if backend == "native" else _triton
    return kernels.cannot(*tensors) or known.cannot(backend, *tensors)


def choose(operator: str, requested: str | None, *tensors: Tensor) -> str:
    """The backend of a call: ``requested`` or an error, else the preferred one if it can, else the best.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the requested backend cannot compute the call, and under TorchScript's tracing; the message
            says why.
    """
    refuse_torchscript()
    if requested is not None:
        reason = _cannot(_check_name(requested, "backend"), operator, tensors)
        if reason:
            raise RuntimeError(f"backend {requested!r} cannot run because {reason}")
        return requested
    order = UNASKED if _preferred is None else (_preferred, *UNASKED)
    return next(name for name in order if not _cannot(name, operator, tensors))


def explain(operator: str, *tensors: Tensor, groups: int = 1, padding_mode: str = "zeros") -> Explanation:
    """Which backend ``operator`` would use for ``tensors`` (its tensor arguments), and why not the others.

    ``groups`` are those of the reassembly or the resampling, ``padding_mode`` that of the reassembly.

    Raises:
        TypeError: for arguments that are not tensors.
        ValueError: for an unknown operator, or another number of tensors than it takes, or an empty one.

    >>> explain("normalize_kernels", torch.zeros(1, 9, 6, 6)).backend
    'torch'
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; choose one of: {', '.join(sorted(OPERATORS))}")
    known = OPERATORS[operator]
    if len(tensors) != known.tensors:
        raise ValueError(f"{operator} takes {known.tensors} tensors, got {len(tensors)}")
    for tensor in tensors:
        check_map("a tensor", tensor, (2, 3))
        check_filled("a tensor", tensor)
    reasons = {name: _cannot(name, operator, tensors) for name in BACKENDS}
    backend, kernels = choose(operator, None, *tensors), ""
    if backend == "triton":
        kernels = known.which_kernels(*tensors, groups, padding_mode == "reflect")
    return Explanation(backend, reasons, kernels)
