"""Grouped bilinear sampling, and its derivatives in the map and in the offsets.

Where channels lie last, a program takes a tile of positions with 64 channels and reads the four neighbours of each;
else the forward pass takes a stretch of one row.

The derivative in the map gathers, so that no sum depends on who comes first. Positions are taken in small tiles, of
which a first kernel notes where they land: the box around their places. A program then makes the gradient of a tile
of the map. It visits those tiles of positions whose box meets its own, and adds the product of their bilinear weights
(pixels, positions) with their gradients (positions, channels). So offsets may be of any size; large ones that differ
among neighbours make boxes large, and cost time, not correctness. A bad gradient (NaN, infinite) reaches, in its
channel, all pixels of those tiles of the map that visit its tile of positions. A bad offset travels no further than
with the naive form.
"""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._checks import layout
from freqfusion.ops._triton import INTERPRETED
from freqfusion.ops._triton.launch import Configuration, Launch, launch
from freqfusion.ops._triton.registry import Case
from freqfusion.ops._triton.tiles import (
    aligned,
    alignment,
    compiled,
    described,
    is_last,
    is_wide,
    small,
    tile,
    tile_of_last,
)


@triton.jit
def _place(index, offset, fine, coarse, unit):
    """Where a row or column of the output reads, within the map, and the derivative of that in the offset.

    The place of an unknown (NaN) position is 0; the derivative is NaN then.
    """
    position = ((index.to(tl.float32) + 0.5) * unit / fine + offset) * coarse / unit - 0.5
    known = position == position
    last = coarse - 1
    kept = tl.minimum(tl.maximum(tl.where(known, position, 0.0), 0.0), last * 1.0)
    slope = tl.where((position > 0) & (position < last), coarse / unit, tl.where(known, 0.0, position))
    return kept, slope


@triton.jit
def _lower(kept, slope):
    """The neighbour before a place, and the share of the one after; NaN for an unknown position."""
    before = tl.floor(kept)
    return before.to(tl.int32), tl.where(slope == slope, kept - before, slope)


