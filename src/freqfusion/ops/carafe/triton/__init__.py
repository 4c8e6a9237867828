"""The reassembly and its derivatives on a GPU: which of the kernels serves a call, and why not a faster one.

``bands``: banded products on tensor cores; ``registers``: float32 sums with the kernels in registers; ``sums``: plain
sums, for whatever the others cannot do. Each module says how far a bad value travels. All are deterministic.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from math import isqrt
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from freqfusion.ops._checks import layout
from freqfusion.ops._triton.launch import launch
from freqfusion.ops._triton.maps import dense
from freqfusion.ops._triton.registry import Case
from freqfusion.ops.carafe.triton import bands, registers, sums
from freqfusion.ops.carafe.triton.sums import Call, folded, padded_gradient, small


class Chosen(NamedTuple):
    """A module of kernels, and why not a faster one, or ``""``."""

    kernels: ModuleType
    because: str

    def __str__(self) -> str:
        name = self.kernels.__name__.rpartition(".")[2]
        return name + (f" ({self.because})" if self.because else "")


def for_forward(
    x: Tensor, fine: tuple[int, int], kernel_size: int, groups: int, reflect: bool, normalize: bool
) -> Chosen:
    """Which kernels reassemble ``x`` to a map with sides ``fine``, from logits if ``normalize``."""
    in_registers = registers.why_not(kernel_size, groups, x, fine, reflect, normalize)
    if x.dtype == torch.float32:
        return Chosen(sums, in_registers) if in_registers else Chosen(registers, "")
    # where columns lie side by side the small window makes short rows, which tensor cores wait for
    planes = not in_registers and kernel_size == 3 and fine == x.shape[-2:]
    if planes and not _last(x):
        return Chosen(registers, "")
    banded = bands.why_not(kernel_size, (x,), (x.shape[2], x.shape[3]), fine)
    return Chosen(sums, banded) if banded else Chosen(bands, "")


def for_gradient_in_x(grad: Tensor, coarse: tuple[int, int], kernel_size: int) -> Chosen:
    """Which kernels compute the gradient in an ``x`` with sides ``coarse``."""
    banded = bands.why_not(kernel_size, (grad,), coarse, (grad.shape[2], grad.shape[3]))
    return Chosen(sums, banded) if banded else Chosen(bands, "")


def for_gradient_in_kernels(x: Tensor, grad: Tensor, kernel_size: int) -> Chosen:
    """Which kernels compute the gradient in the kernels, or in the logits."""
    if x.dtype == torch.float32 and kernel_size == 3 and x.shape == grad.shape and not _last(grad):
        return Chosen(sums, "")  # faster than three TF32 products on short rows
    coarse, fine = (x.shape[2], x.shape[3]), (grad.shape[2], grad.shape[3])
    banded = bands.why_not(kernel_size, (x, grad), coarse, fine)
    return Chosen(sums, banded) if banded else Chosen(bands, "")


def _is_resident(x: Tensor, grad: Tensor, kernel_size: int) -> bool:
    """Whether one kernel computes both gradients."""
    return (
        x.dtype != torch.float32
        and x.shape == grad.shape
        and not bands.why_not(kernel_size, (x, grad), (x.shape[2], x.shape[3]), (x.shape[2], x.shape[3]))
    )


def _last(x: Tensor) -> bool:
    found = dense(x)
    return found is not None and found.last


def explain(x: Tensor, kernels: Tensor, groups: int, reflect: bool, normalize: bool) -> str:
    """Which kernels serve, with gradients in the layout of ``x``."""
    kernel_size = isqrt(kernels.shape[1] // groups)
    grad = torch.empty(
        (*x.shape[:2], *kernels.shape[-2:]), dtype=x.dtype, device=x.device, memory_format=layout(x)
    )
    forward = for_forward(x, (grad.shape[2], grad.shape[3]), kernel_size, groups, reflect, normalize)
    if _is_resident(x, grad, kernel_size):
        return f"forward: {forward}; both gradients: bands"
    in_x = for_gradient_in_x(grad, (x.shape[2], x.shape[3]), kernel_size)
    in_kernels = for_gradient_in_kernels(x, grad, kernel_size)
    return f"forward: {forward}; gradient in x: {in_x}; in kernels: {in_kernels}"


def carafe(
    x: Tensor,
    kernels: Tensor,
    kernel_size: int,
    groups: int,
    reflect: bool,
    memory: torch.memory_format | None = None,
) -> Tensor:
    """As :func:`freqfusion.ops.carafe.torch.carafe`; in the layout ``memory`` or that of ``x``."""
    return _forward(x, kernels, None, Call(kernel_size, groups, reflect), memory or layout(x))


def carafe_from_logits(
    x: Tensor,
    logits: Tensor,
    window: Tensor | None,
    plus: Tensor | None,
    kernel_size: int,
    groups: int,
    reflect: bool,
    gain: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`freqfusion.ops.carafe.logits.carafe_from_logits`, added to ``plus`` if given, in one pass.

    The second result are the normalised kernels, of the dtype of ``logits``, with ``plus`` and ``keep``; else empty.
    """
    kept = None
    if plus is not None:
        plus = plus.contiguous(memory_format=layout(plus))
        if keep:
            logits = logits.contiguous(memory_format=layout(logits))
            kept = torch.empty_like(logits)
    call = Call(kernel_size, groups, reflect, True, gain, kept is not None)
    out = _forward(x, logits, window, call, layout(x if plus is None else plus), plus, kept)
    return out, logits.new_empty(0) if kept is None else kept


