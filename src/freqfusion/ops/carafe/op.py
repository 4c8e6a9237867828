"""Public function of the reassembly, its registered operators and their derivatives."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from freqfusion.ops._autograd import registered
from freqfusion.ops._backends import OPERATORS, Operator, choose, implementation, needs_composite
from freqfusion.ops._checks import (
    accumulation_dtype,
    check_filled,
    check_groups,
    check_kernel_size,
    check_map,
    check_padding_mode,
    check_pair,
    check_taps,
    layout,
)
from freqfusion.ops._windows import middle, reachable, spread
from freqfusion.ops.carafe.naive import carafe_naive

MAX_SIDES = 2**30
"""Triton kernels multiply a fine side by a coarse one in 32 bits."""

kernels_for = partial(implementation, "carafe")

# `backend` is a name that `choose` gave; the derivatives keep it.


def cannot(backend: str, x: Tensor, kernels: Tensor) -> str:
    """Why the kernels of a backend cannot reassemble ``x`` to the sides of ``kernels``, or ``""``."""
    (h, w), (height, width) = x.shape[-2:], kernels.shape[-2:]
    ratio = 1
    for coarse, fine in zip(x.shape[2:], kernels.shape[2:], strict=True):
        ratio = ratio * -(-fine // coarse)
    if backend == "native" and ratio > 256:
        return "more than 256 fine pixels lie in one coarse pixel"
    if backend == "triton" and (h * height >= MAX_SIDES or w * width >= MAX_SIDES):
        return f"a fine side times the coarse one is {MAX_SIDES} or more"
    return ""


OPERATORS["carafe"] = Operator(
    2, ("native", "triton"), cannot, lambda *call: kernels_for("triton").explain(*call, normalize=False)
)


def _reaching(
    kernels: Tensor, kernel_size: int, groups: int, reflect: bool, size: Sequence[int]
) -> tuple[Tensor, int]:
    """The kernels without the taps that lie outside the map wherever the window is, and their side."""
    inner = kernel_size if reflect else reachable(kernel_size, 1, *size)[0]
    if inner == kernel_size:
        return kernels, inner
    taps = kernels.unflatten(1, (groups, kernel_size ** len(size)))
    return taps.index_select(2, middle(inner, kernel_size, kernels.device, len(size))).flatten(1, 2), inner


@registered("freqfusion::carafe")
def _carafe(
    x: Tensor,
    kernels: Tensor,
    kernel_size: int,
    groups: int,
    reflect: bool,
    backend: str = "torch",
    channels_last: bool = False,
) -> Tensor:
    """In the layout of ``x``, unless ``channels_last``, which only Triton knows."""
    kernels, inner = _reaching(kernels, kernel_size, groups, reflect, x.shape[2:])
    memory = (torch.channels_last,) if channels_last else ()
    return kernels_for(backend).carafe(x, kernels, inner, groups, reflect, *memory)


@registered("freqfusion::carafe_backward_x")
def _carafe_backward_x(
    kernels: Tensor,
    grad: Tensor,
    size: Sequence[int],
    kernel_size: int,
    groups: int,
    reflect: bool,
    backend: str = "torch",
) -> Tensor:
    if reflect and backend == "native" and kernel_size // 2 >= max(size):
        backend = "torch"  # the native kernel's working memory would grow with the fourth power of the side
    kernels, inner = _reaching(kernels, kernel_size, groups, reflect, size)
    return kernels_for(backend).carafe_backward_x(kernels, grad, size, inner, groups, reflect)


@registered("freqfusion::carafe_backward_kernels")
def carafe_backward_kernels(
    x: Tensor,
    grad: Tensor,
    kernel_size: int,
    groups: int,
    reflect: bool,
    backend: str = "torch",
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = dtype or accumulation_dtype(x, grad)
    inner = kernel_size if reflect else reachable(kernel_size, 1, *x.shape[2:])[0]
    if backend == "triton":
        taps = kernels_for("triton").carafe_backward_kernels(x, grad, inner, groups, reflect, dtype)
        return _all_taps(taps, inner, kernel_size, groups).contiguous(memory_format=layout(grad))
    taps = kernels_for(backend).carafe_backward_kernels(x, grad, inner, groups, reflect).to(dtype)
    return _all_taps(taps, inner, kernel_size, groups)


def _all_taps(taps: Tensor, inner: int, kernel_size: int, groups: int) -> Tensor:
    """The gradient of :func:`_reaching` kernels as that of all."""
    if inner == kernel_size:
        return taps
    dims = taps.ndim - 2
    taps = taps.unflatten(1, (groups, inner**dims))
    return spread(taps, inner, kernel_size, axis=2, dims=dims).flatten(1, 2)


@registered("freqfusion::carafe_backward")
def _carafe_backward(
    x: Tensor,
    kernels: Tensor,
    grad: Tensor,
    kernel_size: int,
    groups: int,
    reflect: bool,
) -> tuple[Tensor, Tensor]:
    """Both derivatives at once; only Triton has a kernel for that."""
    reaching, inner = _reaching(kernels, kernel_size, groups, reflect, x.shape[2:])
    grad_x, taps = kernels_for("triton").carafe_backward(x, reaching, grad, inner, groups, reflect)
    return grad_x, _all_taps(taps, inner, kernel_size, groups).contiguous(memory_format=layout(kernels))


@_carafe.register_fake
def _(
    x: Tensor,
    kernels: Tensor,
    kernel_size: int,
    groups: int,
    reflect: bool,
    backend: str = "torch",
    channels_last: bool = False,
) -> Tensor:
    shape = (*x.shape[:2], *kernels.shape[2:])
    memory = torch.channels_last if channels_last else layout(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory)


@_carafe_backward_x.register_fake
def _(kernels: Tensor, grad: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
    shape = (*grad.shape[:2], *size)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout(grad))


@carafe_backward_kernels.register_fake
def _(
    x: Tensor,
    grad: Tensor,
    kernel_size: int,
    groups: int,
    reflect: bool,
    backend: str = "torch",
    dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (x.shape[0], groups * kernel_size ** (grad.ndim - 2), *grad.shape[2:])
    memory_format = layout(grad) if backend == "triton" else torch.contiguous_format
    dtype = dtype or accumulation_dtype(x, grad)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)


@_carafe_backward.register_fake
def _(x: Tensor, kernels: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=grad.dtype, device=x.device, memory_format=layout(x))
    return grad_x, torch.empty_like(kernels, memory_format=layout(kernels))


# The reassembly is linear in x and in the kernels, so the derivatives of all these operators are the first three
# again, and any order of differentiation works. `rest` is (kernel_size, groups, reflect, backend).


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *rest = inputs
    ctx.save_for_backward(first, second)
    ctx.rest = rest


def _carafe_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, kernels = ctx.saved_tensors
    *rest, _ = ctx.rest
    need_x, need_kernels = ctx.needs_input_grad[:2]
    if rest[-1] == "triton" and need_x and need_kernels:
        return *_carafe_backward(x, kernels, grad, *rest[:-1]), *(None for _ in ctx.rest)
    return (
        _carafe_backward_x(kernels, grad, x.shape[2:], *rest) if need_x else None,
        carafe_backward_kernels(x, grad, *rest, kernels.dtype) if need_kernels else None,
        *(None for _ in ctx.rest),
    )


def _save_three(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, kernels, grad, *ctx.rest = inputs
    ctx.save_for_backward(x, kernels, grad)


def _both_derivative(ctx: Any, to_x: Tensor, to_kernels: Tensor) -> tuple[Tensor | None, ...]:
    x, kernels, incoming = ctx.saved_tensors
    rest = *ctx.rest, "triton"
    need_x, need_kernels, need_incoming = ctx.needs_input_grad[:3]
    in_incoming = None
    if need_incoming:
        in_incoming = _carafe(to_x, kernels, *rest) + _carafe(x, to_kernels, *rest).to(to_x.dtype)
    return (
        _carafe_backward_x(to_kernels, incoming, x.shape[2:], *rest).to(x.dtype) if need_x else None,
        carafe_backward_kernels(to_x, incoming, *rest, kernels.dtype) if need_kernels else None,
        in_incoming,
        *(None for _ in ctx.rest),
    )


def _backward_x_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kernels, incoming = ctx.saved_tensors
    rest = ctx.rest[1:]
    need_kernels, need_incoming = ctx.needs_input_grad[:2]
    return (
        carafe_backward_kernels(grad, incoming, *rest, kernels.dtype) if need_kernels else None,
        _carafe(grad, kernels, *rest) if need_incoming else None,
        *(None for _ in ctx.rest),
    )


def _backward_kernels_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, incoming = ctx.saved_tensors
    rest = ctx.rest[:-1]  # without the dtype
    need_x, need_incoming = ctx.needs_input_grad[:2]
    return (
        _carafe_backward_x(grad, incoming, x.shape[2:], *rest).to(x.dtype) if need_x else None,
        _carafe(x, grad, *rest).to(incoming.dtype) if need_incoming else None,
        *(None for _ in ctx.rest),
    )


_carafe.register_autograd(_carafe_derivative, setup_context=_save, ahead=True)
_carafe_backward_x.register_autograd(_backward_x_derivative, setup_context=_save)
carafe_backward_kernels.register_autograd(_backward_kernels_derivative, setup_context=_save)
_carafe_backward.register_autograd(_both_derivative, setup_context=_save_three)


def carafe(
    x: Tensor,
    kernels: Tensor,
    kernel_size: int,
    groups: int = 1,
    padding_mode: str = "zeros",
    backend: str | None = None,
) -> Tensor:
    """Content-aware reassembly: every output pixel is a weighted sum over a window of ``x``.

    Output pixel ``(I, J)`` reads the ``kernel_size`` x ``kernel_size`` window of ``x`` centred at
    ``(floor(I * h / H), floor(J * w / W))`` (integer arithmetic) with its own weights; all channels of a
    group share them. At a whole-number ratio this is CARAFE; it is defined at every other size too.

    Of a volume ``(B, C, d, h, w)``, with kernels ``(B, groups * kernel_size**3, D, H, W)`` whose taps are ordered by
    depth, row and column, the same holds at any ratio of each axis.

    Args:
        x: ``(B, C, h, w)`` or ``(B, C, d, h, w)``, floating point; any memory layout, channels_last is kept.
        kernels: ``(B, groups * kernel_size**2, H, W)``, floating point; channel
            ``(group * kernel_size + row) * kernel_size + column``. Used as they are: normalise first, see
            :func:`freqfusion.ops.normalize_kernels`.
        kernel_size: odd side of the window.
        groups: channel ``c`` of ``x`` uses group ``c // (C // groups)``.
        padding_mode: ``"zeros"``: taps outside ``x`` count as zero (mmcv's operator, which the published
            checkpoints were trained with); ``"reflect"``: they read the mirrored pixel (the fallback
            of the released FreqFusion code).
        backend: ``"native"``, ``"triton"``, ``"torch"``, or None for the best that can; see
            :func:`freqfusion.ops.use_backend`.

    Returns:
        ``(B, C, H, W)`` or ``(B, C, D, H, W)`` of the dtype of ``x``. Half precision is accumulated in float32.

    Raises:
        TypeError: for integer tensors and arguments of another type, such as a float kernel size.
        ValueError: for wrong rank, channels, groups, batch, device, kernel size, padding mode or backend.
        RuntimeError: if the named backend cannot compute this call.

    Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019, equation 4.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> centre = torch.zeros(1, 9, 4, 4); centre[:, 4] = 1
    >>> carafe(x, centre, kernel_size=3)[0, 0]
    tensor([[0., 0., 1., 1.],
            [0., 0., 1., 1.],
            [2., 2., 3., 3.],
            [2., 2., 3., 3.]])
    """
    check_map("x", x, (2, 3))
    check_map("kernels", kernels, (2, 3))
    check_pair("x", x, "kernels", kernels)
    kernel_size = check_kernel_size("kernel_size", kernel_size)
    groups = check_groups("x", x.shape[1], groups)
    check_taps("kernels", kernels.shape[1], kernel_size, groups, x.ndim - 2)
    reflect = check_padding_mode(padding_mode)
    check_filled("x", x)
    chosen = choose("carafe", backend, x, kernels)
    if needs_composite(x, kernels):
        return carafe_naive(x, kernels, kernel_size, groups, padding_mode)
    return _carafe(x, kernels, kernel_size, groups, reflect, chosen)


def carafe_channels_last(
    x: Tensor, kernels: Tensor, kernel_size: int, groups: int = 1, padding_mode: str = "zeros"
) -> Tensor:
    """:func:`carafe` of what that accepts; where Triton's kernels serve, its channels lie innermost."""
    if choose("carafe", None, x, kernels) != "triton":
        return carafe(x, kernels, kernel_size, groups, padding_mode)
    return _carafe(x, kernels, kernel_size, groups, padding_mode == "reflect", "triton", True)
