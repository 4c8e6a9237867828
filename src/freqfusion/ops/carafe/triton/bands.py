"""The reassembly and its derivatives as banded products on tensor cores.

Neighbouring coarse pixels share most of their windows. A program takes a tile of coarse pixels with all fine pixels
that are centred there, M of them, and the N coarse pixels of all their windows:

    forward               out[M, C] = W[M, N] X[N, C]     W has the kernels of a fine pixel at its window's places
    gradient in kernels   S[M, N] = G[M, C] X[N, C]^T     of which the window's places are the gradient
    gradient in x         dX[M, C] = W[M, N] G[N, C]      here M coarse pixels, N fine ones whose windows hold them

W is made once per tile, then a loop runs over the channels (in the last, over fine rows). Products are of the dtype
of the maps, float32 ones in three TF32 products each, and weights with more digits than the map in two parts. Sums
are float32; nothing depends on the order of programs.

The fine pixels centred at a coarse pixel are its *phases*, as in :mod:`freqfusion.ops.carafe.torch`: a tile has
``ceil(H / h)`` rows of *slots* for each coarse row, and where the ratio is no whole number some slots stay empty.

A product has zeros off the band, and zero times inf or NaN is NaN. So a bad value of ``x`` reaches all fine pixels of
a tile whose windows' union holds it, and a bad gradient all coarse pixels of such a tile, at most 15 coarse pixels
further than by the definition. Bad kernels and logits stay with their fine pixel in the result and in their own
gradient.
"""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._checks import layout
from freqfusion.ops._triton import INTERPRETED
from freqfusion.ops._triton.launch import Configuration, Launch, capability, launch
from freqfusion.ops._triton.maps import dense, dense_map, map_strides, span, stride_names
from freqfusion.ops.carafe.triton.sums import (
    SIZES,
    Call,
    Sizes,
    folded,
    mirrored,
    padded_gradient,
    sizes_of,
    small,
)
from freqfusion.ops.normalize_kernels.triton import normalize_kernels_backward

KERNEL_SIZES = (3, 5)
MAX_SCALE = 4
# ------------------------------------------------------------------------------------------------ what they share


@triton.jit
def _slots(start, slot, coarse, fine, SCALE: tl.constexpr, EVEN: tl.constexpr):
    """Fine rows (or columns) at the slots of a tile, the coarse ones they are centred at, which of them exist."""
    centre = start + slot // SCALE
    if EVEN:
        place = start * SCALE + slot
        exists = (place >= 0) & (place < fine)
    else:
        place = (centre * fine + coarse - 1) // coarse + slot % SCALE
        end = ((centre + 1) * fine + coarse - 1) // coarse
        exists = (centre >= 0) & (centre < coarse) & (place < end)
    return place, centre, exists