def _forward(
    x: Tensor,
    kernels: Tensor,
    window: Tensor | None,
    call: Call,
    memory: torch.memory_format,
    plus: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """The reassembly in the layout ``memory``, which is that of ``plus``.

    ``kept``, of the strides of ``kernels``, receives the normalised ones.
    """
    fine = kernels.shape[2], kernels.shape[3]
    out = torch.empty((*x.shape[:2], *fine), dtype=x.dtype, device=x.device, memory_format=memory)
    if x.numel() == 0 or kernels.numel() == 0:
        return out
    chosen = for_forward(x, fine, call.kernel_size, call.groups, call.reflect, call.normalize).kernels
    if chosen is not sums:
        kernels = small(kernels)
    kernel, prepare = chosen.FORWARD
    launch(kernel, (x, kernels, window, out, plus, kernels if kept is None else kept), prepare, call)
    return out


def carafe_backward_x(
    kernels: Tensor,
    grad: Tensor,
    size: Sequence[int],
    kernel_size: int,
    groups: int,
    reflect: bool,
    gain: int = 0,
    memory: torch.memory_format | None = None,
) -> Tensor:
    """As :func:`freqfusion.ops.carafe.torch.carafe_backward_x`; of the high-pass difference with a ``gain``.

    It is in the layout ``memory`` or that of ``grad``.
    """
    (h, w), memory = size, memory or layout(grad)
    if grad.numel() == 0:
        return grad.new_zeros(*grad.shape[:2], h, w).contiguous(memory_format=memory)
    chosen = for_gradient_in_x(grad, (h, w), kernel_size).kernels
    if chosen is not sums:
        kernels = small(kernels)
    margin = kernel_size // 2 if reflect else 0
    out = padded_gradient(grad, h, w, margin, memory)
    kernel, prepare = chosen.IN_X
    launch(kernel, (kernels, grad, out), prepare, Call(kernel_size, groups, reflect, gain=gain), margin)
    return folded(out, grad, margin, memory)


def carafe_backward_kernels(
    x: Tensor,
    grad: Tensor,
    kernel_size: int,
    groups: int,
    reflect: bool,
    dtype: torch.dtype = torch.float32,
    memory: torch.memory_format | None = None,
) -> Tensor:
    """As :func:`freqfusion.ops.carafe.torch.carafe_backward_kernels`, of a dtype; in the layout of ``grad``."""
    out = torch.empty(
        (x.shape[0], groups * kernel_size**2, *grad.shape[-2:]),
        dtype=dtype,
        device=x.device,
        memory_format=layout(grad) if memory is None else memory,
    )
    if grad.numel() == 0:
        return out.zero_()
    _backward_kernels(x, grad, None, None, out, None, Call(kernel_size, groups, reflect))
    return out


def _backward_kernels(
    x: Tensor,
    grad: Tensor,
    logits: Tensor | None,
    window: Tensor | None,
    out: Tensor,
    applied: Tensor | None,
    call: Call,
    more: Tensor | None = None,
) -> None:
    """Fill ``out`` with the gradient in the kernels, or in the ``logits``.

    Then ``applied`` receives the normalised kernels; ``more`` is a further gradient in these. All are of the strides
    of ``out``.
    """
    chosen = for_gradient_in_kernels(x, grad, call.kernel_size).kernels
    if logits is not None and chosen is not sums:
        logits = small(logits)
    kernel, prepare = chosen.IN_KERNELS
    tensors = (x, grad, logits, window, out, applied, out if more is None else more)
    launch(kernel, tensors, prepare, call._replace(more=more is not None))


def carafe_backward(
    x: Tensor, kernels: Tensor, grad: Tensor, kernel_size: int, groups: int, reflect: bool
) -> tuple[Tensor, Tensor]:
    """Derivatives of :func:`carafe` in ``x`` and ``kernels``, as these lie; of the dtypes of ``grad`` and these."""
    if grad.numel() and _is_resident(x, grad, kernel_size):
        return bands.backward_both(x, kernels, None, grad, Call(kernel_size, groups, reflect))
    return (
        carafe_backward_x(kernels, grad, x.shape[2:], kernel_size, groups, reflect, memory=layout(x)),
        carafe_backward_kernels(x, grad, kernel_size, groups, reflect, kernels.dtype, layout(kernels)),
    )


def carafe_from_logits_backward(
    x: Tensor,
    logits: Tensor,
    window: Tensor | None,
    grad: Tensor,
    more: Tensor | None,
    kernel_size: int,
    groups: int,
    reflect: bool,
    gain: int,
) -> tuple[Tensor, Tensor]:
    """Derivatives of :func:`carafe_from_logits` in ``x`` and ``logits``.

    They are of the layouts of these, and of the dtypes of ``grad`` and ``logits``.
    ``more`` is a gradient in the kernels that were kept.
    """
    memory = layout(logits)
    if more is not None:
        more = more.to(logits.dtype).contiguous(memory_format=memory)
    call = Call(kernel_size, groups, reflect, True, gain)
    if grad.numel() and _is_resident(x, grad, kernel_size):
        return bands.backward_both(x, logits, window, grad, call, more)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=x.device, memory_format=memory)
    applied = torch.empty(logits.shape, dtype=torch.float32, device=x.device, memory_format=memory)
    if grad.numel():
        _backward_kernels(x, grad, logits, window, grad_logits, applied, call, more)
    else:
        grad_logits.zero_()
    rest = (kernel_size, groups, reflect, gain)
    return carafe_backward_x(applied, grad, x.shape[2:], *rest, layout(x)), grad_logits


