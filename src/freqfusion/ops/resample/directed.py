"""Sampling at positions that two resolutions predict: their sum, the offsets from it and the reading in one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from freqfusion.ops._autograd import registered, second_derivative
from freqfusion.ops._backends import OPERATORS, Operator, choose
from freqfusion.ops._checks import (
    check_filled,
    check_groups,
    check_map,
    check_pair,
    is_channels_last,
    layout,
)
from freqfusion.ops.resample.naive import resample_naive
from freqfusion.ops.resample.op import kernels_for, resample
from freqfusion.ops.resize import resize, shuffle


def _cannot(backend: str, x: Tensor, fine: Tensor, coarse: Tensor) -> str:
    if x.numel() == 0 or fine.numel() == 0:
        return "a map is empty"
    if fine.shape[2] != 2 * coarse.shape[2] or fine.shape[3] != 2 * coarse.shape[3]:
        return "the fine map does not have exactly twice the sides of the coarse one"
    return ""


OPERATORS["directed_resample"] = Operator(
    3, ("triton",), _cannot, lambda x, fine, coarse, groups, reflect: kernels_for("triton").explain(x, groups)
)


@registered("freqfusion::directed_resample")
def _directed(
    x: Tensor, fine: Tensor, coarse: Tensor, groups: int, unit_size: Sequence[int], channels_last: bool
) -> Tensor:
    return kernels_for("triton").resample(x, fine, groups, *unit_size, coarse, _format(channels_last))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@registered("freqfusion::directed_resample_backward")
def _directed_backward(
    x: Tensor, fine: Tensor, coarse: Tensor, grad: Tensor, groups: int, unit_size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels_for("triton").directed_backward(x, fine, coarse, grad, groups, *unit_size)


@_directed.register_fake
def _(
    x: Tensor, fine: Tensor, coarse: Tensor, groups: int, unit_size: Sequence[int], channels_last: bool
) -> Tensor:
    shape = (*x.shape[:2], *fine.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(channels_last))


@_directed_backward.register_fake
def _(x: Tensor, fine: Tensor, coarse: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    in_x = torch.empty(x.shape, dtype=grad.dtype, device=x.device, memory_format=layout(x))
    return in_x, torch.empty_like(fine), torch.empty_like(coarse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, fine, coarse, *ctx.rest, _ = inputs
    ctx.save_for_backward(x, fine, coarse)


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_directed_backward(*ctx.saved_tensors, grad, *ctx.rest), None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, fine, coarse, grad, *ctx.rest = inputs
    ctx.save_for_backward(x, fine, coarse, grad)


def _backward_derivative(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, grad = ctx.saved_tensors
    in_inputs, in_grad = second_derivative(partial(_naive, *ctx.rest), inputs, grad, cotangents)
    return *in_inputs, in_grad, None, None


def _naive(groups: int, unit_size: Sequence[int], x: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
    return resample_naive(x, directed_offsets(fine, coarse), groups, unit_size)


_directed.register_autograd(_derivative, setup_context=_save, ahead=True)
_directed_backward.register_autograd(_backward_derivative, setup_context=_save_backward)


def directed_offsets(fine: Tensor, coarse: Tensor) -> Tensor:
    """The offsets of :func:`directed_resample`, ``(B, 2 * groups, H, W)``; ``H`` and ``W`` may be any.

    >>> directed_offsets(torch.ones(1, 4, 2, 2), torch.zeros(1, 16, 1, 1))[0, :, 0, 0]
    tensor([0.7311, 0.7311])
    """
    predicted = resize(shuffle(coarse, 2), fine.shape[2:], "nearest") + fine
    direction, magnitude = predicted.chunk(2, dim=1)
    return direction * magnitude.sigmoid()


def directed_resample(
    x: Tensor,
    fine: Tensor,
    coarse: Tensor,
    groups: int,
    unit_size: Sequence[int],
    channels_last: bool | None = None,
) -> Tensor:
    """:func:`freqfusion.ops.resample` by directions times magnitudes, each the sum of what two resolutions predict.

    Args:
        x: ``(B, C, *, *)``, floating point; or a volume.
        fine: ``(B, 4 * groups, H, W)``: directions along x of each group, then along y; then, of their magnitudes
            likewise, the arguments of a sigmoid. For a volume ``(B, 6 * groups, D, H, W)``.
        coarse: ``(B, 16 * groups, h, w)``: the same of four sub-pixels, as :func:`torch.nn.functional.pixel_shuffle`
            takes them. For a volume ``(B, 48 * groups, d, h, w)``, of eight.
        groups: channel ``c`` of ``x`` moves by offsets ``c // (C // groups)``.
        unit_size: as of :func:`freqfusion.ops.resample`.
        channels_last: whether channels lie innermost in the result; None for as in ``x``.

    Returns:
        ``(B, C, H, W)`` of the dtype of ``x``.

    Raises:
        TypeError: for integer tensors.
        ValueError: for wrong rank, channels, groups, batch or device, and an empty ``x``.

    Source: Chen et al., TPAMI 2024, offset generator.

    >>> x, fine, coarse = torch.rand(1, 1, 2, 2), torch.zeros(1, 4, 2, 2), torch.zeros(1, 16, 1, 1)
    >>> torch.equal(directed_resample(x, fine, coarse, 1, (1, 1)), x)
    True
    """
    check_map("x", x, (2, 3))
    check_filled("x", x)
    groups = check_groups("x", x.shape[1], groups)
    dims = x.ndim - 2
    for name, predicted, subpixels in (("fine", fine, 1), ("coarse", coarse, 2**dims)):
        check_map(name, predicted, (2, 3))
        check_pair("x", x, name, predicted)
        channels = 2 * dims * groups * subpixels
        if predicted.shape[1] != channels:
            raise ValueError(
                f"{name} must have {channels} channels for {groups} groups, got {predicted.shape[1]}"
            )
    if choose("directed_resample", None, x, fine, coarse) == "triton":
        last = is_channels_last(x) if channels_last is None else channels_last
        return _directed(x, fine, coarse, groups, unit_size, last)
    out = resample(x, directed_offsets(fine, coarse), groups, unit_size)
    return out if channels_last is None else out.contiguous(memory_format=_format(channels_last))
