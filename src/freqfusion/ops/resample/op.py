"""Grouped linear sampling at displaced positions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from freqfusion.ops._autograd import registered, second_derivative
from freqfusion.ops._backends import OPERATORS, Operator, choose, implementation
from freqfusion.ops._checks import check_count, check_filled, check_groups, check_map, check_pair, layout
from freqfusion.ops.resample.naive import resample_naive
from freqfusion.ops.resample.torch import resample as grid_sampled

kernels_for = partial(implementation, "resample")


OPERATORS["resample"] = Operator(
    2,
    ("native", "triton"),
    which_kernels=lambda x, offsets, groups, reflect: kernels_for("triton").explain(x, groups),
)


@registered("freqfusion::resample")
def _resample(
    x: Tensor, offsets: Tensor, groups: int, unit_size: Sequence[int], backend: str = "native"
) -> Tensor:
    return kernels_for(backend).resample(x, offsets, groups, *unit_size)


@registered("freqfusion::resample_backward_x")
def _resample_backward_x(
    x: Tensor,
    offsets: Tensor,
    grad: Tensor,
    groups: int,
    unit_size: Sequence[int],
    backend: str = "native",
) -> Tensor:
    return kernels_for(backend).resample_backward_x(offsets, grad, x.shape[2:], groups, *unit_size)


@registered("freqfusion::resample_backward_offsets")
def _resample_backward_offsets(
    x: Tensor,
    offsets: Tensor,
    grad: Tensor,
    groups: int,
    unit_size: Sequence[int],
    backend: str = "native",
) -> Tensor:
    return kernels_for(backend).resample_backward_offsets(x, offsets, grad, groups, *unit_size)


@_resample.register_fake
def _(x: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    shape = (*x.shape[:2], *offsets.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


@_resample_backward_x.register_fake
def _(x: Tensor, offsets: Tensor, grad: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=grad.dtype, device=x.device, memory_format=layout(grad))


@_resample_backward_offsets.register_fake
def _(x: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    return torch.empty(offsets.shape, dtype=offsets.dtype, device=x.device)


# The derivatives of the two backward operators (second order and beyond) are those of the naive form.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, *ctx.rest = inputs
    ctx.save_for_backward(x, offsets)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, grad, *ctx.rest = inputs
    ctx.save_for_backward(x, offsets, grad)


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets = ctx.saved_tensors
    need_x, need_offsets = ctx.needs_input_grad[:2]
    return (
        _resample_backward_x(x, offsets, grad, *ctx.rest) if need_x else None,
        _resample_backward_offsets(x, offsets, grad, *ctx.rest) if need_offsets else None,
        *(None for _ in ctx.rest),
    )


def _second(ctx: Any, cotangents: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, ...]:
    x, offsets, grad = ctx.saved_tensors
    groups, unit_size, _ = ctx.rest

    def naive(x: Tensor, offsets: Tensor) -> Tensor:
        return resample_naive(x, offsets, groups, unit_size)

    inputs, incoming = second_derivative(naive, (x, offsets), grad, cotangents)
    return (*inputs, incoming, *(None for _ in ctx.rest))


_resample.register_autograd(_derivative, setup_context=_save, ahead=True)
_resample_backward_x.register_autograd(
    lambda ctx, grad: _second(ctx, (grad, None)), setup_context=_save_backward
)
_resample_backward_offsets.register_autograd(
    lambda ctx, grad: _second(ctx, (None, grad)), setup_context=_save_backward
)


def _checked_unit(unit_size: Sequence[int], dims: int) -> list[int]:
    if not isinstance(unit_size, (tuple, list)) or len(unit_size) != dims:
        wanted = "(height, width) or None" if dims == 2 else "(depth, height, width) or None"
        number = "two" if dims == 2 else "three"
        raise TypeError(f"unit_size must be {wanted}, got {unit_size!r}; pass {number} ints")
    return [check_count(f"unit_size[{axis}]", side) for axis, side in enumerate(unit_size)]


def resample(
    x: Tensor,
    offsets: Tensor,
    groups: int = 1,
    unit_size: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sample ``x`` bilinearly (a volume trilinearly) at the output grid's own positions plus ``offsets``.

    The output grid ``(H, W)`` covers the same area as ``x``: with zero offsets the result is ``x`` itself
    where the sizes agree, and its bilinear interpolation (half-pixel centres) where they do not. Positions
    beyond the border read the border. Where an offset is NaN, so are the result, the gradients of both offsets
    there and those of the pixels beside the place.

    Args:
        x: ``(B, C, h, w)`` or ``(B, C, d, h, w)``, floating point.
        offsets: ``(B, 2 * groups, H, W)``; first the ``groups`` displacements along x (columns, to the right),
            then those along y (rows, downwards). Of a volume ``(B, 3 * groups, D, H, W)``; last those along depth.
        groups: channel ``c`` of ``x`` moves by offsets ``c // (C // groups)``.
        unit_size: ``(height, width)`` or ``(depth, height, width)`` of the pixel grid in whose pixels offsets are
            counted; None for the grid of ``x``. FreqFusion samples an already upsampled map by offsets in coarse
            pixels.
        backend: ``"native"``, ``"triton"``, ``"torch"``, or None for the best that can; see
            :func:`freqfusion.ops.use_backend`.

    Returns:
        ``(B, C, H, W)`` or ``(B, C, D, H, W)`` of the dtype of ``x``. Positions and weights are at least float32: a
        bfloat16 position would miss by more than a pixel on a map of a few hundred.

    Raises:
        TypeError: for integer tensors and arguments of another type, such as a float number of groups.
        ValueError: for wrong rank, channels, groups, unit size, batch, device or backend, and an empty ``x``.
        RuntimeError: if the named backend cannot compute this call.

    Source: Liu et al., "Learning to Upsample by Learning to Sample" (DySample), ICCV 2023, equation 1;
    Chen et al., TPAMI 2024, offset generator.

    >>> x = torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]])
    >>> offsets = torch.tensor([0.5, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 4)
    >>> resample(x, offsets)
    tensor([[[[0.5000, 1.5000, 2.5000, 3.0000]]]])
    """
    check_map("x", x, (2, 3))
    check_map("offsets", offsets, (2, 3))
    check_pair("x", x, "offsets", offsets)
    check_filled("x", x)
    groups = check_groups("x", x.shape[1], groups)
    dims = x.ndim - 2
    if offsets.shape[1] != dims * groups:
        raise ValueError(
            f"offsets must have {dims} * groups = {dims * groups} channels, got {offsets.shape[1]}"
        )
    unit = x.shape[2:] if unit_size is None else _checked_unit(unit_size, dims)
    chosen = choose("resample", backend, x, offsets)
    if chosen == "torch":
        return grid_sampled(x, offsets, groups, unit)
    return _resample(x, offsets, groups, unit, chosen)
