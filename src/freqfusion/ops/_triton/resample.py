"""Grouped bilinear sampling, and its derivative in the offsets."""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._checks import layout
from freqfusion.ops._triton.launch import launch, tuned, tuning


@triton.jit
def _position(place, offset, fine, coarse, unit):
    """Where a row (or column) of the output reads: the one before, the share of the next, its derivative."""
    position = ((place.to(tl.float32) + 0.5) * unit / fine + offset) * coarse / unit - 0.5
    known = position == position
    last = coarse - 1
    kept = tl.minimum(tl.maximum(tl.where(known, position, 0.0), 0.0), last * 1.0)
    before = tl.floor(kept).to(tl.int32)
    share = tl.where(
        known, kept - before.to(tl.float32), position
    )  # a position unknown gives a value unknown
    slope = tl.where((position > 0) & (position < last), coarse / unit, tl.where(known, 0.0, position))
    return before, share, slope


@tuned([(8, 64, 4), (16, 64, 4), (8, 128, 4), (64, 8, 4)], ["tuning"], ["BLOCK_C", "BLOCK_W"])
@triton.jit(do_not_specialize=["tuning"])
def _forward(
    x,
    offsets,
    out,
    tuning,
    channels,
    groups,
    h,
    w,
    height,
    width,
    unit_height,
    unit_width,
    x_b,
    x_c,
    x_h,
    x_w,
    f_b,
    f_c,
    f_h,
    f_w,
    o_b,
    o_c,
    o_h,
    o_w,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= blocks
    blocks = (width + BLOCK_W - 1) // BLOCK_W
    j = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program //= blocks
    i = program % height + 0 * j
    program //= height
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    valid = j < width
    stored = (c < channels)[:, None] & valid[None, :]
    c = (group * channels + c)[:, None]
    at = offsets + batch * f_b + group * f_c + i.to(tl.int64) * f_h + j.to(tl.int64) * f_w
    dx = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    dy = tl.load(at + tl.cast(groups, tl.int64) * f_c, mask=valid, other=0.0).to(tl.float32)
    left, share_x, _ = _position(j, dx, width, w, unit_width)
    top, share_y, _ = _position(i, dy, height, h, unit_height)
    at = x + batch * x_b + c * x_c + (top.to(tl.int64) * x_h + left.to(tl.int64) * x_w)[None, :]
    right = stored & (left + 1 < w)[None, :]
    below = stored & (top + 1 < h)[None, :]
    share_x = share_x[None, :]
    share_y = share_y[None, :]
    upper = tl.load(at, mask=stored, other=0.0).to(tl.float32) * (1 - share_x)
    upper += tl.load(at + x_w, mask=right, other=0.0).to(tl.float32) * share_x
    lower = tl.load(at + x_h, mask=below, other=0.0).to(tl.float32) * (1 - share_x)
    lower += tl.load(at + x_h + x_w, mask=below & right, other=0.0).to(tl.float32) * share_x
    value = upper * (1 - share_y) + lower * share_y
    at = batch * o_b + c * o_c + (i.to(tl.int64) * o_h + j.to(tl.int64) * o_w)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=stored)


@tuned([(32, 4), (64, 4), (128, 4)], ["tuning"], ["BLOCK_W"])
@triton.jit(do_not_specialize=["tuning"])
def _backward_offsets(
    x,
    offsets,
    grad,
    out,
    tuning,
    channels,
    groups,
    h,
    w,
    height,
    width,
    unit_height,
    unit_width,
    x_b,
    x_c,
    x_h,
    x_w,
    f_b,
    f_c,
    f_h,
    f_w,
    g_b,
    g_c,
    g_h,
    g_w,
    o_b,
    o_c,
    o_h,
    o_w,
    BLOCK_W: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = (width + BLOCK_W - 1) // BLOCK_W
    j = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program //= blocks
    i = program % height + 0 * j
    program //= height
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    valid = j < width
    row = i.to(tl.int64)
    column = j.to(tl.int64)
    second = tl.cast(groups, tl.int64)
    at = offsets + batch * f_b + group * f_c + row * f_h + column * f_w
    dx = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    dy = tl.load(at + second * f_c, mask=valid, other=0.0).to(tl.float32)
    left, share_x, slope_x = _position(j, dx, width, w, unit_width)
    top, share_y, slope_y = _position(i, dy, height, h, unit_height)
    right = valid & (left + 1 < w)
    below = valid & (top + 1 < h)
    at = top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    sent = row * g_h + column * g_w
    x += batch * x_b + group * channels * x_c
    grad += batch * g_b + group * channels * g_c
    along_x = tl.full((BLOCK_W,), 0.0, tl.float32)
    along_y = tl.full((BLOCK_W,), 0.0, tl.float32)
    for _ in tl.range(0, channels, loop_unroll_factor=4):
        incoming = tl.load(grad + sent, mask=valid, other=0.0).to(tl.float32)
        first = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        second_x = tl.load(x + at + x_w, mask=right, other=0.0).to(tl.float32)
        first_y = tl.load(x + at + x_h, mask=below, other=0.0).to(tl.float32)
        second_y = tl.load(x + at + x_h + x_w, mask=right & below, other=0.0).to(tl.float32)
        along_x += incoming * ((second_x - first) * (1 - share_y) + (second_y - first_y) * share_y)
        along_y += incoming * ((first_y - first) * (1 - share_x) + (second_y - second_x) * share_x)
        x += x_c
        grad += g_c
    along_x *= slope_x
    along_y *= slope_y
    at = out + batch * o_b + group * o_c + row * o_h + column * o_w
    tl.store(at, along_x.to(out.dtype.element_ty), mask=valid)
    tl.store(at + second * o_c, along_y.to(out.dtype.element_ty), mask=valid)


def resample(x: Tensor, offsets: Tensor, groups: int, unit_height: int, unit_width: int) -> Tensor:
    """As :func:`freqfusion.ops.resample`."""
    (batch, channels, h, w), (height, width) = x.shape, offsets.shape[-2:]
    out = torch.empty(
        (batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout(x)
    )
    if out.numel() == 0:
        return out
    channels //= groups

    def programs(chosen: dict[str, Any]) -> int:
        tiles = triton.cdiv(width, chosen["BLOCK_W"]) * triton.cdiv(channels, chosen["BLOCK_C"])
        return batch * groups * height * tiles

    launch(
        _forward,
        programs,
        out,
        x,
        offsets,
        out,
        tuning(out, channels),
        channels,
        groups,
        h,
        w,
        height,
        width,
        unit_height,
        unit_width,
        *x.stride(),
        *offsets.stride(),
        *out.stride(),
    )
    return out


def resample_backward_offsets(
    x: Tensor, offsets: Tensor, grad: Tensor, groups: int, unit_height: int, unit_width: int
) -> Tensor:
    """Derivative of :func:`resample` in ``offsets``, of their dtype."""
    (batch, channels, h, w), (height, width) = x.shape, offsets.shape[-2:]
    out = torch.empty(offsets.shape, dtype=offsets.dtype, device=x.device)
    if out.numel():
        launch(
            _backward_offsets,
            lambda chosen: batch * groups * height * triton.cdiv(width, chosen["BLOCK_W"]),
            out,
            x,
            offsets,
            grad,
            out,
            tuning(grad, channels // groups),
            channels // groups,
            groups,
            h,
            w,
            height,
            width,
            unit_height,
            unit_width,
            *x.stride(),
            *offsets.stride(),
            *grad.stride(),
            *out.stride(),
        )
    return out