_CASES: dict[str, tuple[int, int, tuple[int, int], tuple[int, int], int, int | None, bool]] = {
    # channels, groups, sides of x and of the result, kernel size, gain if from logits, mirrored borders
    "5x5 to twice the size": (256, 1, (100, 168), (200, 336), 5, None, False),
    "3x3 at equal sizes": (256, 1, (200, 336), (200, 336), 3, None, False),
    "high-pass 3x3": (256, 1, (200, 336), (200, 336), 3, 2, False),
    "low-pass 3x3": (256, 1, (200, 336), (200, 336), 3, 0, False),
    "5x5 at equal sizes": (256, 1, (200, 336), (200, 336), 5, None, False),
    "low-pass 5x5 of 25 channels to twice the size": (25, 1, (100, 168), (200, 336), 5, 0, False),
    "5x5 of 9 channels to twice the size": (9, 1, (100, 168), (200, 336), 5, None, False),
    "5x5 of 42 channels to twice the size": (42, 1, (100, 168), (200, 336), 5, None, False),
    "5x5 at equal sizes, mirrored": (64, 2, (50, 84), (50, 84), 5, 0, True),
    "3x3 to 57 of 29 rows": (64, 2, (29, 43), (57, 85), 3, 0, True),
    "5x5 to four times the size": (128, 1, (25, 42), (100, 168), 5, None, False),
    "7x7 to twice the size": (64, 1, (25, 42), (50, 84), 7, None, False),
}


def cases() -> Iterator[Case]:
    """For :mod:`freqfusion.ops._triton.registry`: what FreqFusion and CARAFE launch, and some that they do not."""
    for name, case in _CASES.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for memory in (torch.channels_last, torch.contiguous_format):
                where = f"{name}, {dtype}, {memory}".replace("torch.", "")
                yield Case(f"{where}, forward", partial(_run, False, dtype, memory, *case))
                yield Case(f"{where}, backward", partial(_run, True, dtype, memory, *case))


def _run(
    backward: bool,
    dtype: torch.dtype,
    memory: torch.memory_format,
    channels: int,
    groups: int,
    coarse: tuple[int, int],
    fine: tuple[int, int],
    kernel_size: int,
    gain: int | None,
    reflect: bool,
) -> None:
    x, grad, kernels = (
        torch.empty(2, n, *sides, dtype=dtype, memory_format=memory)
        for n, sides in ((channels, coarse), (channels, fine), (groups * kernel_size**2, fine))
    )
    window = torch.empty(kernel_size, kernel_size)
    plus, more = (None, None) if gain else (grad, kernels)
    rest = (kernel_size, groups, reflect)
    if gain is None:
        carafe_backward(x, kernels, grad, *rest) if backward else carafe(x, kernels, *rest)
        if memory == torch.contiguous_format and dtype != torch.float32:
            kernels, grad = (y.contiguous(memory_format=torch.channels_last) for y in (kernels, grad))
            if backward:
                carafe_backward(x, kernels, grad, *rest)
            else:
                carafe(x, kernels, *rest, torch.channels_last)
    elif backward:
        carafe_from_logits_backward(x, kernels, window, grad, more, *rest, gain)
    else:
        carafe_from_logits(x, kernels, window, plus, *rest, gain, keep=not gain)
