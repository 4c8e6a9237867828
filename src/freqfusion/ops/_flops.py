"""What our registered operators cost, for ``torch.utils.flop_counter.FlopCounterMode``.

Importing this module registers the formulas. It is left to those who count, for torch's counter brings Triton
along, which would take several times as long to import as this package.

A multiply-add counts as 2, as in torch's own formulas. The counter knows convolutions, matrix products and
attention; everything else (elementwise arithmetic, softmax, normalisation, interpolation, ``grid_sample``)
counts as nothing, in networks as in the methods here.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def _reassembly(fine_shape: Sequence[int], kernel_size: int) -> int:
    """A multiply-add for each tap of each value of the fine map ``(B, C, ...)``; so too for both adjoints."""
    return 2 * kernel_size ** (len(fine_shape) - 2) * prod(fine_shape)


@register_flop_formula(torch.ops.freqfusion.carafe)
def _carafe(
    x: Sequence[int], kernels: Sequence[int], kernel_size: int, *rest: Any, out_shape: Sequence[int]
) -> int:
    return _reassembly(out_shape, kernel_size)


@register_flop_formula(torch.ops.freqfusion.carafe_backward_x)
def _carafe_backward_x(
    kernels: Sequence[int],
    grad: Sequence[int],
    size: Sequence[int],
    kernel_size: int,
    *rest: Any,
    **shapes: Any,
) -> int:
    return _reassembly(grad, kernel_size)


@register_flop_formula(torch.ops.freqfusion.carafe_backward_kernels)
def _carafe_backward_kernels(
    x: Sequence[int], grad: Sequence[int], kernel_size: int, *rest: Any, **shapes: Any
) -> int:
    return _reassembly(grad, kernel_size)


@register_flop_formula(torch.ops.freqfusion.carafe_backward)
def _carafe_backward(
    x: Sequence[int], kernels: Sequence[int], grad: Sequence[int], kernel_size: int, *rest: Any, **shapes: Any
) -> int:
    return 2 * _reassembly(grad, kernel_size)


@register_flop_formula(torch.ops.freqfusion.carafe_from_logits)
def _carafe_from_logits(
    x: Sequence[int],
    logits: Sequence[int],
    window: Sequence[int] | None,
    plus: Sequence[int] | None,
    kernel_size: int,
    *rest: Any,
    out_shape: tuple[Sequence[int], Sequence[int]],
) -> int:
    return _reassembly(out_shape[0], kernel_size)


@register_flop_formula(torch.ops.freqfusion.carafe_from_logits_backward)
def _carafe_from_logits_backward(
    x: Sequence[int],
    logits: Sequence[int],
    window: Sequence[int] | None,
    grad: Sequence[int],
    more: Sequence[int] | None,
    kernel_size: int,
    *rest: Any,
    **shapes: Any,
) -> int:
    return 2 * _reassembly(grad, kernel_size)


@register_flop_formula(torch.ops.freqfusion.convolution)
def _convolution(
    x: Sequence[int],
    weight: Sequence[int],
    *rest: Any,
    out_shape: tuple[Sequence[int], Sequence[int]],
    **options: Any,
) -> int:
    """As torch counts its own."""
    return 2 * prod(weight[1:]) * prod(out_shape[0])
