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
    x, weight, bias, out, parts, channels, outputs, height, width, summing, x_b, x_h, x_w, o_b, o_h, o_w,
    K: tl.constexpr, DILATION: tl.constexpr, UNIT: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """TH x TW pixels; ``channels`` and the strides of ``x`` count in units.

    If ``summing``, ``parts`` receive what these pixels add to the ``sums`` of :mod:`freqfusion.ops._triton.groups`.
    """
    channels = channels * UNIT
    program = tl.program_id(0)
    parts += program.to(tl.int64) * (2 * channels)
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
    valid = ((i < height) & (j < width))[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=valid & (n < outputs)[None, :])
    if summing != 0:
        here = x + ((i * x_h + j * x_w) * UNIT)[:, None]
        for start in tl.range(0, channels, BC):
            c = start + tl.arange(0, BC)
            real = c < channels
            origin = tl.load(x + c, mask=real, other=0.0).to(tl.float32)[None, :]
            value = tl.load(here + c[None, :], mask=valid & real[None, :], other=0.0).to(tl.float32)
            value = tl.where(valid, value - origin, 0.0)
            tl.store(parts + c, tl.sum(value, axis=0), mask=real)
            tl.store(parts + channels + c, tl.sum(value * value, axis=0), mask=real)


def _serves(x: Tensor) -> bool:
    """Whether there are tensor cores that the kernel can use, and 32 bits count the places of an image."""
    if span(x) >= 2**31:
        return False
    if INTERPRETED:  # which multiplies the bits of bfloat16
        return x.dtype != torch.bfloat16
    return not torch.version.hip and capability(x.device) >= 80


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, summing: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`freqfusion.ops.convolution.op.convolution`; where the kernel does not serve, torch's."""
    batch, channels, height, width = x.shape
    if not _serves(x):
        padding = dilation * (weight.shape[-1] // 2)
        out = F.conv2d(x, weight, bias.to(x.dtype), padding=padding, dilation=dilation)
        value = x.float() - x[:, :, :1, :1].float() if summing else x[:0].float()
        sums = torch.stack((value.sum((2, 3)), (value * value).sum((2, 3))), 1)
        return out.contiguous(memory_format=torch.channels_last), sums
    shape = (batch, weight.shape[0], height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tiles = (batch, _tiles(height, width, _tile(channels))) if summing else (0,)
    parts = torch.empty((*tiles, 2, channels), dtype=torch.float32, device=x.device)
    weight = weight.permute(0, 2, 3, 1).contiguous()
    launch(_convolution, (x, weight, bias.contiguous(), out, parts), _prepare, dilation)
    return out, parts.sum(1) if summing else parts


def _tile(channels: int) -> Configuration:
    if INTERPRETED:
        return {"TH": 4, "TW": 4, "BN": 32, "BC": 16}
    return {"TH": 8, "TW": 16, "BN": 32, "BC": 32 if channels <= 32 else 64}


def _tiles(height: int, width: int, chosen: Configuration) -> int:
    return triton.cdiv(height, chosen["TH"]) * triton.cdiv(width, chosen["TW"])


def _prepare(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, parts: Tensor, dilation: int) -> Launch:
    batch, channels, height, width = x.shape
    outputs, kernel_size = weight.shape[:2]
    tile, summing = _tile(channels), int(parts.numel() > 0)
    strides = (x.stride(axis) // UNIT for axis in (0, 2, 3))
    return Launch(
        lambda chosen: batch * _tiles(height, width, chosen),
        [
            channels // UNIT,
            outputs,
            height,
            width,
            summing,
            *strides,
            *(out.stride(axis) for axis in (0, 2, 3)),
        ],
        [tile | {"num_warps": 4, "num_stages": 3}, tile | {"num_warps": 8, "num_stages": 3}],
        {"K": kernel_size, "DILATION": dilation, "UNIT": UNIT},
    )


def cases() -> Iterator[Case]:
    def call(channels: int, outputs: int, dtype: torch.dtype) -> None:
        x = torch.empty((2, channels, 200, 336), dtype=dtype, memory_format=torch.channels_last)
        weight = torch.empty((outputs, channels, 3, 3), dtype=dtype)
        convolution(x, weight, torch.empty(outputs), 1, True)

    for dtype in (torch.bfloat16, torch.float16):
        for channels, outputs in ((64, 9), (72, 16), (24, 25)):
            name = f"convolution of {channels}x200x336 to {outputs} channels {dtype}".replace("torch.", "")
            yield Case(name, partial(call, channels, outputs, dtype))
