"""What all kernels share: tuning, the launch, and a first kernel to see whether any runs."""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._triton import INTERPRETED

Configuration = dict[str, int]
"""Tile sizes and the options of Triton (``num_warps``, ``num_stages``) that a kernel is launched with."""

VARIABLE = "FREQFUSION_TUNE"
TUNING = os.environ.get(VARIABLE, "") not in ("", "0")
"""Whether the first call of a kind measures all configurations; otherwise the first one serves."""

COMPILED: list[tuple[str, Any]] | None = None
"""Where not None, kernels are compiled and noted here with their names instead of run; for the registry."""
COMPILED_FOR = 0
"""Then the compute capability, 90 for 9.0."""

_fastest: dict[Hashable, Configuration] = {}


def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0: of a device or of what the registry compiles for; 90 in the interpreter."""
    if COMPILED is not None:
        return COMPILED_FOR
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(
    kernel: Any,
    programs: Callable[[Configuration], int],
    out: Tensor,
    *args: Any,
    choices: Sequence[Configuration] = ({},),
    **constants: Any,
) -> None:
    """Run a kernel on the device of ``out``.

    All programs lie on the first axis of the grid, the only one that may be longer than 65535. Products are added
    in one rounding, which newer releases of Triton do on request alone.

    Args:
        kernel: compiled by Triton on its first call of a kind.
        programs: their number under a configuration.
        out: a tensor that the kernel fills.
        args: of the kernel.
        choices: its configurations, the one that is known to be fast first.
        constants: its other constants.
    """
    constants["enable_fp_fusion"] = True
    with torch.cuda.device_of(out):
        if COMPILED is not None:
            built = kernel.warmup(*args, grid=(1,), **constants, **choices[0])
            COMPILED.append((kernel.__name__, built))
        else:
            chosen = choices[0]
            if TUNING and not INTERPRETED and len(choices) > 1:
                chosen = _measured(kernel, programs, args, choices, constants)
            kernel[(programs(chosen),)](*args, **constants, **chosen)


def _measured(
    kernel: Any,
    programs: Callable[[Configuration], int],
    args: tuple[Any, ...],
    choices: Sequence[Configuration],
    constants: dict[str, Any],
) -> Configuration:
    """The fastest configuration of a kernel for arguments of about this size, measured once in a process."""
    sizes = (arg.dtype if isinstance(arg, Tensor) else arg and arg.bit_length() for arg in args)
    key = (kernel.__name__, *sizes, *constants.items())
    if key not in _fastest:
        from triton.testing import do_bench

        _fastest[key] = min(
            choices,
            key=lambda chosen: do_bench(lambda: kernel[(programs(chosen),)](*args, **constants, **chosen)),
        )
    return _fastest[key]


@triton.jit
def _one(out):
    tl.store(out, 1.0)


def probe(device: torch.device) -> None:
    out = torch.zeros(1, device=device)
    launch(_one, lambda _: 1, out, out)
    if float(out) != 1:
        raise RuntimeError(f"it wrote {float(out)} instead of 1")