@triton.jit
def _prediction(fine, coarse, i, j, valid, number, f_c, s_c, s_h, s_w):
    """Of positions, what both resolutions say in the channel ``number`` after that of ``fine`` and ``coarse``."""
    number = tl.cast(number, tl.int64)
    mine = tl.load(fine + number * f_c, mask=valid, other=0.0).to(tl.float32)
    at = coarse + (4 * number + (i % 2 * 2 + j % 2)) * s_c
    at += (i // 2).to(tl.int64) * s_h + (j // 2).to(tl.int64) * s_w
    return mine + tl.load(at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _displacement(
    offsets, coarse, i, j, valid, groups, f_c, f_h, f_w, s_c, s_h, s_w, DIRECTED: tl.constexpr
):  # fmt: skip
    """Of positions along x and y; if DIRECTED, also the directions and the magnitudes that these are products of."""
    at = offsets + i.to(tl.int64) * f_h + j.to(tl.int64) * f_w
    if DIRECTED:
        direction_x = _prediction(at, coarse, i, j, valid, 0, f_c, s_c, s_h, s_w)
        direction_y = _prediction(at, coarse, i, j, valid, groups, f_c, s_c, s_h, s_w)
        magnitude_x = tl.sigmoid(_prediction(at, coarse, i, j, valid, 2 * groups, f_c, s_c, s_h, s_w))
        magnitude_y = tl.sigmoid(_prediction(at, coarse, i, j, valid, 3 * groups, f_c, s_c, s_h, s_w))
        dx = direction_x * magnitude_x
        dy = direction_y * magnitude_y
    else:
        dx = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(at + tl.cast(groups, tl.int64) * f_c, mask=valid, other=0.0).to(tl.float32)
        direction_x = dx
        direction_y = dy
        magnitude_x = dx
        magnitude_y = dy
    return dx, dy, direction_x, direction_y, magnitude_x, magnitude_y


@triton.jit
def _neighbours(
    dx, dy, i, j, valid, h, w, height, width, unit_height, unit_width, x_h, x_w, WIDE: tl.constexpr
):  # fmt: skip
    """Of positions: where their upper left neighbour lies, what the others share, where these exist, derivatives."""
    column, slope_x = _place(j, dx, width, w, unit_width)
    row, slope_y = _place(i, dy, height, h, unit_height)
    left, share_x = _lower(column, slope_x)
    top, share_y = _lower(row, slope_y)
    right = valid & (left + 1 < w)
    below = valid & (top + 1 < h)
    if WIDE:
        at = top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    else:
        at = top * x_h + left * x_w
    return at, share_x, share_y, right, below, slope_x, slope_y


@triton.jit
def _program_tile(
    program, groups, height, width, TH: tl.constexpr, TW: tl.constexpr, RUN: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """Rows, columns, group and image of a program. Where channels lie last, groups of a pixel are neighbours too."""
    if LAST:
        group = program % groups
        i, j, image = tile(program // groups, height, width, TH, TW, RUN)
    else:
        i, j, program = tile(program, height, width, TH, TW, RUN)
        group = program % groups
        image = program // groups
    return i, j, group.to(tl.int64), image.to(tl.int64)


@compiled
def _forward_last(
    x, offsets, coarse, out, channels, groups, h, w, height, width, unit_height, unit_width,
    x_b, x_c, x_h, x_w, f_b, f_c, f_h, f_w, s_b, s_c, s_h, s_w, o_b, o_c, o_h, o_w,
    DIRECTED: tl.constexpr, ALIGN: tl.constexpr, OUT_LAST: tl.constexpr, ALIGN_OUT: tl.constexpr,
    WIDE: tl.constexpr, EVEN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A tile of positions and BC channels of one group."""
    channels = aligned(channels, ALIGN)
    x_b = aligned(x_b, ALIGN)
    x_h = aligned(x_h, ALIGN)
    x_w = aligned(x_w, ALIGN)
    o_b = aligned(o_b, ALIGN_OUT)
    o_h = aligned(o_h, ALIGN_OUT)
    if OUT_LAST:
        o_w = aligned(o_w, ALIGN_OUT)
    else:
        o_c = aligned(o_c, ALIGN_OUT)
    program = tl.program_id(0)
    blocks = (channels + BC - 1) // BC
    c = (program % blocks * BC + tl.arange(0, BC))[:, None]
    i, j, group, image = _program_tile(program // blocks, groups, height, width, TH, TW, RUN, True)
    valid = (i < height) & (j < width)
    offsets += image * f_b + group * f_c
    if DIRECTED:
        coarse += image * s_b + 4 * group * s_c
    dx, dy, _, _, _, _ = _displacement(
        offsets, coarse, i, j, valid, groups, f_c, f_h, f_w, s_c, s_h, s_w, DIRECTED
    )  # fmt: skip
    at, share_x, share_y, right, below, _, _ = _neighbours(
        dx, dy, i, j, valid, h, w, height, width, unit_height, unit_width, x_h, x_w, WIDE
    )  # fmt: skip
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    stored = valid[None, :]
    right = right[None, :]
    below = below[None, :]
    if not EVEN:
        real = c < channels
        stored &= real
        right &= real
        below &= real
    share_x = share_x[None, :]
    share_y = share_y[None, :]
    place = x + image * x_b + group * channels * x_c + (c * x_c + at[None, :])
    value = tl.load(place, mask=stored, other=0.0).to(tl.float32) * ((1 - share_x) * (1 - share_y))
    value += tl.load(place + x_w, mask=right, other=0.0).to(tl.float32) * (share_x * (1 - share_y))
    place += x_h
    value += tl.load(place, mask=below, other=0.0).to(tl.float32) * ((1 - share_x) * share_y)
    value += tl.load(place + x_w, mask=right & below, other=0.0).to(tl.float32) * (share_x * share_y)
    place = out + image * o_b + group * channels * o_c + (c * o_c + (i * o_h + j * o_w)[None, :])
    tl.store(place, value.to(out.dtype.element_ty), mask=stored)


@compiled
def _forward_rows(
    x, offsets, coarse, out, channels, groups, h, w, height, width, unit_height, unit_width,
    x_b, x_c, x_h, x_w, f_b, f_c, f_h, f_w, s_b, s_c, s_h, s_w, o_b, o_c, o_h, o_w,
    DIRECTED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
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
    offsets += batch * f_b + group * f_c
    if DIRECTED:
        coarse += batch * s_b + 4 * group * s_c
    dx, dy, _, _, _, _ = _displacement(
        offsets, coarse, i, j, valid, groups, f_c, f_h, f_w, s_c, s_h, s_w, DIRECTED
    )  # fmt: skip
    at, share_x, share_y, right, below, _, _ = _neighbours(
        dx, dy, i, j, valid, h, w, height, width, unit_height, unit_width, x_h, x_w, True
    )  # fmt: skip
    stored = (c < channels)[:, None] & valid[None, :]
    c = (group * channels + c)[:, None]
    at = x + batch * x_b + c * x_c + at[None, :]
    right = stored & right[None, :]
    below = stored & below[None, :]
    share_x = share_x[None, :]
    share_y = share_y[None, :]
    upper = tl.load(at, mask=stored, other=0.0).to(tl.float32) * (1 - share_x)
    upper += tl.load(at + x_w, mask=right, other=0.0).to(tl.float32) * share_x
    lower = tl.load(at + x_h, mask=below, other=0.0).to(tl.float32) * (1 - share_x)
    lower += tl.load(at + x_h + x_w, mask=below & right, other=0.0).to(tl.float32) * share_x
    value = upper * (1 - share_y) + lower * share_y
    at = batch * o_b + c * o_c + (i.to(tl.int64) * o_h + j.to(tl.int64) * o_w)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _store_both(fine, coarse, value, valid):
    tl.store(fine, value.to(fine.dtype.element_ty), mask=valid)
    tl.store(coarse, value.to(coarse.dtype.element_ty), mask=valid)


FAR = tl.constexpr(1 << 29)
"""Beyond any row or column."""


@triton.jit
def _least(value, TH: tl.constexpr, TW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr):
    """Of each tile of SH x SW positions among TH x TW."""
    value = tl.min(tl.reshape(value, (TH // SH, SH, TW // SW, SW)), axis=3)
    return tl.min(value, axis=1)


@triton.jit
def _land(
    places, boxes, plane, i, j, valid, dx, dy, h, w, height, width, unit_height, unit_width,
    TH: tl.constexpr, TW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """Write where TH x TW positions land, in tiles of SH x SW: see :func:`_landing_maps`."""
    tile_rows = (height + SH - 1) // SH
    tile_columns = (width + SW - 1) // SW
    first = plane * tile_rows
    column, slope_x = _place(j, dx, width, w, unit_width)
    row, slope_y = _place(i, dy, height, h, unit_height)
    known = (slope_x == slope_x) & (slope_y == slope_y)
    at = ((first + i // SH) * tile_columns + j // SW) * (2 * SH * SW) + (i % SH * SW + j % SW)
    exists = (i // SH < tile_rows) & (j // SW < tile_columns)
    # beyond the output a position lies far from all pixels
    tl.store(places + at, tl.where(valid, row, -1.0 * FAR), mask=exists)
    tl.store(places + at + SH * SW, tl.where(known, column, -1.0 - column), mask=exists)

    last_row = tl.where(known, tl.ceil(row), row + 1).to(tl.int32)
    last_column = tl.where(known, tl.ceil(column), column + 1).to(tl.int32)
    t = tl.arange(0, TH // SH)[:, None] + tl.min(i, axis=0) // SH
    u = tl.arange(0, TW // SW)[None, :] + tl.min(j, axis=0) // SW
    at = boxes + (first + t) * (4 * tile_columns) + u
    exists = (t < tile_rows) & (u < tile_columns)
    box = _least(tl.where(valid, tl.floor(row).to(tl.int32), FAR), TH, TW, SH, SW)
    tl.store(at, box, mask=exists)
    box = _least(tl.where(valid, -last_row, FAR), TH, TW, SH, SW)
    tl.store(at + tile_columns, box, mask=exists)
    box = _least(tl.where(valid, tl.floor(column).to(tl.int32), FAR), TH, TW, SH, SW)
    tl.store(at + 2 * tile_columns, box, mask=exists)
    box = _least(tl.where(valid, -last_column, FAR), TH, TW, SH, SW)
    tl.store(at + 3 * tile_columns, box, mask=exists)


@compiled
def _landing(
    offsets, places, boxes, groups, h, w, height, width, unit_height, unit_width, f_b, f_c, f_h, f_w,
    SH: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """Where a tile of positions lands, if no kernel beside needs it."""
    i, j, group, image = _program_tile(tl.program_id(0), groups, height, width, SH, SW, 0, False)
    valid = (i < height) & (j < width)
    dx, dy, _, _, _, _ = _displacement(
        offsets + image * f_b + group * f_c, offsets, i, j, valid, groups, f_c, f_h, f_w, 0, 0, 0, False
    )  # fmt: skip
    _land(
        places, boxes, image * groups + group, i, j, valid, dx, dy, h, w, height, width, unit_height, unit_width,
        SH, SW, SH, SW,
    )  # fmt: skip


@compiled
def _backward_offsets(
    x, offsets, coarse, grad, out, in_coarse, places, boxes,
    channels, groups, h, w, height, width, unit_height, unit_width,
    x_b, x_c, x_h, x_w, f_b, f_c, f_h, f_w, s_b, s_c, s_h, s_w, g_b, g_c, g_h, g_w, o_b, o_c, o_h, o_w,
    r_b, r_c, r_h, r_w,
    DIRECTED: tl.constexpr, LANDS: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
    GRAD_LAST: tl.constexpr, ALIGN_GRAD: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """A tile of positions and all channels of one group. If LANDS, also where they land."""
    if LAST:
        channels = aligned(channels, ALIGN)
        x_b = aligned(x_b, ALIGN)
        x_h = aligned(x_h, ALIGN)
        x_w = aligned(x_w, ALIGN)
        g_b = aligned(g_b, ALIGN_GRAD)
        g_h = aligned(g_h, ALIGN_GRAD)
        if GRAD_LAST:
            g_w = aligned(g_w, ALIGN_GRAD)
        else:
            g_c = aligned(g_c, ALIGN_GRAD)
    i, j, group, image = _program_tile(tl.program_id(0), groups, height, width, TH, TW, RUN, LAST)
    valid = (i < height) & (j < width)
    offsets += image * f_b + group * f_c
    if DIRECTED:
        coarse += image * s_b + 4 * group * s_c
    dx, dy, direction_x, direction_y, magnitude_x, magnitude_y = _displacement(
        offsets, coarse, i, j, valid, groups, f_c, f_h, f_w, s_c, s_h, s_w, DIRECTED
    )  # fmt: skip
    at, share_x, share_y, right, below, slope_x, slope_y = _neighbours(
        dx, dy, i, j, valid, h, w, height, width, unit_height, unit_width, x_h, x_w, WIDE
    )  # fmt: skip
    if LANDS:
        _land(
            places, boxes, image * groups + group, i, j, valid, dx, dy, h, w, height, width, unit_height, unit_width,
            TH, TW, SH, SW,
        )  # fmt: skip
    x += image * x_b + group * channels * x_c
    grad += image * g_b + group * channels * g_c
    c = tl.arange(0, BC)
    if WIDE:
        c = c.to(tl.int64)
        source = i.to(tl.int64) * g_h + j.to(tl.int64) * g_w
    else:
        source = i * g_h + j * g_w
    if LAST:  # a thread has few channels of its pixels: the sum over threads comes last
        along_x = tl.zeros((BC, TH * TW), tl.float32)
        along_y = tl.zeros((BC, TH * TW), tl.float32)
    else:
        along_x = tl.zeros((TH * TW,), tl.float32)
        along_y = tl.zeros((TH * TW,), tl.float32)
    for start in tl.range(0, channels, BC):
        channel = (c + start)[:, None]
        mask = valid[None, :]
        mask_right = right[None, :]
        mask_below = below[None, :]
        if not EVEN:
            real = channel < channels
            mask &= real
            mask_right &= real
            mask_below &= real
        incoming = tl.load(grad + (channel * g_c + source[None, :]), mask=mask, other=0.0).to(tl.float32)
        place = x + (channel * x_c + at[None, :])
        upper_left = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        upper_right = tl.load(place + x_w, mask=mask_right, other=0.0).to(tl.float32)
        place += x_h
        lower_left = tl.load(place, mask=mask_below, other=0.0).to(tl.float32)
        lower_right = tl.load(place + x_w, mask=mask_right & mask_below, other=0.0).to(tl.float32)
        first = upper_right - upper_left
        second = lower_right - lower_left
        more_x = incoming * (first + (second - first) * share_y[None, :])
        first = lower_left - upper_left
        second = lower_right - upper_right
        more_y = incoming * (first + (second - first) * share_x[None, :])
        if LAST:
            along_x += more_x
            along_y += more_y
        else:
            along_x += tl.sum(more_x, axis=0)
            along_y += tl.sum(more_y, axis=0)
    if LAST:
        along_x = tl.sum(along_x, axis=0)
        along_y = tl.sum(along_y, axis=0)
    along_x *= slope_x
    along_y *= slope_y
    place = out + image * o_b + group * o_c + (i.to(tl.int64) * o_h + j.to(tl.int64) * o_w)
    step = tl.cast(groups, tl.int64) * o_c
    if DIRECTED:
        sub = in_coarse + image * r_b + (4 * group + (i % 2 * 2 + j % 2)) * r_c
        sub += (i // 2).to(tl.int64) * r_h + (j // 2).to(tl.int64) * r_w
        step_coarse = tl.cast(groups, tl.int64) * (4 * r_c)
        _store_both(place, sub, along_x * magnitude_x, valid)
        _store_both(place + step, sub + step_coarse, along_y * magnitude_y, valid)
        along_x *= direction_x * magnitude_x * (1 - magnitude_x)
        along_y *= direction_y * magnitude_y * (1 - magnitude_y)
        _store_both(place + 2 * step, sub + 2 * step_coarse, along_x, valid)
        _store_both(place + 3 * step, sub + 3 * step_coarse, along_y, valid)
    else:
        tl.store(place, along_x.to(out.dtype.element_ty), mask=valid)
        tl.store(place + step, along_y.to(out.dtype.element_ty), mask=valid)


SEARCHED = 64
"""Boxes of tiles that are looked through at once."""


@triton.jit
def _span(first, last, count, other_first, other_last, other_count):
    return tl.minimum(first, other_first), tl.maximum(last, other_last), count + other_count


@triton.jit
def _hit(hit, number, count):
    """The first and last of the numbers that are hit, or ``count`` and -1, and how many are."""
    return tl.reduce(
        (tl.where(hit, number, count), tl.where(hit, number, -1), hit.to(tl.int32)), axis=0, combine_fn=_span
    )


@triton.jit
def _weight(pixel, place, known, unknown: tl.constexpr):
    """Bilinear weights (pixels, positions) along one axis; ``unknown`` at both neighbours of a place not known."""
    away = pixel.to(tl.float32)[:, None] - place[None, :]
    beside = tl.where((away > -1) & (away <= 1), unknown, 0.0)
    return tl.where(known[None, :], tl.maximum(1.0 - tl.abs(away), 0.0), beside)


@triton.jit
def _add_product(weights, values, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        weights = weights.to(tl.float32)
        values = values.to(tl.float32)
    return tl.dot(weights, values, total, input_precision=PRECISION)


@compiled
def _gather(
    places, boxes, row_boxes, grad, out, channels, groups, h, w, height, width,
    g_b, g_c, g_h, g_w, o_b, o_c, o_h, o_w, tile_rows, tile_columns,
    LAST: tl.constexpr, ALIGN: tl.constexpr, OUT_LAST: tl.constexpr, ALIGN_OUT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr, CHUNK: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of TH x TW pixels of the map and BC channels of one group.

    SPLIT: weights as the sum of two numbers of the gradients' dtype, so that their rounding adds nothing.
    WIDEN: products in float32, for Triton's interpreter multiplies the bits of bfloat16.
    """
    K: tl.constexpr = SH * SW
    M: tl.constexpr = TH * TW
    g_b = aligned(g_b, ALIGN)
    g_h = aligned(g_h, ALIGN)
    if LAST:
        channels = aligned(channels, ALIGN)
        g_w = aligned(g_w, ALIGN)
    else:
        width = aligned(width, ALIGN)
        g_c = aligned(g_c, ALIGN)
    o_b = aligned(o_b, ALIGN_OUT)
    o_h = aligned(o_h, ALIGN_OUT)
    if OUT_LAST:
        channels = aligned(channels, ALIGN_OUT)
        o_w = aligned(o_w, ALIGN_OUT)
    else:
        o_c = aligned(o_c, ALIGN_OUT)
    program = tl.program_id(0)
    blocks = (channels + BC - 1) // BC
    c = program % blocks * BC + tl.arange(0, BC)
    i, j, group, image = _program_tile(program // blocks, groups, h, w, TH, TW, 0, LAST)
    top = tl.min(i, axis=0)
    left = tl.min(j, axis=0)
    plane = image * groups + group
    places += plane * tile_rows * tile_columns * (2 * K)
    boxes += plane * tile_rows * 4 * tile_columns
    row_boxes += plane * 2 * tile_rows

    k = tl.arange(0, K)
    grad += image * g_b + group * channels * g_c
    real = c < channels
    if WIDE:
        c = c.to(tl.int64)
        i = i.to(tl.int64)
        j = j.to(tl.int64)
        within = (k // SW).to(tl.int64) * g_h + (k % SW).to(tl.int64) * g_w
    else:
        within = (k // SW) * g_h + (k % SW) * g_w
    tile_i = top + tl.arange(0, TH)
    tile_j = left + tl.arange(0, TW)
    total = tl.zeros((M, BC), tl.float32)

    # rows of tiles of positions that land here, then of each the tiles
    first_row = tile_rows
    last_row = -1
    for start in tl.range(0, tile_rows, CHUNK):
        n = start + tl.arange(0, CHUNK)
        above = tl.load(row_boxes + 2 * n, mask=n < tile_rows, other=FAR)
        under = tl.load(row_boxes + 2 * n + 1, mask=n < tile_rows, other=FAR)
        first, last, _ = _hit((above < top + TH) & (under <= -top), n, tile_rows)
        first_row = tl.minimum(first_row, first)
        last_row = tl.maximum(last_row, last)
    for row in range(first_row, last_row + 1):
        row_of_boxes = boxes + tl.cast(row, tl.int64) * (4 * tile_columns)
        first_column = tile_columns
        last_column = -1
        hits = 0
        for start in tl.range(0, tile_columns, CHUNK):
            n = start + tl.arange(0, CHUNK)
            exists = n < tile_columns
            y0 = tl.load(row_of_boxes + n, mask=exists, other=FAR)
            y1 = tl.load(row_of_boxes + tile_columns + n, mask=exists, other=FAR)
            x0 = tl.load(row_of_boxes + 2 * tile_columns + n, mask=exists, other=FAR)
            x1 = tl.load(row_of_boxes + 3 * tile_columns + n, mask=exists, other=FAR)
            hit = (y0 < top + TH) & (y1 <= -top) & (x0 < left + TW) & (x1 <= -left)
            first, last, more = _hit(hit, n, tile_columns)
            first_column = tl.minimum(first_column, first)
            last_column = tl.maximum(last_column, last)
            hits += more
        gaps = hits <= last_column - first_column
        for column in range(first_column, last_column + 1):
            lands = first_column >= 0
            if gaps:  # some tile between the first and the last does not land here
                box = row_of_boxes + column
                y0 = tl.load(box)
                y1 = tl.load(box + tile_columns)
                x0 = tl.load(box + 2 * tile_columns)
                x1 = tl.load(box + 3 * tile_columns)
                lands = (y0 < top + TH) & (y1 <= -top) & (x0 < left + TW) & (x1 <= -left)
            if lands:
                at = places + (tl.cast(row, tl.int64) * tile_columns + column) * (2 * K) + k
                place_x = tl.load(at + K)
                known = place_x >= 0
                weight_y = _weight(tile_i, tl.load(at), known, 1.0)[:, None, :]
                weight_x = _weight(tile_j, tl.where(known, place_x, -1.0 - place_x), known, float("nan"))[
                    None, :, :
                ]
                weights = tl.where(weight_y > 0, weight_y * weight_x, 0.0)
                weights = tl.reshape(weights, (M, K))
                exists = (row * SH + k // SW < height) & (column * SW + k % SW < width)
                if WIDE:
                    corner = tl.cast(row, tl.int64) * SH * g_h + tl.cast(column, tl.int64) * SW * g_w
                else:
                    corner = row * SH * g_h + column * SW * g_w
                if LAST:
                    at = grad + (corner + within[:, None] + (c * g_c)[None, :])
                    values = tl.load(at, mask=exists[:, None] & real[None, :], other=0.0)
                else:
                    at = grad + (corner + (c * g_c)[:, None] + within[None, :])
                    values = tl.trans(tl.load(at, mask=real[:, None] & exists[None, :], other=0.0))
                rounded = weights.to(values.dtype)
                total = _add_product(rounded, values, total, PRECISION, WIDEN)
                if SPLIT:
                    rest = (weights - rounded.to(tl.float32)).to(values.dtype)
                    total = _add_product(rest, values, total, PRECISION, WIDEN)

    out += image * o_b + group * channels * o_c
    at = out + ((i * o_h + j * o_w)[:, None] + (c * o_c)[None, :])
    valid = (i < h) & (j < w)
    tl.store(at, total.to(out.dtype.element_ty), mask=valid[:, None] & real[None, :])


def _of_tiles(planes: int, height: int, width: int, channels: int, chosen: Configuration) -> int:
    """Programs: one for each tile of each plane and each block of channels."""
    tiles = triton.cdiv(height, chosen["TH"]) * triton.cdiv(width, chosen["TW"])
    return planes * tiles * triton.cdiv(channels, chosen["BC"])


def resample(
    x: Tensor,
    offsets: Tensor,
    groups: int,
    unit_height: int,
    unit_width: int,
    coarse: Tensor | None = None,
    memory: torch.memory_format | None = None,
) -> Tensor:
    """As :func:`freqfusion.ops.resample`; in the layout ``memory`` or that of ``x``.

    With ``coarse``, as :func:`freqfusion.ops.resample.directed.directed_resample`; then ``offsets`` are its ``fine``,
    here and below.
    """
    shape = (*x.shape[:2], *offsets.shape[-2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory or layout(x))
    if out.numel():
        last = is_last(x)
        kernel, prepare = (_forward_last, _last_launch) if last else (_forward_rows, _rows_launch)
        launch(kernel, (x, offsets, coarse, out), prepare, groups, unit_height, unit_width)
    return out


def _last_launch(
    x: Tensor, offsets: Tensor, coarse: Tensor | None, out: Tensor, groups: int, *unit: int
) -> Launch:
    batch, channels, height, width = out.shape
    channels //= groups
    out_last = is_last(out)
    align = alignment(True, channels, x, *([out] if out_last else []))
    size = tile_of_last(channels, align)
    if not out_last:  # long rows
        size |= {"TH": 2, "TW": size["TH"] * size["TW"] // 2}
    return Launch(
        partial(_of_tiles, batch * groups, height, width, channels),
        _forward_numbers(x, offsets, coarse, out, groups, *unit),
        [size | {"num_warps": 4}],
        {
            "DIRECTED": coarse is not None,
            "ALIGN": align,
            "OUT_LAST": out_last,
            "ALIGN_OUT": align if out_last else alignment(False, width, out),
            "WIDE": is_wide(x, out),
            "EVEN": channels % size["BC"] == 0,
        },
    )


def _rows_launch(
    x: Tensor, offsets: Tensor, coarse: Tensor | None, out: Tensor, groups: int, *unit: int
) -> Launch:
    batch, channels, height, width = out.shape

    def programs(chosen: Configuration) -> int:
        tiles = triton.cdiv(width, chosen["BLOCK_W"]) * triton.cdiv(channels // groups, chosen["BLOCK_C"])
        return batch * groups * height * tiles

    choices = small(
        [
            {"BLOCK_C": block, "BLOCK_W": columns, "num_warps": 4}
            for block, columns in ((8, 64), (16, 64), (8, 128), (64, 8))
        ]
    )
    numbers = _forward_numbers(x, offsets, coarse, out, groups, *unit)
    return Launch(programs, numbers, choices, {"DIRECTED": coarse is not None})


def _forward_numbers(
    x: Tensor, offsets: Tensor, coarse: Tensor | None, out: Tensor, groups: int, *unit: int
) -> list[int]:
    sizes = (x.shape[1] // groups, groups, *x.shape[-2:], *out.shape[-2:], *unit)
    return [*sizes, *x.stride(), *offsets.stride(), *_strides(coarse), *out.stride()]


def _strides(x: Tensor | None) -> Sequence[int]:
    return (0, 0, 0, 0) if x is None else x.stride()


def resample_backward_offsets(
    x: Tensor, offsets: Tensor, grad: Tensor, groups: int, unit_height: int, unit_width: int
) -> Tensor:
    """Derivative of :func:`resample` in ``offsets``, of their dtype."""
    out = torch.empty(offsets.shape, dtype=offsets.dtype, device=x.device)
    if out.numel():
        tensors = (x, offsets, None, grad, out, None, None, None)
        launch(_backward_offsets, tensors, _offsets_launch, groups, unit_height, unit_width, None)
    return out


def directed_backward(
    x: Tensor, fine: Tensor, coarse: Tensor, grad: Tensor, groups: int, unit_height: int, unit_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of :func:`resample` in all three maps, of their layouts and dtypes; that in ``x`` of ``grad``'s."""
    in_fine, in_coarse = torch.empty_like(fine), torch.empty_like(coarse)
    in_x = torch.empty(x.shape, dtype=grad.dtype, device=x.device, memory_format=layout(x))
    if grad.numel() == 0:
        return in_x.zero_(), in_fine.zero_(), in_coarse.zero_()
    maps, tile = _landing_maps(grad, groups), _positions_tile(grad, groups)
    tensors = (x, fine, coarse, grad, in_fine, in_coarse, *maps)
    launch(_backward_offsets, tensors, _offsets_launch, groups, unit_height, unit_width, tile)
    return _gathered(in_x, *maps, grad, groups), in_fine, in_coarse


def _offsets_launch(
    x: Tensor,
    offsets: Tensor,
    coarse: Tensor | None,
    grad: Tensor,
    out: Tensor,
    in_coarse: Tensor | None,
    places: Tensor | None,
    boxes: Tensor | None,
    groups: int,
    unit_height: int,
    unit_width: int,
    landing: tuple[int, int] | None,
) -> Launch:
    (batch, channels, h, w), (height, width) = x.shape, offsets.shape[-2:]
    channels //= groups
    last, grad_last = is_last(x), is_last(grad)
    align = alignment(True, channels, x, *([grad] if grad_last else [])) if last else 1
    rows, columns = landing or (2, 16)
    if last:
        values = 512 if align < 4 else 1024 if x.dtype == torch.float32 else 2048
        block = min(values // 32, max(16, triton.next_power_of_2(channels)))
        tile = (4, 8) if grad_last else (rows, columns)
        size = {"TH": tile[0], "TW": tile[1], "BC": block, "RUN": 0, "num_warps": 4}
    else:
        size = {"TH": 4, "TW": 16, "BC": 8, "RUN": 1, "num_warps": 4}
    sizes = (channels, groups, h, w, height, width, unit_height, unit_width)
    return Launch(
        lambda chosen: _of_tiles(batch * groups, height, width, 1, chosen),
        [
            *(*sizes, *x.stride(), *offsets.stride(), *_strides(coarse)),
            *(*grad.stride(), *out.stride(), *_strides(in_coarse)),
        ],
        small([size]),
        {
            "DIRECTED": coarse is not None,
            "LANDS": landing is not None,
            "LAST": last,
            "ALIGN": align,
            "GRAD_LAST": grad_last,
            "ALIGN_GRAD": align if grad_last else alignment(False, width, grad),
            "WIDE": is_wide(x, grad),
            "EVEN": channels % size["BC"] == 0,
            "SH": rows,
            "SW": columns,
        },
    )


def resample_backward_x(
    offsets: Tensor, grad: Tensor, size: Sequence[int], groups: int, unit_height: int, unit_width: int
) -> Tensor:
    """Derivative of :func:`resample` in ``x`` ``(B, C, h, w)``, of the dtype and layout of ``grad``.

    It is the same in every run.
    """
    shape = (*grad.shape[:2], *size)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout(grad))
    if grad.numel() == 0:
        return out.zero_()
    maps, tile = _landing_maps(grad, groups), _positions_tile(grad, groups)
    launch(_landing, (offsets, *maps), _landing_launch, groups, *size, unit_height, unit_width, *tile)
    return _gathered(out, *maps, grad, groups)


def _positions_tile(grad: Tensor, groups: int) -> tuple[int, int]:
    size = _gather_size(grad, groups)
    return size["SH"], size["SW"]


def _landing_maps(grad: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """For where positions land, which are cut into tiles of ``K`` (``rows`` x ``columns`` of them).

    Kept for each image and group are: their places ``(rows, columns, 2, K)``, float32, first along y, then along x,
    there minus one minus the place where an offset is NaN; and the first row where a tile lands, minus the last one,
    the first column and minus the last one ``(rows, 4, columns)``, int32.
    """
    tile = _positions_tile(grad, groups)
    rows, columns = (triton.cdiv(side, step) for side, step in zip(grad.shape[2:], tile, strict=True))
    planes, positions = grad.shape[0] * groups, tile[0] * tile[1]
    places = torch.empty((planes, rows, columns, 2, positions), dtype=torch.float32, device=grad.device)
    return places, torch.empty((planes, rows, 4, columns), dtype=torch.int32, device=grad.device)


def _gathered(out: Tensor, places: Tensor, boxes: Tensor, grad: Tensor, groups: int) -> Tensor:
    """``out``, filled; whole rows of tiles are looked through first."""
    row_boxes = boxes[:, :, :2].amin(3)
    launch(_gather, (places, boxes, row_boxes, grad, out), _gather_launch, groups)
    return out


def _gather_size(grad: Tensor, groups: int) -> Configuration:
    """Tiles of the map (``TH`` x ``TW`` pixels, ``BC`` channels) and of positions (``SH`` x ``SW``)."""
    last, single = is_last(grad), grad.dtype == torch.float32
    # fewer registers where rows are read one by one
    if not last and _map_alignment(grad, groups) == 1:
        size = {"TH": 8, "TW": 8, "SH": 4, "SW": 8, "num_warps": 4}
    elif last:
        size = {"TH": 4, "TW": 4 if single else 16, "SH": 4, "SW": 8, "num_warps": 4}
    elif single:
        size = {"TH": 4, "TW": 16, "SH": 4, "SW": 8, "num_warps": 4}
    else:
        size = {"TH": 8, "TW": 16, "SH": 2, "SW": 16, "num_warps": 4}
    (size,) = small([size | {"BC": min(64, max(16, triton.next_power_of_2(grad.shape[1] // groups)))}])
    return size


def _map_alignment(x: Tensor, groups: int) -> int:
    last = is_last(x)
    return alignment(last, x.shape[1] // groups if last else x.shape[3], x)


def _landing_launch(
    offsets: Tensor,
    places: Tensor,
    boxes: Tensor,
    groups: int,
    h: int,
    w: int,
    unit_height: int,
    unit_width: int,
    rows_of_tile: int,
    columns_of_tile: int,
) -> Launch:
    sizes = (groups, h, w, *offsets.shape[-2:], unit_height, unit_width)
    programs = prod(places.shape[:3])
    return Launch(
        lambda _: programs,
        [*sizes, *offsets.stride()],
        [{"SH": rows_of_tile, "SW": columns_of_tile, "num_warps": 1}],
        {},
    )


def _gather_launch(
    places: Tensor, boxes: Tensor, row_boxes: Tensor, grad: Tensor, out: Tensor, groups: int
) -> Launch:
    planes, rows, columns = places.shape[:3]
    (channels, h, w), (height, width) = out.shape[1:], grad.shape[-2:]
    channels //= groups
    bfloat16 = grad.dtype == torch.bfloat16
    constants = {
        "LAST": is_last(grad),
        "ALIGN": _map_alignment(grad, groups),
        "OUT_LAST": is_last(out),
        "ALIGN_OUT": _map_alignment(out, groups),
        "WIDE": is_wide(grad, out),
        "PRECISION": "tf32x3" if grad.dtype == torch.float32 else "ieee",
        "SPLIT": bfloat16,
        "WIDEN": bfloat16 and INTERPRETED,
        "CHUNK": SEARCHED,
    }
    return Launch(
        partial(_of_tiles, planes, h, w, channels),
        [channels, groups, h, w, height, width, *grad.stride(), *out.stride(), rows, columns],
        [_gather_size(grad, groups)],
        constants,
    )


def explain(x: Tensor, groups: int) -> str:
    """Which kernels serve, and why not faster ones."""
    last = is_last(x)
    return described(last, alignment(True, x.shape[1] // groups, x) if last else 1)


def cases() -> Iterator[Case]:
    def call(dtype: torch.dtype, order: torch.memory_format, channels: int, groups: int, width: int) -> None:
        x, grad = (torch.empty((2, channels, 200, width), dtype=dtype, memory_format=order) for _ in range(2))
        offsets = torch.empty((2, 2 * groups, 200, width), dtype=dtype)
        resample(x, offsets, groups, 100, 168)
        resample_backward_offsets(x, offsets, grad, groups, 100, 168)
        resample_backward_x(offsets, grad, (200, width), groups, 100, 168)
        if width % 2 == 0:
            fine, coarse = (
                torch.empty((2, n * groups, *sides), dtype=dtype, memory_format=order)
                for n, sides in ((4, (200, width)), (16, (100, width // 2)))
            )
            resample(x, fine, groups, 100, 168, coarse)
            directed_backward(x, fine, coarse, grad, groups, 100, 168)
            other = torch.channels_last if order == torch.contiguous_format else torch.contiguous_format
            out = resample(x, fine, groups, 100, 168, coarse, other)
            directed_backward(x, fine, coarse, out, groups, 100, 168)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for order in (torch.contiguous_format, torch.channels_last):
            for channels, groups, width in ((256, 4, 336), (64, 4, 336), (42, 2, 335)):
                name = f"resample {channels}x200x{width} in {groups} {dtype} {order}".replace("torch.", "")
                yield Case(name, partial(call, dtype, order, channels, groups, width))
