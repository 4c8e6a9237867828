"""The reassembly straight from predicted logits: normalisation, reassembly and high-pass difference in one."""

from typing import Any

import torch
from torch import Tensor

from freqfusion.ops._autograd import registered, second_derivative
from freqfusion.ops._backends import OPERATORS, Operator, choose
from freqfusion.ops._checks import accumulation_dtype, layout
from freqfusion.ops.carafe.naive import carafe_naive
from freqfusion.ops.carafe.op import cannot, carafe, kernels_for
from freqfusion.ops.normalize_kernels.op import normalize_kernels

OPERATORS["carafe_from_logits"] = Operator(
    2, ("triton",), cannot, lambda *call: kernels_for("triton").explain(*call, normalize=True)
)


@registered("freqfusion::carafe_from_logits")
def _from_logits(
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
    rest = (kernel_size, groups, reflect, gain, keep)
    return kernels_for("triton").carafe_from_logits(x, logits, window, plus, *rest)


@registered("freqfusion::carafe_from_logits_backward")
def _from_logits_backward(
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
    rest = (kernel_size, groups, reflect, gain)
    return kernels_for("triton").carafe_from_logits_backward(x, logits, window, grad, more, *rest)


@_from_logits.register_fake
def _(
    x: Tensor, logits: Tensor, window: Tensor | None, plus: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], *logits.shape[-2:])
    memory_format = layout(x if plus is None else plus)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    kept = plus is not None and rest[-1]
    return out, torch.empty_like(logits, memory_format=layout(logits)) if kept else logits.new_empty(0)


@_from_logits_backward.register_fake
def _(x: Tensor, logits: Tensor, window: Tensor | None, grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=grad.dtype, device=x.device, memory_format=layout(x))
    return grad_x, torch.empty_like(logits, memory_format=layout(logits))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, logits, window, _, *ctx.rest = inputs
    ctx.save_for_backward(x, logits, window)
    ctx.set_materialize_grads(False)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, logits, window, grad, more, *ctx.rest = inputs
    ctx.save_for_backward(x, logits, window, grad, more)


def _derivative(ctx: Any, grad: Tensor | None, in_kept: Tensor | None) -> tuple[Tensor | None, ...]:
    x, logits, window = ctx.saved_tensors
    *rest, keep = ctx.rest
    if grad is None:
        grad = x.new_zeros(*x.shape[:2], *logits.shape[-2:])
    more = in_kept if keep else None
    in_x, in_logits = _from_logits_backward(x, logits, window, grad, more, *rest)
    in_plus = grad if ctx.needs_input_grad[3] else None
    return in_x, in_logits, None, in_plus, *(None for _ in ctx.rest)


def _backward_derivative(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    x, logits, window, grad, more = ctx.saved_tensors
    kernel_size, groups, reflect, gain = ctx.rest
    incoming = [grad] if more is None else [grad, more]

    def composed(x: Tensor, logits: Tensor) -> Tensor:
        kernels = _applied_kernels(logits, kernel_size, groups, window, gain)
        out = carafe_naive(x, kernels, kernel_size, groups, "reflect" if reflect else "zeros")
        return _joined([out] if more is None else [out, kernels])

    (in_x, in_logits), joined = second_derivative(composed, (x, logits), _joined(incoming), cotangents)
    parts = joined.split([part.numel() for part in incoming])
    found = [part.view_as(like).to(like.dtype) for part, like in zip(parts, incoming, strict=True)]
    return in_x, in_logits, None, found[0], found[1] if found[1:] else None, *(None for _ in ctx.rest)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


_from_logits.register_autograd(_derivative, setup_context=_save, ahead=True)
_from_logits_backward.register_autograd(_backward_derivative, setup_context=_save_backward)


def _applied_kernels(
    logits: Tensor, kernel_size: int, groups: int, window: Tensor | None, gain: int
) -> Tensor:
    """The kernels that the whole amounts to.

    The identity is a kernel too, one at the centre tap, so nothing of the size of a map has to be subtracted.
    With a gain they are float32 at least: 2 minus a weight would lose the weight in half precision.
    """
    lowpass = normalize_kernels(logits, kernel_size, groups, window)
    if not gain:
        return lowpass
    dims = logits.ndim - 2
    taps = kernel_size**dims
    identity = torch.arange(lowpass.shape[1], device=logits.device).remainder(taps).eq(taps // 2)
    return (identity.to(accumulation_dtype(lowpass)) * gain).reshape(-1, *[1] * dims) - lowpass


def carafe_from_logits(
    x: Tensor,
    logits: Tensor,
    kernel_size: int,
    groups: int = 1,
    window: Tensor | None = None,
    gain: int = 0,
    padding_mode: str = "zeros",
) -> Tensor:
    """:func:`freqfusion.ops.carafe` of ``x`` by the normalised ``logits``, or what that leaves of ``x``.

    Args:
        x: ``(B, C, h, w)``, floating point; or a volume, see there.
        logits: ``(B, groups * kernel_size**2, H, W)``, floating point, as
            :func:`freqfusion.ops.normalize_kernels` takes them.
        kernel_size: odd side of the window.
        groups: channel ``c`` of ``x`` uses group ``c // (C // groups)``.
        window: with ``kernel_size**2`` positive entries, a constant; or None.
        gain: 0 for the low-pass itself, else for ``gain`` times the centre of the window minus the low-pass.
        padding_mode: as of :func:`freqfusion.ops.carafe`.

    Returns:
        ``(B, C, H, W)`` of the dtype of ``x``.

    Source: Chen et al., TPAMI 2024: the low-pass and, with ``gain``, the high-pass filter with its residual.

    >>> x, flat = torch.ones(1, 1, 3, 3), torch.zeros(1, 9, 3, 3)
    >>> carafe_from_logits(x, flat, 3, gain=2)[0, 0, 1]
    tensor([1.3333, 1.0000, 1.3333])
    """
    if choose("carafe_from_logits", None, x, logits) == "triton":
        rest = (kernel_size, groups, padding_mode == "reflect", gain, False)
        return _from_logits(x, logits, window, None, *rest)[0]
    kernels = _applied_kernels(logits, kernel_size, groups, window, gain)
    return carafe(x, kernels, kernel_size, groups, padding_mode)


def add_low_pass(
    plus: Tensor,
    x: Tensor,
    logits: Tensor,
    kernel_size: int,
    groups: int = 1,
    window: Tensor | None = None,
    padding_mode: str = "zeros",
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``plus`` and the low-pass of ``x`` that :func:`carafe_from_logits` gives, and its kernels, in one.

    Args:
        plus: ``(B, C, H, W)``.
        x: ``(B, C, h, w)``, floating point; or a volume.
        logits: ``(B, groups * kernel_size**2, H, W)``, floating point.
        kernel_size: odd side of the window.
        groups: channel ``c`` of ``x`` uses group ``c // (C // groups)``.
        window: with ``kernel_size**2`` positive entries, a constant; or None.
        padding_mode: as of :func:`freqfusion.ops.carafe`.
        keep: whether the kernels are wanted.

    Returns:
        The sum ``(B, C, H, W)``; and the normalised ``logits``, of their shape and dtype, or None.

    >>> x, flat = torch.ones(1, 1, 3, 3), torch.zeros(1, 9, 3, 3)
    >>> total, kernels = add_low_pass(x, x, flat, 3, keep=True)
    >>> total[0, 0, 1]
    tensor([1.6667, 2.0000, 1.6667])
    >>> tuple(kernels.shape)
    (1, 9, 3, 3)
    """
    if choose("carafe_from_logits", None, x, logits) == "triton" and plus.dtype == x.dtype:
        rest = (kernel_size, groups, padding_mode == "reflect", 0, keep)
        total, kernels = _from_logits(x, logits, window, plus, *rest)
    else:
        kernels = normalize_kernels(logits, kernel_size, groups, window)
        total = plus + carafe(x, kernels, kernel_size, groups, padding_mode)
    return total, kernels if keep else None
