"""A convolution to few channels in half precision, whose channels lie side by side."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._autograd import registered
from freqfusion.ops._backends import OPERATORS, Operator, choose, implementation
from freqfusion.ops._checks import is_channels_last

MAX_CHANNELS = 32
"""Of the result: beyond, torch's own convolution is as fast."""

kernels_for = partial(implementation, "convolution")


def _cannot(backend: str, x: Tensor, weight: Tensor) -> str:
    if x.dtype == torch.float32 or x.dtype != weight.dtype:
        return "it is for half precision"
    if weight.shape[0] > MAX_CHANNELS or weight.shape[2] != weight.shape[3]:
        return f"it makes at most {MAX_CHANNELS} channels, with square kernels"
    if x.numel() == 0 or not is_channels_last(x) or x.shape[1] % 8:
        return "the channels do not lie side by side, or their number is not a multiple of 8"
    return ""


OPERATORS["convolution"] = Operator(2, ("triton",), _cannot)


@registered("freqfusion::convolution")
def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, summing: bool
) -> tuple[Tensor, Tensor]:
    """The result; and sums of ``x`` if ``summing``, else nothing."""
    return kernels_for("triton").convolution(x, weight, bias, dilation, summing)


@_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, dilation: int, summing: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sums = (x.shape[0], 2, x.shape[1]) if summing else (0, 2, x.shape[1])
    return out, x.new_empty(sums, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.dilation, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype


def _derivative(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    x, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad
    pair, padding = [ctx.dilation] * 2, [ctx.dilation * (weight.shape[2] // 2)] * 2
    in_x, in_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, pair, False, [0, 0], 1, [needed[0], needed[1], False]
    )
    in_bias = None
    if needed[2]:
        in_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype)
    return in_x, in_weight, in_bias, None, None


_convolution.register_autograd(_derivative, setup_context=_save)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1, summing: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A convolution that keeps the size: stride 1, borders of zeros.

    Args:
        x: ``(B, C, H, W)``, floating point.
        weight: ``(D, C, k, k)`` with an odd ``k``, of the dtype of ``x``.
        bias: ``(D,)``; float32 too, which is added before the result is rounded.
        dilation: distance of adjacent taps in pixels.
        summing: whether ``x`` will be normalised too, which begins with sums of what is read here anyway.

    Returns:
        ``(B, D, H, W)`` of the dtype and layout of ``x``; and, if ``summing`` costs little, the sums that
        :func:`freqfusion.ops.normalized_similarity.op.normalized_similarity` takes, which have no gradient.

    >>> convolution(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 3, 3), torch.zeros(1))[0]
    tensor([[[[2., 3., 2.]]]])
    """
    if choose("convolution", None, x, weight) == "triton":
        out, sums = _convolution(x, weight, bias, dilation, summing)
        return out, sums if summing else None
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias.to(x.dtype), padding=padding, dilation=dilation), None
