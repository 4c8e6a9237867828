"""Layout of the maps inside a fusion: channels innermost on CUDA in half precision, whatever the inputs have.

There convolutions (cuDNN's) and the wide kernels of :mod:`freqfusion.ops` are 2 to 3 times as fast with channels
innermost, while a wide map that comes row by row would cost more to convert than it gains. So only the narrow maps
change their layout, at the one place where they are made: a 1x1 convolution is a matrix product, which reads its
operand transposed for nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.fusion.base import Convolution
from freqfusion.ops._backends import needs_composite
from freqfusion.ops._checks import is_channels_last
from freqfusion.ops.convolution.op import convolution

HALF = (torch.float16, torch.bfloat16)


def wanted(x: Tensor) -> bool:
    """Whether the maps made from ``x`` should have their channels innermost."""
    half = x.dtype in HALF or torch.is_autocast_enabled("cuda")
    return x.ndim == 4 and x.is_cuda and half and not needs_composite(x)


def to_nhwc(x: Tensor) -> Tensor:
    """``x``, with channels innermost where that is wanted."""
    return x.contiguous(memory_format=torch.channels_last) if wanted(x) else x


def compress(convolution: Convolution, x: Tensor) -> Tensor:
    """A plain 1x1 convolution of ``(B, C, H, W)`` and its bias in one; the result has its channels innermost."""
    assert convolution.bias is not None
    tensors = x, convolution.weight.flatten(1), convolution.bias
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        tensors = tensors[0].to(dtype), tensors[1].to(dtype), tensors[2].to(dtype)
    out: Tensor = _Compress.apply(*tensors)
    return out


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, summing: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A convolution with an odd kernel that keeps the size; and sums of ``x``, see :func:`convolution`."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return convolution(x.to(dtype), weight.to(dtype), bias, dilation, summing and dtype == x.dtype)


class _Compress(torch.autograd.Function):
    """The gradient of the map lies as the map does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if is_channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        pixels = x.flatten(2).transpose(1, 2)
        out = torch.baddbmm(bias, pixels, weight.t().expand(len(x), -1, -1))
        return out.transpose(1, 2).unflatten(2, x.shape[-2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        in_x = in_weight = in_bias = None
        if ctx.needs_input_grad[2]:  # as a product: torch's sum of 64 channels takes more than twice as long
            pixels = grad.permute(1, 0, 2, 3).flatten(1)
            in_bias = torch.mv(pixels, pixels.new_ones(pixels.shape[1]))
        if is_channels_last(x):
            rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
            if ctx.needs_input_grad[0]:
                in_x = (rows @ weight).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
            if ctx.needs_input_grad[1]:
                in_weight = rows.t() @ x.permute(0, 2, 3, 1).flatten(0, 2)
            return in_x, in_weight, in_bias
        grad = grad.flatten(2)
        if ctx.needs_input_grad[0]:
            in_x = torch.bmm(weight.t().expand(len(x), -1, -1), grad).unflatten(2, x.shape[-2:])
        if ctx.needs_input_grad[1]:
            in_weight = torch.bmm(grad, x.flatten(2).transpose(1, 2)).sum(0)
        return in_x, in_weight, in_bias