@triton.jit
def _kernels_of(
    kernels,
    window,
    pixel,
    exists,
    k_t,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Kernels of some pixels, float32, the taps along AXIS and zeros after them; softmax of logits if NORMALIZE."""
    tap = tl.arange(0, TAPS)
    real = tl.expand_dims(tap < K * K, 1 - AXIS)
    at = kernels + (tl.expand_dims(tap * k_t, 1 - AXIS) + tl.expand_dims(pixel, AXIS))
    value = tl.load(at, mask=real & tl.expand_dims(exists, AXIS), other=0.0).to(tl.float32)
    if NORMALIZE:
        if WINDOWED:
            log = tl.log(tl.load(window + tap, mask=tap < K * K, other=1.0).to(tl.float32))
            value += tl.expand_dims(log, 1 - AXIS)
        value = tl.where(real, value, float("-inf"))
        value = tl.exp(value - tl.expand_dims(tl.max(value, axis=AXIS), AXIS))
        value = value / tl.expand_dims(tl.sum(value, axis=AXIS), AXIS)
    return value


@triton.jit
def _rest(weight, first):
    """What is left of float32 weights by their rounding to ``first``, in the dtype of that."""
    return (weight - first.to(tl.float32)).to(first.dtype)


# ------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=[*SIZES, *stride_names("x", "k", "o")])
def carafe_band_forward(
    x,
    kernels,
    window,
    out,
    plus,
    kept,
    channels,
    groups,
    h,
    w,
    height,
    width,
    keep,
    x_b,
    x_n,
    x_h,
    k_b,
    k_n,
    k_h,
    o_b,
    o_n,
    o_h,
    C_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    X_LAST: tl.constexpr,
    X_UNIT: tl.constexpr,
    K_LAST: tl.constexpr,
    K_UNIT: tl.constexpr,
    O_LAST: tl.constexpr,
    O_UNIT: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    SCALE_Y: tl.constexpr,
    SCALE_X: tl.constexpr,
    EVEN: tl.constexpr,
    REFLECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAIN: tl.constexpr,
    SPLIT: tl.constexpr,
    PLUS: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    M: tl.constexpr,
    LEFT: tl.constexpr,
    WW: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of TH x TW coarse pixels; its window is WW columns wide and starts LEFT of it.

    Where the columns of ``x`` lie side by side, all is transposed: out[C, M] = X[C, N] W[N, M]. If PLUS, ``plus``, of
    the strides of ``out``, is added, and if ``keep`` is not 0, ``kept``, of those of ``kernels``, gets the kernels.
    """
    PIXELS: tl.constexpr = 0 if X_LAST else 1  # the axis of fine pixels in W, the other one is the window's
    WINDOW: tl.constexpr = 1 - PIXELS
    channels = channels * C_UNIT
    w = w * W_UNIT
    width = width * WIDTH_UNIT
    x_b, x_c, x_h, x_w = map_strides(x_b, x_n, x_h, X_LAST, X_UNIT)
    k_b, k_t, k_h, k_w = map_strides(k_b, k_n, k_h, K_LAST, K_UNIT)
    o_b, o_c, o_h, o_w = map_strides(o_b, o_n, o_h, O_LAST, O_UNIT)
    program = tl.program_id(0)
    tiles = (w + TW - 1) // TW
    j0 = program % tiles * TW
    program //= tiles
    tiles = (h + TH - 1) // TH
    i0 = program % tiles * TH
    program //= tiles
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    m = tl.arange(0, M)
    row, i, row_exists = _slots(i0, m // (TW * SCALE_X), h, height, SCALE_Y, EVEN)
    column, j, column_exists = _slots(j0, m % (TW * SCALE_X), w, width, SCALE_X, EVEN)
    exists = row_exists & column_exists
    if M > TH * TW * SCALE_Y * SCALE_X:
        exists = exists & (i < i0 + TH)
    n = tl.arange(0, N)
    down = i0 + n // WW - K // 2
    across = j0 + n % WW - LEFT
    dy = tl.expand_dims(down, PIXELS) - tl.expand_dims(i - K // 2, WINDOW)
    dx = tl.expand_dims(across, PIXELS) - tl.expand_dims(j - K // 2, WINDOW)
    on = (dy >= 0) & (dy < K) & (dx >= 0) & (dx < K)
    tap = dy * K + dx
    first_kernel = batch * k_b + group * (K * K) * k_t
    kernels += first_kernel
    pixel = row * k_h + column * k_w
    taken = _kernels_of(kernels, window, pixel, exists, k_t, K, TAPS, NORMALIZE, WINDOWED, WINDOW)
    if PLUS:
        t = tl.arange(0, TAPS)
        beside = kept + first_kernel + (tl.expand_dims(t * k_t, PIXELS) + tl.expand_dims(pixel, WINDOW))
        stored = tl.expand_dims((t < K * K) & (keep != 0), PIXELS) & tl.expand_dims(exists, WINDOW)
        tl.store(beside, taken.to(kept.dtype.element_ty), mask=stored)
    weight = tl.gather(taken, tl.where(on, tap, K * K), WINDOW)
    if GAIN:
        weight = -weight
        # a product of its own, for GAIN minus a weight would lose the weight in half precision
        centre = tl.where(on & (tap == K * K // 2), GAIN * 1.0, 0.0).to(x.dtype.element_ty)
    first = weight.to(x.dtype.element_ty)
    if SPLIT:
        second = _rest(weight, first)

    if REFLECT:
        down = mirrored(down, h)
        across = mirrored(across, w)
    inside = (down >= 0) & (down < h) & (across >= 0) & (across < w) & (n < (TH + K - 1) * WW)
    read = tl.expand_dims(down * x_h + across * x_w, WINDOW)
    written = tl.expand_dims(row * o_h + column * o_w, WINDOW)
    inside = tl.expand_dims(inside, WINDOW)
    exists = tl.expand_dims(exists, WINDOW)
    x += batch * x_b + group * channels * x_c
    first_value = batch * o_b + group * channels * o_c
    out += first_value
    if PLUS:
        plus += first_value
    for start in tl.range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        real = tl.expand_dims(c < channels, PIXELS)
        at = x + (tl.expand_dims(c * x_c, PIXELS) + read)
        value = tl.load(at, mask=real & inside, other=0.0)
        if X_LAST:
            total = tl.dot(first, value)
            if GAIN:
                total = tl.dot(centre, value, total)
            if SPLIT:
                total = tl.dot(second, value, total)
        else:
            total = tl.dot(value, first)
            if GAIN:
                total = tl.dot(value, centre, total)
            if SPLIT:
                total = tl.dot(value, second, total)
        at = tl.expand_dims(c * o_c, PIXELS) + written
        if PLUS:
            total += tl.load(plus + at, mask=real & exists, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=real & exists)


@triton.jit(do_not_specialize=[*SIZES, *stride_names("x", "g", "k", "o")])
def carafe_band_kernels(
    x,
    grad,
    logits,
    window,
    out,
    applied,
    more,
    channels,
    groups,
    h,
    w,
    height,
    width,
    has_more,
    x_b,
    x_n,
    x_h,
    g_b,
    g_n,
    g_h,
    k_b,
    k_n,
    k_h,
    o_b,
    o_n,
    o_h,
    C_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    X_LAST: tl.constexpr,
    X_UNIT: tl.constexpr,
    G_LAST: tl.constexpr,
    G_UNIT: tl.constexpr,
    K_LAST: tl.constexpr,
    K_UNIT: tl.constexpr,
    O_LAST: tl.constexpr,
    O_UNIT: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    SCALE_Y: tl.constexpr,
    SCALE_X: tl.constexpr,
    EVEN: tl.constexpr,
    REFLECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    M: tl.constexpr,
    LEFT: tl.constexpr,
    WW: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient in the kernels, or in the logits if NORMALIZE; then ``applied`` receives the normalised kernels, and
    ``more``, if ``has_more`` is not 0, is a further gradient in them. All are of the strides of ``out``."""
    channels = channels * C_UNIT
    w = w * W_UNIT
    width = width * WIDTH_UNIT
    x_b, x_c, x_h, x_w = map_strides(x_b, x_n, x_h, X_LAST, X_UNIT)
    g_b, g_c, g_h, g_w = map_strides(g_b, g_n, g_h, G_LAST, G_UNIT)
    k_b, k_t, k_h, k_w = map_strides(k_b, k_n, k_h, K_LAST, K_UNIT)
    o_b, o_t, o_h, o_w = map_strides(o_b, o_n, o_h, O_LAST, O_UNIT)
    program = tl.program_id(0)
    tiles = (w + TW - 1) // TW
    j0 = program % tiles * TW
    program //= tiles
    tiles = (h + TH - 1) // TH
    i0 = program % tiles * TH
    program //= tiles
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    m = tl.arange(0, M)
    row, i, row_exists = _slots(i0, m // (TW * SCALE_X), h, height, SCALE_Y, EVEN)
    column, j, column_exists = _slots(j0, m % (TW * SCALE_X), w, width, SCALE_X, EVEN)
    exists = row_exists & column_exists
    if M > TH * TW * SCALE_Y * SCALE_X:
        exists = exists & (i < i0 + TH)
    n = tl.arange(0, N)
    down = i0 + n // WW - K // 2
    across = j0 + n % WW - LEFT
    if REFLECT:
        down = mirrored(down, h)
        across = mirrored(across, w)
    inside = (down >= 0) & (down < h) & (across >= 0) & (across < w) & (n < (TH + K - 1) * WW)
    read = (down * x_h + across * x_w)[:, None]
    sent = (row * g_h + column * g_w)[:, None]
    x += batch * x_b + group * channels * x_c
    grad += batch * g_b + group * channels * g_c
    sums = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        real = (c < channels)[None, :]
        incoming = tl.load(grad + (sent + (c * g_c)[None, :]), mask=exists[:, None] & real, other=0.0)
        value = tl.load(x + (read + (c * x_c)[None, :]), mask=inside[:, None] & real, other=0.0)
        sums = tl.dot(incoming, tl.trans(value), sums, input_precision=PRECISION)

    t = tl.arange(0, TAPS)
    tap = tl.minimum(t, K * K - 1)
    place = tl.minimum(i - i0, TH - 1) * WW + (j - j0) + (LEFT - K // 2)
    total = tl.gather(sums, place[:, None] + (tap // K * WW + tap % K)[None, :], 1)
    stored = (t < K * K)[None, :] & exists[:, None]
    first = group * (K * K)
    at = batch * o_b + first * o_t + ((t * o_t)[None, :] + (row * o_h + column * o_w)[:, None])
    if NORMALIZE:
        logits += batch * k_b + first * k_t
        pixel = row * k_h + column * k_w
        weight = _kernels_of(logits, window, pixel, exists, k_t, K, TAPS, NORMALIZE, WINDOWED, 1)
        tl.store(applied + at, weight.to(applied.dtype.element_ty), mask=stored)
        total += tl.load(more + at, mask=stored & (has_more != 0), other=0.0).to(tl.float32)
        mean = tl.sum(tl.where(stored, weight * total, 0.0), axis=1)
        total = weight * (total - mean[:, None])
        if GAIN:
            total = -total
    tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _band_of_row(
    kernels,
    step,
    i0,
    pi,
    dx,
    on_x,
    column,
    slot,
    h,
    height,
    k_t,
    k_h,
    k_w,
    K: tl.constexpr,
    SCALE_Y: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What the kernels of some rows of slots, from ``step`` on, hold for the coarse pixels of a tile."""
    row, centre, exists = _slots(i0 - K // 2, step + slot // COLUMNS, h, height, SCALE_Y, EVEN)
    dy = pi[:, None] - (centre - K // 2)[None, :]
    on = on_x & (dy >= 0) & (dy < K) & exists[None, :]
    at = kernels + ((dy * K + dx) * k_t + (row * k_h + column * k_w)[None, :])
    return tl.load(at, mask=on, other=0.0)


@triton.jit(do_not_specialize=[*SIZES, *stride_names("k", "g", "o")])
def carafe_band_x(
    kernels,
    grad,
    out,
    channels,
    groups,
    h,
    w,
    height,
    width,
    margin,
    k_b,
    k_n,
    k_h,
    g_b,
    g_n,
    g_h,
    o_b,
    o_n,
    o_h,
    C_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    K_LAST: tl.constexpr,
    K_UNIT: tl.constexpr,
    G_LAST: tl.constexpr,
    G_UNIT: tl.constexpr,
    O_LAST: tl.constexpr,
    O_UNIT: tl.constexpr,
    K: tl.constexpr,
    SCALE_Y: tl.constexpr,
    SCALE_X: tl.constexpr,
    EVEN: tl.constexpr,
    GAIN: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    M: tl.constexpr,
    LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of TH x TW pixels of ``x`` with a ``margin`` around it gathers what the windows that hold them sent.

    It walks over the rows of slots of its windows, ROWS a step, COLUMNS wide from LEFT coarse pixels before it. With
    a GAIN the kernels count negatively, and each pixel receives GAIN times what lies at its own phases.
    """
    channels = channels * C_UNIT
    w = w * W_UNIT
    width = width * WIDTH_UNIT
    k_b, k_t, k_h, k_w = map_strides(k_b, k_n, k_h, K_LAST, K_UNIT)
    g_b, g_c, g_h, g_w = map_strides(g_b, g_n, g_h, G_LAST, G_UNIT)
    o_b, o_c, o_h, o_w = map_strides(o_b, o_n, o_h, O_LAST, O_UNIT)
    program = tl.program_id(0)
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= blocks
    blocks = (w + 2 * margin + TW - 1) // TW
    j0 = program % blocks * TW
    program //= blocks
    blocks = (h + 2 * margin + TH - 1) // TH
    i0 = program % blocks * TH
    program //= blocks
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    m = tl.arange(0, M)
    oi = i0 + m // TW
    oj = j0 + m % TW
    owned = (oi < h + 2 * margin) & (oj < w + 2 * margin)
    if M > TH * TW:
        owned = owned & (m < TH * TW)
    real = (c < channels)[None, :]
    i0 -= margin
    j0 -= margin
    pi = i0 + m // TW
    pj = j0 + m % TW
    kernels += batch * k_b + group * (K * K) * k_t
    grad += batch * g_b + group * channels * g_c
    at_channel = (c * g_c)[None, :]

    total = tl.zeros((M, BLOCK_C), tl.float32)
    if GAIN:
        for y in tl.static_range(SCALE_Y):
            own_row, _, row_exists = _slots(pi, y + 0 * m, h, height, SCALE_Y, EVEN)
            for x in tl.static_range(SCALE_X):
                own_column, _, own_exists = _slots(pj, x + 0 * m, w, width, SCALE_X, EVEN)
                own_exists = owned & row_exists & own_exists
                here = grad + ((own_row * g_h + own_column * g_w)[:, None] + at_channel)
                total += GAIN * tl.load(here, mask=own_exists[:, None] & real, other=0.0).to(tl.float32)

    slot = tl.arange(0, ROWS * COLUMNS)
    column, centre, column_exists = _slots(j0 - LEFT, slot % COLUMNS, w, width, SCALE_X, EVEN)
    if G_LAST and COLUMNS > (TW + 2 * (K // 2)) * SCALE_X:
        column_exists = column_exists & (centre < j0 + TW + K // 2)
    dx = pj[:, None] - (centre - K // 2)[None, :]
    on_x = (dx >= 0) & (dx < K) & column_exists[None, :]
    at_column = (column * g_w)[:, None] + at_channel
    ahead = _band_of_row(
        kernels, 0, i0, pi, dx, on_x, column, slot, h, height, k_t, k_h, k_w, K, SCALE_Y, EVEN, COLUMNS
    )
    for step in tl.range(0, (TH + 2 * (K // 2)) * SCALE_Y, ROWS):
        row, _, exists = _slots(i0 - K // 2, step + slot // COLUMNS, h, height, SCALE_Y, EVEN)
        incoming = tl.load(
            grad + ((row * g_h)[:, None] + at_column),
            mask=(exists & column_exists)[:, None] & real,
            other=0.0,
        )
        weight = ahead
        ahead = _band_of_row(  # a step early
            kernels,
            step + ROWS,
            i0,
            pi,
            dx,
            on_x,
            column,
            slot,
            h,
            height,
            k_t,
            k_h,
            k_w,
            K,
            SCALE_Y,
            EVEN,
            COLUMNS,
        )
        if GAIN:
            weight = -weight
        first = weight.to(incoming.dtype)
        total = tl.dot(first, incoming, total, input_precision=PRECISION)
        if SPLIT:
            total = tl.dot(_rest(weight, first), incoming, total, input_precision=PRECISION)
    at = out + batch * o_b + group * channels * o_c + ((oi * o_h + oj * o_w)[:, None] + (c * o_c)[None, :])
    tl.store(at, total.to(out.dtype.element_ty), mask=owned[:, None] & real)


@triton.jit(do_not_specialize=[*SIZES, *stride_names("x", "g", "k", "o", "d")])
def carafe_band_resident(
    x,
    grad,
    kernels,
    window,
    out,
    raw,
    channels,
    groups,
    h,
    w,
    margin,
    x_b,
    x_n,
    x_h,
    g_b,
    g_n,
    g_h,
    k_b,
    k_n,
    k_h,
    o_b,
    o_n,
    o_h,
    d_b,
    d_n,
    d_h,
    C_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    X_LAST: tl.constexpr,
    X_UNIT: tl.constexpr,
    G_LAST: tl.constexpr,
    G_UNIT: tl.constexpr,
    K_LAST: tl.constexpr,
    K_UNIT: tl.constexpr,
    O_LAST: tl.constexpr,
    O_UNIT: tl.constexpr,
    D_LAST: tl.constexpr,
    D_UNIT: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    REFLECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAIN: tl.constexpr,
    SPLIT: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    M: tl.constexpr,
    LEFT: tl.constexpr,
    WW: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Both gradients at equal sizes, from one reading of ``x`` and ``grad``: ``out`` in x, ``raw`` in the kernels.

    A tile owns TH x TW pixels of ``x`` with a ``margin`` around it, as in :func:`carafe_band_x`. It writes the
    gradient of the taps that lie there, so those outside of ``x`` are never written.
    """
    channels = channels * C_UNIT
    w = w * W_UNIT
    x_b, x_c, x_h, x_w = map_strides(x_b, x_n, x_h, X_LAST, X_UNIT)
    g_b, g_c, g_h, g_w = map_strides(g_b, g_n, g_h, G_LAST, G_UNIT)
    k_b, k_t, k_h, k_w = map_strides(k_b, k_n, k_h, K_LAST, K_UNIT)
    o_b, o_c, o_h, o_w = map_strides(o_b, o_n, o_h, O_LAST, O_UNIT)
    d_b, d_t, d_h, d_w = map_strides(d_b, d_n, d_h, D_LAST, D_UNIT)
    program = tl.program_id(0)
    tiles = (w + 2 * margin + TW - 1) // TW
    j0 = program % tiles * TW
    program //= tiles
    tiles = (h + 2 * margin + TH - 1) // TH
    i0 = program % tiles * TH
    program //= tiles
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    m = tl.arange(0, M)
    oi = i0 + m // TW
    oj = j0 + m % TW
    owned = (oi < h + 2 * margin) & (oj < w + 2 * margin) & (m < TH * TW)
    pi = oi - margin
    pj = oj - margin
    n = tl.arange(0, N)
    row = i0 - margin + n // WW - K // 2
    column = j0 - margin + n % WW - LEFT
    exists = (row >= 0) & (row < h) & (column >= 0) & (column < w) & (n < (TH + K - 1) * WW)
    if G_LAST:
        exists = exists & (n % WW < LEFT + TW + K // 2)
    dy = pi[:, None] - (row - K // 2)[None, :]
    dx = pj[:, None] - (column - K // 2)[None, :]
    on = (dy >= 0) & (dy < K) & (dx >= 0) & (dx < K) & owned[:, None] & exists[None, :]
    tap = dy * K + dx
    first = group * (K * K)
    kernels += batch * k_b + first * k_t
    taken = _kernels_of(
        kernels, window, row * k_h + column * k_w, exists, k_t, K, TAPS, NORMALIZE, WINDOWED, 0
    )
    weight = tl.gather(taken, tl.where(on, tap, K * K), 0)
    if GAIN:
        weight = -weight
    rounded = weight.to(grad.dtype.element_ty)
    if SPLIT:
        second = _rest(weight, rounded)

    in_x = owned & (pi >= 0) & (pi < h) & (pj >= 0) & (pj < w)
    loaded = in_x
    down = pi
    across = pj
    if REFLECT:
        loaded = owned
        down = mirrored(pi, h)
        across = mirrored(pj, w)
    read = (down * x_h + across * x_w)[:, None]
    sent = (row * g_h + column * g_w)[:, None]
    here = (pi * g_h + pj * g_w)[:, None]
    written = (oi * o_h + oj * o_w)[:, None]
    x += batch * x_b + group * channels * x_c
    grad += batch * g_b + group * channels * g_c
    out += batch * o_b + group * channels * o_c
    sums = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        real = (c < channels)[None, :]
        at_channel = (c * g_c)[None, :]
        incoming = tl.load(grad + (sent + at_channel), mask=exists[:, None] & real, other=0.0)
        value = tl.load(x + (read + (c * x_c)[None, :]), mask=loaded[:, None] & real, other=0.0)
        total = tl.zeros((M, BLOCK_C), tl.float32)
        if GAIN:
            centre = tl.load(grad + (here + at_channel), mask=in_x[:, None] & real, other=0.0)
            total += GAIN * centre.to(tl.float32)
        sums = tl.dot(value, tl.trans(incoming), sums)
        total = tl.dot(rounded, incoming, total)
        if SPLIT:
            total = tl.dot(second, incoming, total)
        at = out + (written + (c * o_c)[None, :])
        tl.store(at, total.to(out.dtype.element_ty), mask=owned[:, None] & real)
    if GAIN:
        sums = -sums
    at = raw + batch * d_b + first * d_t + (tap * d_t + (row * d_h + column * d_w)[None, :])
    tl.store(at, sums.to(raw.dtype.element_ty), mask=on)


# ------------------------------------------------------------------------------------------------ configurations


def _options(warps: int, stages: int) -> Configuration:
    return {"num_warps": warps, "num_stages": stages}


def _has_wgmma(x: Tensor) -> bool:
    """Whether products take their operands from shared memory; the older instructions hold them in registers."""
    return 90 <= capability(x.device) < 120


def _channel_block(channels: int, most: int) -> int:
    return min(most, max(32, triton.next_power_of_2(channels)))


def _window_of(rows: int, columns: int, left: int, width: int, sizes: Sizes) -> Configuration:
    """Tiles that own the fine pixels of some coarse ones: what follows from their number and their window."""
    height = rows + sizes.kernel_size - 1
    return {
        "TH": rows,
        "TW": columns,
        "M": max(16, triton.next_power_of_2(rows * columns * sizes.scale_y * sizes.scale_x)),
        "LEFT": left,
        "WW": width,
        "N": triton.next_power_of_2(height * width),
    }


def _fine_tile(sizes: Sizes, last: bool, most_rows: int = 4) -> Configuration:
    """Eight fine columns wide where channels lie side by side, else sixteen, from an even place."""
    radius = sizes.kernel_size // 2
    rows = max(1, min(most_rows, 8 // sizes.scale_y))
    columns = max(1, (8 if last else 16) // sizes.scale_x)
    left = radius if last else 2 * radius
    width = left + columns + radius
    return _window_of(rows, columns, left, width if last else -(-width // 4) * 4, sizes)


@lru_cache(256)
def _forward_choices(sizes: Sizes, last: bool) -> list[Configuration]:
    block = _channel_block(sizes.channels, 64)
    tile = _fine_tile(sizes, last) | {"BLOCK_C": block}
    first = _options(4, 3) if last else _options(8, 1)
    return [tile | (first if block == 64 else _options(4, 1)), tile | _options(8, 2), tile | _options(4, 2)]


@lru_cache(256)
def _kernels_choices(sizes: Sizes, last: bool, wide: bool, wgmma: bool) -> list[Configuration]:
    radius = sizes.kernel_size // 2
    scale = max(sizes.scale_y, sizes.scale_x)
    if not last:
        columns = 8 if scale <= 2 else 2 if wide else 4
        rows = (4 if scale <= 2 else 2) if not wide else 2 if wgmma else 1
        tile = _window_of(rows, columns, 4, 16, sizes)
    elif scale == 1 and not wide:
        tile = _window_of(8 - 2 * radius, 16 - 2 * radius, radius, 16, sizes)
    else:
        tile = _fine_tile(sizes, last, 4 if wgmma or not wide else 4 // scale)
    large = tile["M"] * tile["N"] >= 2**14
    tile["BLOCK_C"] = _channel_block(sizes.channels, 32 if wide or (large and not last) else 64)
    many = sizes.channels > 32
    if wide:
        first = _options(4, 3 if many else 1) if wgmma else _options(8 if large else 4, 2)
    else:
        first = _options(4, 3) if many and not (large and (last or not wgmma)) else _options(8, 2)
    return [tile | first, tile | _options(4, 2), tile | _options(8, 2)]


@lru_cache(256)
def _x_choices(sizes: Sizes, last: bool, wide: bool) -> list[Configuration]:
    radius = sizes.kernel_size // 2
    if last:
        left, width = radius, 16
        while width // sizes.scale_x - 2 * radius < 4:
            width *= 2
        columns = width // sizes.scale_x - 2 * radius
        rows = 2 if wide and columns > 8 else 4
    else:
        left, rows, columns = 4, 4 if wide else 8, 8
        width = triton.next_power_of_2((left + columns + radius) * sizes.scale_x)
    owned = max(16, triton.next_power_of_2(rows * columns))
    most = 64 if wide else 256 if owned <= 32 else 128
    tile = {
        "TH": rows,
        "TW": columns,
        "M": owned,
        "LEFT": left,
        "ROWS": max(1, 32 // width),
        "COLUMNS": width,
        "BLOCK_C": _channel_block(sizes.channels, most),
    }
    return [tile | _options(4, 2 if wide else 3), tile | _options(8, 3), tile | _options(4, 2)]


@lru_cache(256)
def _resident_choices(sizes: Sizes, last: bool, wgmma: bool) -> list[Configuration]:
    radius = sizes.kernel_size // 2
    left = radius if last else 2
    if wgmma:
        rows, columns, block = 8 - 2 * radius - (radius == 1), 16 - 4, 64 if last else 32
    else:
        rows, columns, block = 6 - 2 * radius if last else 2, 16 - radius - left, 32
    tile = _window_of(rows, columns, left, 16, sizes) | {"BLOCK_C": _channel_block(sizes.channels, block)}
    first = (_options(8, 3) if last else _options(4, 2)) if wgmma else _options(4 if last else 8, 3)
    return [tile | first, tile | _options(4, 3), tile | _options(8, 2)]


# ------------------------------------------------------------------------------------------------------- launching


def why_not(
    kernel_size: int, maps: tuple[Tensor, ...], coarse: tuple[int, int], fine: tuple[int, int]
) -> str:
    """Why banded products cannot serve, or ``""``.

    Args:
        kernel_size: of the reassembly.
        maps: the wide ones, ``x`` or its gradient or both.
        coarse: sides of ``x``.
        fine: sides of the result.
    """
    first = maps[0]
    if kernel_size not in KERNEL_SIZES:
        return f"banded products are for kernels of {' and '.join(map(str, KERNEL_SIZES))}, got {kernel_size}"
    if max(-(-fine[0] // coarse[0]), -(-fine[1] // coarse[1])) > MAX_SCALE:
        return f"banded products are for ratios up to {MAX_SCALE}"
    if any(x.dtype != first.dtype for x in maps):
        return "the maps differ in dtype"
    if any(dense(x) is None for x in maps):
        return "neither channels nor columns lie side by side in memory"
    if any(span(x) >= 2**31 for x in maps):
        return "one image spans 2**31 values or more"
    if INTERPRETED:
        wrong = first.dtype == torch.bfloat16
        return "Triton's interpreter does not multiply matrices of bfloat16" if wrong else ""
    if torch.version.hip or capability(first.device) < 80:
        return "the device has no tensor cores of compute capability 8.0 or newer"
    return ""


def _splits(x: Tensor, kernels: Tensor, call: Call) -> bool:
    """Whether weights are sums of two numbers of the dtype of the map, for they have more digits than it.

    Not if the gain's product is the larger part of the result.
    """
    return (call.normalize or kernels.dtype == torch.float32) and x.dtype != torch.float32 and not call.gain


def _forward_launch(
    x: Tensor,
    kernels: Tensor,
    window: Tensor | None,
    out: Tensor,
    plus: Tensor | None,
    kept: Tensor,
    call: Call,
) -> Launch:
    sizes = sizes_of(x, kernels, call)
    x_map, k_map, o_map = dense_map(x, call.groups), dense_map(kernels), dense_map(out, call.groups)
    numbers, units = sizes.arguments((x_map,), (k_map, o_map))
    constants = {
        **units,
        **x_map.constants("X"),
        **k_map.constants("K"),
        **o_map.constants("O"),
        **sizes.ratio,
        "K": call.kernel_size,
        "TAPS": sizes.taps,
        "REFLECT": call.reflect,
        "NORMALIZE": call.normalize,
        "WINDOWED": window is not None,
        "GAIN": call.gain,
        "SPLIT": _splits(x, kernels, call),
        "PLUS": plus is not None,
    }
    return Launch(
        partial(sizes.tiles, x.shape[0]),
        [*numbers, int(call.more), *x_map.strides, *k_map.strides, *o_map.strides],
        _forward_choices(sizes, x_map.last),
        constants,
    )


def _kernels_launch(
    x: Tensor,
    grad: Tensor,
    logits: Tensor | None,
    window: Tensor | None,
    out: Tensor,
    applied: Tensor | None,
    more: Tensor,
    call: Call,
) -> Launch:
    sizes = sizes_of(x, grad, call)
    x_map, g_map, o_map = dense_map(x, call.groups), dense_map(grad, call.groups), dense_map(out)
    k_map = o_map if logits is None else dense_map(logits)
    numbers, units = sizes.arguments((x_map,), (g_map, k_map, o_map))
    wide = x.dtype == torch.float32
    constants = {
        **units,
        **x_map.constants("X"),
        **g_map.constants("G"),
        **k_map.constants("K"),
        **o_map.constants("O"),
        **sizes.ratio,
        "K": call.kernel_size,
        "TAPS": sizes.taps,
        "REFLECT": call.reflect,
        "NORMALIZE": logits is not None,
        "WINDOWED": window is not None,
        "GAIN": call.gain,
        "PRECISION": "tf32x3" if wide else "ieee",
    }
    return Launch(
        partial(sizes.tiles, x.shape[0]),
        [*numbers, int(call.more), *x_map.strides, *g_map.strides, *k_map.strides, *o_map.strides],
        _kernels_choices(sizes, g_map.last, wide, _has_wgmma(x)),
        constants,
    )


def _x_launch(kernels: Tensor, grad: Tensor, out: Tensor, call: Call, margin: int) -> Launch:
    sizes = sizes_of(out, grad, call, margin)
    k_map, g_map, o_map = dense_map(kernels), dense_map(grad, call.groups), dense_map(out, call.groups)
    numbers, units = sizes.arguments((o_map,), (k_map, g_map))
    batch, wide = grad.shape[0], grad.dtype == torch.float32

    def programs(chosen: Configuration) -> int:
        return sizes.tiles(batch, chosen, margin) * triton.cdiv(sizes.channels, chosen["BLOCK_C"])

    constants = {
        **units,
        **k_map.constants("K"),
        **g_map.constants("G"),
        **o_map.constants("O"),
        **sizes.ratio,
        "K": call.kernel_size,
        "GAIN": call.gain,
        "SPLIT": _splits(grad, kernels, call),
        "PRECISION": "tf32x3" if wide else "ieee",
    }
    return Launch(
        programs,
        [*numbers, margin, *k_map.strides, *g_map.strides, *o_map.strides],
        _x_choices(sizes, g_map.last, wide),
        constants,
    )


FORWARD = carafe_band_forward, _forward_launch
IN_KERNELS = carafe_band_kernels, _kernels_launch
IN_X = carafe_band_x, _x_launch


def backward_both(
    x: Tensor,
    kernels: Tensor,
    window: Tensor | None,
    grad: Tensor,
    call: Call,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients in ``x`` and in the kernels or logits, as they lie and of their dtypes, in half precision."""
    margin = call.kernel_size // 2 if call.reflect else 0
    out = padded_gradient(grad, x.shape[2], x.shape[3], margin, layout(x))
    raw = torch.empty(
        kernels.shape,
        dtype=torch.float32 if call.normalize else kernels.dtype,
        device=x.device,
        memory_format=layout(kernels),
    )
    if not call.reflect:
        raw.zero_()  # taps outside of x have no gradient
    kernels = small(kernels)
    launch(carafe_band_resident, (x, grad, kernels, window, out, raw), _both_launch, call, margin)
    if more is not None:
        raw += more
    if call.normalize:
        raw = normalize_kernels_backward(kernels, window, raw, call.kernel_size**2)
    return folded(out, grad, margin, layout(x)), raw


def _both_launch(
    x: Tensor,
    grad: Tensor,
    kernels: Tensor,
    window: Tensor | None,
    out: Tensor,
    raw: Tensor,
    call: Call,
    margin: int,
) -> Launch:
    sizes = sizes_of(x, grad, call)
    x_map, g_map, k_map = dense_map(x, call.groups), dense_map(grad, call.groups), dense_map(kernels)
    o_map, d_map = dense_map(out, call.groups), dense_map(raw)
    numbers, units = sizes.arguments((x_map, g_map, k_map, o_map, d_map), ())
    strides = (number for found in (x_map, g_map, k_map, o_map, d_map) for number in found.strides)
    constants = {
        "C_UNIT": units["C_UNIT"],
        "W_UNIT": units["W_UNIT"],
        **x_map.constants("X"),
        **g_map.constants("G"),
        **k_map.constants("K"),
        **o_map.constants("O"),
        **d_map.constants("D"),
        "K": call.kernel_size,
        "TAPS": sizes.taps,
        "REFLECT": call.reflect,
        "NORMALIZE": call.normalize,
        "WINDOWED": window is not None,
        "GAIN": call.gain,
        "SPLIT": _splits(grad, kernels, call),
    }
    return Launch(
        partial(sizes.tiles, x.shape[0], margin=margin),
        [*numbers[:4], margin, *strides],
        _resident_choices(sizes, x_map.last and g_map.last, _has_wgmma(x)),
        constants,
    )
