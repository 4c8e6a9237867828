"""The Triton kernels: whether they can run here. The kernels themselves are imported where one is first used."""

import logging
import os
import threading
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton's interpreter runs the kernels, slowly and on any device: for tests."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MINIMUM = (3, 4)
"""The release that torch 2.8 brings."""

_log = logging.getLogger(__name__)


class _Recorded(threading.local):
    """Whether a thread runs an operator whose gradient is recorded, and whether that compiled a kernel."""

    now = False
    compiled = False


recorded = _Recorded()


def cannot(*tensors: Tensor) -> str:
    """Why the kernels cannot take tensors, which lie on one device; or ``""``."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"it has no kernel for {tensor.dtype}"
    return cannot_run_on(tensors[0].device)


def cannot_run_on(device: torch.device) -> str:
    """Why the kernels cannot run on a device, or ``""``."""
    devices = ("cpu", "cuda") if INTERPRETED else ("cuda",)
    if device.type not in devices:
        return f"it computes on CUDA devices, and a tensor is on {device}"
    return _probe(device)


# As `torch.compiler.assume_constant_result` does, which would import the whole of dynamo.
cannot_run_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _probe(device: torch.device) -> str:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason = _try(device)
    if reason:
        _log.warning("the triton backend is not used on %s because %s", device, reason)
    return reason


def _try(device: torch.device) -> str:
    if find_spec("triton") is None:
        return "Triton is not installed; on Linux `python -m pip install triton` brings it"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MINIMUM:
        needed = ".".join(map(str, MINIMUM))
        return f"it needs Triton {needed} or newer, and {triton.__version__} is installed"
    try:
        from freqfusion.ops._triton.launch import probe

        probe(device)
    except Exception as error:  # no compiler, a GPU too old, a broken installation: each has its own error
        return f"a first kernel failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""
