"""The convolution on tensor cores: the pixels of a tile times the weights, tap by tap.

cuDNN pads maps whose channels are not a multiple of 8 and adds the bias in a pass of its own; for the few channels of
kernels' logits and offsets both take longer than the convolution. A bad value reaches the pixels around it alone.
"""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._triton import INTERPRETED
from freqfusion.ops._triton.launch import Configuration, Launch, capability, launch
from freqfusion.ops._triton.maps import span
from freqfusion.ops._triton.registry import Case
from freqfusion.ops._triton.tiles import compiled

UNIT = 8
"""Channels that one access takes."""


@compiled
def _convolution(
    x, weight, bias, out, channels, outputs, height, width, x_b, x_h, x_w, o_b, o_h, o_w,
    K: tl.constexpr, DILATION: tl.constexpr, UNIT: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """TH x TW pixels; ``channels`` and the strides of ``x`` count in units."""
    channels = channels * UNIT
    program = tl.program_id(0)
    tiles = (width + TW - 1) // TW
    j0 = program % tiles * TW
    program //= tiles
    tiles = (height + TH - 1) // TH
    i0 = program % tiles * TH
    image = (program // tiles).to(tl.int64)
    x += image * x_b * UNIT
    m = tl.arange(0, TH * TW)
    i = i0 + m // TW
    j = j0 + m % TW
    n = tl.arange(0, BN)
    blocks = (channels + BC - 1) // BC
    total = tl.zeros((TH * TW, BN), tl.float32)
    for step in tl.range(0, K * K * blocks):
        tap = step // blocks
        c = step % blocks * BC + tl.arange(0, BC)
        down = i + (tap // K - K // 2) * DILATION
        across = j + (tap % K - K // 2) * DILATION
        inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
        at = x + ((down * x_h + across * x_w) * UNIT)[:, None] + c[None, :]
        value = tl.load(at, mask=inside[:, None] & (c < channels)[None, :], other=0.0)
        at = weight + (n * (K * K) * channels)[:, None] + (tap * channels + c)[None, :]
        taken = tl.load(at, mask=(n < outputs)[:, None] & (c < channels)[None, :], other=0.0)
        total = tl.dot(value, tl.trans(taken), total)
    total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    at = out + image * o_b + (i * o_h + j * o_w)[:, None] + n[None, :]
    stored = ((i < height) & (j < width))[:, None] & (n < outputs)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=stored)


def _serves(x: Tensor) -> bool:
    """Whether there are tensor cores that the kernel can use, and 32 bits count the places of an image."""
    if span(x) >= 2**31:
        return False
    if INTERPRETED:  # which multiplies the bits of bfloat16
        return x.dtype != torch.bfloat16
    return not torch.version.hip and capability(x.device) >= 80


def convolution(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """As :func:`freqfusion.ops.convolution.op.convolution`; where the kernel does not serve, torch's."""
    if not _serves(x):
        padding = dilation * (weight.shape[-1] // 2)
        out = F.conv2d(x, weight, bias.to(x.dtype), padding=padding, dilation=dilation)
        return out.contiguous(memory_format=torch.channels_last)
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    weight = weight.permute(0, 2, 3, 1).contiguous()
    launch(_convolution, (x, weight, bias.contiguous(), out), _prepare, dilation)
    return out


def _prepare(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dilation: int) -> Launch:
    batch, channels, height, width = x.shape
    outputs, kernel_size = weight.shape[:2]
    block = 32 if channels <= 32 else 64
    tile = {"TH": 8, "TW": 16, "BN": 32, "BC": block}
    if INTERPRETED:
        tile |= {"TH": 4, "TW": 4, "BC": 16}

    def programs(chosen: Configuration) -> int:
        return batch * triton.cdiv(height, chosen["TH"]) * triton.cdiv(width, chosen["TW"])

    strides = (x.stride(axis) // UNIT for axis in (0, 2, 3))
    return Launch(
        programs,
        [channels // UNIT, outputs, height, width, *strides, *(out.stride(axis) for axis in (0, 2, 3))],
        [tile | {"num_warps": 4, "num_stages": 3}, tile | {"num_warps": 8, "num_stages": 3}],
        {"K": kernel_size, "DILATION": dilation, "UNIT": UNIT},
    )


def cases() -> Iterator[Case]:
    def call(channels: int, outputs: int, dtype: torch.dtype) -> None:
        x = torch.empty((2, channels, 200, 336), dtype=dtype, memory_format=torch.channels_last)
        weight = torch.empty((outputs, channels, 3, 3), dtype=dtype)
        convolution(x, weight, torch.empty(outputs), 1)

    for dtype in (torch.bfloat16, torch.float16):
        for channels, outputs in ((64, 9), (72, 16), (24, 25)):
            name = f"convolution of {channels}x200x336 to {outputs} channels {dtype}".replace("torch.", "")
            yield Case(name, partial(call, channels, outputs, dtype))
