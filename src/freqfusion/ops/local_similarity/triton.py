"""The local similarity and its derivative.

A window of 3 x 3 has kernels of its own, which take tiles of pixels: with a neighbour a pixel shares one cosine, so
only the four neighbours to the right and below are met, and each cosine is written for both pixels. Larger windows
have kernels that take all neighbours of a stretch of one row at once.

Both keep for the backward pass what :func:`local_similarity` calls ``saved``. A bad value reaches the pixels that
have it as a neighbour, and no others.

The first kernels also serve :mod:`freqfusion.ops.normalized_similarity`, which normalises groups of channels first.
"""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._checks import layout
from freqfusion.ops._triton.groups import affine, derivative, gradient_of_parameters, origin_of
from freqfusion.ops._triton.launch import Launch, launch
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
def _inverse(squares, epsilon):
    """One over a vector's length, negative where the length is below the floor: there it changes the cosines."""
    length = tl.sqrt_rn(squares)
    floored = tl.where(length < epsilon, epsilon, length)  # a maximum would lose NaN
    inverse = tl.div_rn(1.0, floored)
    return tl.where(length > epsilon, inverse, -inverse)


@triton.jit
def _value(loaded, known, NORMALIZE: tl.constexpr):
    """Some channels; if NORMALIZE, normalised by ``known`` (see :func:`affine`) and rounded as their map is."""
    value = loaded.to(tl.float32)
    if NORMALIZE:
        mean, scale, shift = known
        value = (value - mean[:, None]) * scale[:, None] + shift[:, None]
        value = value.to(loaded.dtype).to(tl.float32)
    return value


@triton.jit
def _meet(value, centre, product, squares):
    """Add some channels of a neighbour to its inner product with the centre and to its squared length."""
    return product + tl.sum(centre * value, axis=0), squares + tl.sum(value * value, axis=0)


@triton.jit
def _put(
    product, squares, own, out, saved, valid, inside, alone, o_c, shift, pixels, NUMBER: tl.constexpr, epsilon
):
    """Write the cosine with neighbour NUMBER of 4 to 7 to both pixels, and 0 for mirrored neighbours outside the map.

    ``inside``: where the neighbour is on the map; ``alone``: where the mirrored neighbour is not.
    """
    cosine = tl.where(inside, product * own * tl.abs(_inverse(squares, epsilon)), 0.0)
    tl.store(saved + (NUMBER - 3) * pixels, cosine, mask=valid)
    cosine = cosine.to(out.dtype.element_ty)
    tl.store(out + NUMBER * o_c, cosine, mask=valid)
    mirrored = out + (7 - NUMBER) * o_c
    tl.store(mirrored + shift, cosine, mask=inside)
    tl.store(mirrored, tl.zeros_like(cosine), mask=alone)


@compiled
def similarity_forward(
    x, out, saved, sums, weight, bias, normalized, channels, height, width, epsilon, variance_epsilon,
    x_b, x_c, x_h, x_w, o_b, o_c, o_h, o_w, s_b,
    dilation: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    NORMALIZE: tl.constexpr, TOGETHER: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A tile of pixels. If NORMALIZE, ``normalized``, of the strides of ``out``, receives what is compared."""
    x_b = aligned(x_b, ALIGN)
    x_h = aligned(x_h, ALIGN)
    if LAST:
        channels = aligned(channels, ALIGN)
        x_w = aligned(x_w, ALIGN)
        if NORMALIZE:
            o_b = aligned(o_b, ALIGN)
            o_h = aligned(o_h, ALIGN)
            o_w = aligned(o_w, ALIGN)
    else:
        width = aligned(width, ALIGN)
        x_c = aligned(x_c, ALIGN)
        o_b = aligned(o_b, ALIGN)
        o_c = aligned(o_c, ALIGN)
        o_h = aligned(o_h, ALIGN)
        s_b = aligned(s_b, ALIGN)
    i, j, image = tile(tl.program_id(0), height, width, TH, TW, RUN)
    image = image.to(tl.int64)
    valid = (i < height) & (j < width)
    below = valid & (i + dilation < height)
    right = valid & (j + dilation < width)
    below_left = below & (j >= dilation)
    below_right = below & right
    c = tl.arange(0, BC)
    if WIDE:
        c = c.to(tl.int64)
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    first = x + image * x_b
    here = i * x_h + j * x_w
    down = dilation * x_h
    across = dilation * x_w
    if NORMALIZE:
        written = normalized + image * o_b + (i * o_h + j * o_w)[None, :]
    pixels = tl.cast(height, tl.int64) * width
    squares = tl.zeros((TH * TW,), tl.float32)
    product_4 = tl.zeros((TH * TW,), tl.float32)
    product_5 = tl.zeros((TH * TW,), tl.float32)
    product_6 = tl.zeros((TH * TW,), tl.float32)
    product_7 = tl.zeros((TH * TW,), tl.float32)
    squares_4 = tl.zeros((TH * TW,), tl.float32)
    squares_5 = tl.zeros((TH * TW,), tl.float32)
    squares_6 = tl.zeros((TH * TW,), tl.float32)
    squares_7 = tl.zeros((TH * TW,), tl.float32)
    for start in tl.range(0, channels, BC):
        channel = (c + start)[:, None]
        mask = valid[None, :]
        mask_4 = right[None, :]
        mask_5 = below_left[None, :]
        mask_6 = below[None, :]
        mask_7 = below_right[None, :]
        if not EVEN:
            real = channel < channels
            mask &= real
            mask_4 &= real
            mask_5 &= real
            mask_6 &= real
            mask_7 &= real
        place = first + (channel * x_c + here[None, :])
        loaded = tl.load(place, mask=mask, other=0.0)
        loaded_4 = tl.load(place + across, mask=mask_4, other=0.0)
        place += down
        loaded_5 = tl.load(place - across, mask=mask_5, other=0.0)
        loaded_6 = tl.load(place, mask=mask_6, other=0.0)
        loaded_7 = tl.load(place + across, mask=mask_7, other=0.0)
        known = None
        if NORMALIZE:  # while the pixels are on their way
            known = affine(
                x, sums, weight, bias, image, c + start, channels, pixels, variance_epsilon, x_b, x_c, TOGETHER
            )  # fmt: skip
        centre = _value(loaded, known, NORMALIZE)
        if NORMALIZE:
            tl.store(written + channel * o_c, centre.to(normalized.dtype.element_ty), mask=mask)
        squares += tl.sum(centre * centre, axis=0)
        product_4, squares_4 = _meet(_value(loaded_4, known, NORMALIZE), centre, product_4, squares_4)
        product_5, squares_5 = _meet(_value(loaded_5, known, NORMALIZE), centre, product_5, squares_5)
        product_6, squares_6 = _meet(_value(loaded_6, known, NORMALIZE), centre, product_6, squares_6)
        product_7, squares_7 = _meet(_value(loaded_7, known, NORMALIZE), centre, product_7, squares_7)
    saved += image * s_b + (i * width + j)
    inverse = _inverse(squares, epsilon)
    tl.store(saved, inverse, mask=valid)
    own = tl.abs(inverse)
    out += image * o_b + (i * o_h + j * o_w)
    left_edge = valid & (j < dilation)
    right_edge = valid & (j + dilation >= width)
    top_edge = valid & (i < dilation)
    down = dilation * o_h
    across = dilation * o_w
    _put(product_4, squares_4, own, out, saved, valid, right, left_edge, o_c, across, pixels, 4, epsilon)
    alone = top_edge | right_edge
    _put(
        product_5,
        squares_5,
        own,
        out,
        saved,
        valid,
        below_left,
        alone,
        o_c,
        down - across,
        pixels,
        5,
        epsilon,
    )
    _put(product_6, squares_6, own, out, saved, valid, below, top_edge, o_c, down, pixels, 6, epsilon)
    alone = top_edge | left_edge
    _put(
        product_7,
        squares_7,
        own,
        out,
        saved,
        valid,
        below_right,
        alone,
        o_c,
        down + across,
        pixels,
        7,
        epsilon,
    )


@triton.jit
def _share(saved, grad, own, inside, g_c, there_grad, there, pixels, NUMBER: tl.constexpr):
    """What one of the eight neighbours adds: its weight, and the share along the pixel's own vector."""
    incoming = tl.load(grad + NUMBER * g_c, mask=inside, other=0.0).to(tl.float32)
    incoming += tl.load(grad + (7 - NUMBER) * g_c + there_grad, mask=inside, other=0.0).to(tl.float32)
    if NUMBER > 3:
        cosine = tl.load(saved + (NUMBER - 3) * pixels, mask=inside, other=0.0)
    else:  # the neighbour's, seen from there
        cosine = tl.load(saved + (4 - NUMBER) * pixels + there, mask=inside, other=0.0)
    other = tl.abs(tl.load(saved + there, mask=inside, other=1.0))
    return incoming * own * other, incoming * cosine


@triton.jit
def _weighted(place, mask, weight):
    return tl.load(place, mask=mask, other=0.0).to(tl.float32) * weight[None, :]


@compiled
def similarity_backward(
    x, saved, grad, out, plus, raw, sums, weight, grad_sums, in_weight, in_bias,
    channels, height, width, images, summing, variance_epsilon,
    x_b, x_c, x_h, x_w, s_b, g_b, g_c, g_h, g_w, o_b, o_c, o_h, o_w,
    p_b, p_c, p_h, p_w, r_b, r_c, r_h, r_w,
    dilation: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr, ALIGN_GRAD: tl.constexpr,
    WIDE: tl.constexpr, EVEN: tl.constexpr, NORMALIZE: tl.constexpr, TOGETHER: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Each pixel gathers from its eight neighbours; their weights are made once for all channels.

    If NORMALIZE, ``x`` is what became of ``raw``, and ``plus`` a further gradient in it. Then a first pass,
    ``summing``, only fills its program's share of the ``grad_sums`` of
    :func:`freqfusion.ops._triton.groups.derivative`; given their totals, a second one makes the gradient in ``raw``.
    To compute what both need twice moves fewer bytes than to keep it.
    """
    x_b = aligned(x_b, ALIGN)
    x_h = aligned(x_h, ALIGN)
    o_b = aligned(o_b, ALIGN)
    o_h = aligned(o_h, ALIGN)
    p_b = aligned(p_b, ALIGN)
    p_h = aligned(p_h, ALIGN)
    r_b = aligned(r_b, ALIGN)
    r_h = aligned(r_h, ALIGN)
    if LAST:
        channels = aligned(channels, ALIGN)
        x_w = aligned(x_w, ALIGN)
        o_w = aligned(o_w, ALIGN)
        p_w = aligned(p_w, ALIGN)
        r_w = aligned(r_w, ALIGN)
    else:
        width = aligned(width, ALIGN)
        x_c = aligned(x_c, ALIGN)
        o_c = aligned(o_c, ALIGN)
        p_c = aligned(p_c, ALIGN)
        r_c = aligned(r_c, ALIGN)
        s_b = aligned(s_b, ALIGN)
        g_b = aligned(g_b, ALIGN_GRAD)
        g_c = aligned(g_c, ALIGN_GRAD)
        g_h = aligned(g_h, ALIGN_GRAD)
    program = tl.program_id(0)
    i, j, image = tile(program, height, width, TH, TW, RUN)
    image = image.to(tl.int64)
    valid = (i < height) & (j < width)
    up = valid & (i >= dilation)
    down = valid & (i + dilation < height)
    left = j >= dilation
    right = j + dilation < width
    c = tl.arange(0, BC)
    if WIDE:
        c = c.to(tl.int64)
        i = i.to(tl.int64)
        j = j.to(tl.int64)

    pixels = tl.cast(height, tl.int64) * width
    saved += image * s_b + (i * width + j)
    grad += image * g_b + (i * g_h + j * g_w)
    inverse = tl.load(saved, mask=valid, other=1.0)
    own = tl.abs(inverse)
    g_y = dilation * g_h
    g_x = dilation * g_w
    s_y = dilation * width
    weight_0, share_0 = _share(saved, grad, own, up & left, g_c, -g_y - g_x, -s_y - dilation, pixels, 0)
    weight_1, share_1 = _share(saved, grad, own, up, g_c, -g_y, -s_y, pixels, 1)
    weight_2, share_2 = _share(saved, grad, own, up & right, g_c, g_x - g_y, dilation - s_y, pixels, 2)
    weight_3, share_3 = _share(saved, grad, own, valid & left, g_c, -g_x, -dilation, pixels, 3)
    weight_4, share_4 = _share(saved, grad, own, valid & right, g_c, g_x, dilation, pixels, 4)
    weight_5, share_5 = _share(saved, grad, own, down & left, g_c, g_y - g_x, s_y - dilation, pixels, 5)
    weight_6, share_6 = _share(saved, grad, own, down, g_c, g_y, s_y, pixels, 6)
    weight_7, share_7 = _share(saved, grad, own, down & right, g_c, g_y + g_x, s_y + dilation, pixels, 7)
    along = share_0 + share_1 + share_2 + share_3 + share_4 + share_5 + share_6 + share_7
    # a pixel's own length changes nothing, unless it is below the floor
    centre = tl.where(inverse > 0, -along * own * own, 0.0)

    x += image * x_b
    out += image * o_b
    here = i * x_h + j * x_w
    there = i * o_h + j * o_w
    if NORMALIZE:
        plus += image * p_b
        there_plus = i * p_h + j * p_w
        there_raw = i * r_h + j * r_w
        share = grad_sums + program.to(tl.int64) * (2 * channels)
    across = dilation * x_w
    for start in tl.range(0, channels, BC):
        channel = (c + start)[:, None]
        mask = valid[None, :]
        if not EVEN:
            mask &= channel < channels
        mask_left = mask & left[None, :]
        mask_right = mask & right[None, :]
        place = x + (channel * x_c + here[None, :])
        total = _weighted(place, mask, centre)
        total += _weighted(place - across, mask_left, weight_3)
        total += _weighted(place + across, mask_right, weight_4)
        above = place - dilation * x_h
        total += _weighted(above - across, mask_left & up[None, :], weight_0)
        total += _weighted(above, mask & up[None, :], weight_1)
        total += _weighted(above + across, mask_right & up[None, :], weight_2)
        below = place + dilation * x_h
        total += _weighted(below - across, mask_left & down[None, :], weight_5)
        total += _weighted(below, mask & down[None, :], weight_6)
        total += _weighted(below + across, mask_right & down[None, :], weight_7)
        place = out + (channel * o_c + there[None, :])
        if not NORMALIZE:
            tl.store(place, total.to(out.dtype.element_ty), mask=mask)
        else:
            at = plus + (channel * p_c + there_plus[None, :])
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            some = c + start
            at = raw + image * r_b + (channel * r_c + there_raw[None, :])
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if summing != 0:
                value -= origin_of(raw, image, some, channels, r_b, r_c)[:, None]
                total = tl.where(mask, total, 0.0)
                tl.store(share + some, tl.sum(total, axis=1), mask=some < channels)
                tl.store(share + channels + some, tl.sum(total * value, axis=1), mask=some < channels)
            else:
                if program == 0:
                    gradient_of_parameters(
                        raw, sums, grad_sums, in_weight, in_bias, images, some, channels, pixels,
                        variance_epsilon, r_b, r_c, TOGETHER,
                    )  # fmt: skip
                total = derivative(
                    value, total, raw, sums, grad_sums, weight, image, some, channels, pixels,
                    variance_epsilon, r_b, r_c, TOGETHER,
                )  # fmt: skip
                tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@compiled
def _forward_any_window(
    x, out, saved, channels, height, width, dilation, epsilon, x_b, x_c, x_h, x_w, o_b, o_c, o_h, o_w, s_b,
    WINDOW: tl.constexpr, NEIGHBOURS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks = (width + BLOCK_W - 1) // BLOCK_W
    j = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program //= blocks
    i = program % height
    batch = (program // height).to(tl.int64)

    number = tl.arange(0, NEIGHBOURS)
    half: tl.constexpr = WINDOW * WINDOW // 2
    real = number < WINDOW * WINDOW - 1
    tap = number + number // half  # the centre is left out
    down = (i + (tap // WINDOW - WINDOW // 2) * dilation)[:, None]
    across = j[None, :] + ((tap % WINDOW - WINDOW // 2) * dilation)[:, None]
    inside = real[:, None] & (down >= 0) & (down < height) & (across >= 0) & (across < width)
    here = (i + 0 * j).to(tl.int64) * x_h + j.to(tl.int64) * x_w
    there = down.to(tl.int64) * x_h + across.to(tl.int64) * x_w
    x += batch * x_b
    product = tl.full((NEIGHBOURS, BLOCK_W), 0.0, tl.float32)
    theirs = tl.full((NEIGHBOURS, BLOCK_W), 0.0, tl.float32)
    own = tl.full((BLOCK_W,), 0.0, tl.float32)
    for _ in tl.range(0, channels, loop_unroll_factor=4):
        centre = tl.load(x + here, mask=j < width, other=0.0).to(tl.float32)
        value = tl.load(x + there, mask=inside, other=0.0).to(tl.float32)
        product += centre[None, :] * value
        theirs += value * value
        own += centre * centre
        x += x_c
    inverse = _inverse(own, epsilon)
    cosine = product * tl.abs(inverse)[None, :] * tl.abs(_inverse(theirs, epsilon))
    cosine = tl.where(inside, cosine, 0.0)  # of a bad value too there is none outside
    valid = j < width
    pixels = tl.cast(height, tl.int64) * width
    saved += batch * s_b + tl.cast(i, tl.int64) * width + j
    tl.store(saved, inverse, mask=valid)
    later = (number >= half) & real
    at = saved[None, :] + (number + (1 - half)).to(tl.int64)[:, None] * pixels
    tl.store(at, cosine, mask=later[:, None] & valid[None, :])
    here = (i + 0 * j).to(tl.int64) * o_h + j.to(tl.int64) * o_w
    at = batch * o_b + number.to(tl.int64)[:, None] * o_c + here[None, :]
    tl.store(out + at, cosine.to(out.dtype.element_ty), mask=real[:, None] & valid[None, :])


@compiled
def _backward_any_window(
    x, saved, grad, out, channels, height, width, dilation,
    x_b, x_c, x_h, x_w, s_b, g_b, g_c, g_h, g_w, o_b, o_c, o_h, o_w,
    WINDOW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Each pixel gathers from its neighbours; with a neighbour it shares two similarities, its own and theirs."""
    program = tl.program_id(0)
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= blocks
    blocks = (width + BLOCK_W - 1) // BLOCK_W
    j = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program //= blocks
    i = program % height + 0 * j
    batch = (program // height).to(tl.int64)

    half: tl.constexpr = WINDOW * WINDOW // 2
    pixels = tl.cast(height, tl.int64) * width
    x += batch * x_b
    saved += batch * s_b
    grad += batch * g_b
    real = c < channels
    valid = j < width
    c = c.to(tl.int64)
    row = i.to(tl.int64)
    column = j.to(tl.int64)
    inverse = tl.load(saved + row * width + column, mask=valid, other=1.0)
    length = tl.abs(inverse)
    radial = tl.full((BLOCK_W,), 0.0, tl.float32)
    total = tl.full((BLOCK_C, BLOCK_W), 0.0, tl.float32)
    for neighbour in range(WINDOW * WINDOW - 1):
        tap = neighbour + neighbour // half
        number = tl.cast(neighbour, tl.int64)
        mirrored = WINDOW * WINDOW - 2 - number
        down = row + (tap // WINDOW - WINDOW // 2) * dilation
        across = column + (tap % WINDOW - WINDOW // 2) * dilation
        inside = valid & (down >= 0) & (down < height) & (across >= 0) & (across < width)
        own = tl.load(grad + number * g_c + row * g_h + column * g_w, mask=inside, other=0.0)
        theirs = tl.load(grad + mirrored * g_c + down * g_h + across * g_w, mask=inside, other=0.0)
        there = down * width + across
        # an earlier neighbour's cosine is kept there, as that with its later one
        kept = tl.where(neighbour < half, mirrored * pixels + there, number * pixels + row * width + column)
        cosine = tl.load(saved + kept + (1 - half) * pixels, mask=inside, other=0.0)
        other = tl.load(saved + there, mask=inside, other=1.0)
        incoming = own.to(tl.float32) + theirs.to(tl.float32)
        radial += incoming * cosine
        weight = incoming * length * tl.abs(other)
        at = c[:, None] * x_c + (down * x_h + across * x_w)[None, :]
        value = tl.load(x + at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += weight[None, :] * value
    # a pixel's own length changes nothing, unless it is below the floor
    weight = tl.where(inverse > 0, radial * length * length, 0.0)
    at = c[:, None] * x_c + (row * x_h + column * x_w)[None, :]
    value = tl.load(x + at, mask=real[:, None] & valid[None, :], other=0.0).to(tl.float32)
    total -= weight[None, :] * value
    at = batch * o_b + c[:, None] * o_c + (row * o_h + column * o_w)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=real[:, None] & valid[None, :])


def _tiles(
    x: Tensor, block: int, rows: int, together: int, *like: Tensor
) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Configurations and constants of the kernels of a 3 x 3 window, as measured for 64 channels on an H100.

    Args:
        x: the map.
        block: channels that a program takes at once where the pixels of a row lie side by side.
        rows: of a tile there.
        together: channels per normalised group, which a program takes whole; 0 if none is normalised.
        like: maps that are read or written in the same way.
    """
    channels, width = x.shape[1], x.shape[-1]
    last = is_last(x, *like)
    align = alignment(last, channels if last else width, x, *like)
    if last:
        size = tile_of_last(channels, align, 1024)
    else:
        size = {"TH": rows, "TW": 64, "BC": max(block, together), "RUN": 2}
    even = channels % size["BC"] == 0
    constants = {"LAST": last, "ALIGN": align, "EVEN": even, "NORMALIZE": together > 0, "TOGETHER": together}
    return small([size | {"num_warps": 4}]), constants


def local_similarity(
    x: Tensor, window: int, dilation: int, epsilon: float, planes: int
) -> tuple[Tensor, Tensor]:
    """As :func:`freqfusion.ops.local_similarity`, and what the backward pass needs.

    Returns:
        The similarities, and ``saved`` ``(B, planes, H, W)``, float32: one over each pixel's length, negative where
        that is below the floor; then the cosines with the later half of the neighbours. The other half are the same
        numbers seen from there. Of ``planes`` beyond those nothing is said.
    """
    batch, _, height, width = x.shape
    shape = (batch, window**2 - 1, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    saved = torch.empty((batch, planes, height, width), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, saved
    if window == 3:
        kernel, prepare = FORWARD
        launch(kernel, (x, out, saved, None, None, None, None), prepare, dilation, epsilon)
    else:
        launch(_forward_any_window, (x, out, saved), _any_forward_launch, window, dilation, epsilon)
    return out, saved


def _forward_launch(
    x: Tensor,
    out: Tensor,
    saved: Tensor,
    sums: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Tensor | None,
    dilation: int,
    epsilon: float,
    together: int = 0,
    variance_epsilon: float = 0.0,
) -> Launch:
    batch, channels, height, width = x.shape
    like = [x if is_last(x) else out] if normalized is None else [normalized]
    choices, constants = _tiles(x, 8 if x.dtype == torch.float32 else 16, 4, together, *like)
    numbers = [
        *(channels, height, width, epsilon, variance_epsilon),
        *(*x.stride(), *out.stride(), saved.stride(0)),
    ]
    constants |= {"dilation": dilation, "WIDE": is_wide(x, out, saved)}
    return Launch(partial(_of_tiles, batch, height, width), numbers, choices, constants)


FORWARD = similarity_forward, _forward_launch


def _of_tiles(batch: int, height: int, width: int, chosen: dict[str, int]) -> int:
    """Programs, one for each tile."""
    return batch * triton.cdiv(height, chosen["TH"]) * triton.cdiv(width, chosen["TW"])


def _any_forward_launch(
    x: Tensor, out: Tensor, saved: Tensor, window: int, dilation: int, epsilon: float
) -> Launch:
    batch, channels, height, width = x.shape
    return Launch(
        lambda chosen: batch * height * triton.cdiv(width, chosen["BLOCK_W"]),
        [channels, height, width, dilation, epsilon, *x.stride(), *out.stride(), saved.stride(0)],
        [{"BLOCK_W": size, "num_warps": 4} for size in (64, 32, 128)],
        {"WINDOW": window, "NEIGHBOURS": triton.next_power_of_2(window**2 - 1)},
    )


def local_similarity_backward(x: Tensor, saved: Tensor, grad: Tensor, window: int, dilation: int) -> Tensor:
    """Derivative of :func:`local_similarity` in ``x``, of its layout, given ``saved`` and the result's gradient."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    if out.numel() == 0:
        return out
    if window == 3:
        kernel, prepare = BACKWARD
        launch(kernel, (x, saved, grad, out, *[None] * 7), prepare, dilation)
    else:
        launch(_backward_any_window, (x, saved, grad, out), _any_backward_launch, window, dilation)
    return out


def _backward_launch(
    x: Tensor,
    saved: Tensor,
    grad: Tensor,
    out: Tensor,
    plus: Tensor | None,
    raw: Tensor | None,
    sums: Tensor | None,
    weight: Tensor | None,
    grad_sums: Tensor | None,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    dilation: int,
    together: int = 0,
    variance_epsilon: float = 0.0,
    summing: bool = False,
) -> Launch:
    batch, channels, height, width = x.shape
    more = [] if plus is None or raw is None else [plus, raw]
    choices, constants = _backward_tiles(x, together, out, *more)
    constants["ALIGN_GRAD"] = 1 if constants["LAST"] else alignment(False, width, grad)
    constants |= {"dilation": dilation, "WIDE": is_wide(x, saved, grad, out, *more)}
    numbers = [
        *(channels, height, width, batch, int(summing), variance_epsilon),
        *(*x.stride(), saved.stride(0), *grad.stride(), *out.stride()),
        *(stride for map_ in more or [out, out] for stride in map_.stride()),
    ]
    return Launch(partial(_of_tiles, batch, height, width), numbers, choices, constants)


BACKWARD = similarity_backward, _backward_launch


def _backward_tiles(x: Tensor, together: int, *like: Tensor) -> tuple[list[dict[str, int]], dict[str, int]]:
    single = x.dtype == torch.float32
    return _tiles(x, 8 if single else 4, 1 if single else 4, together, *like)


def backward_programs(x: Tensor, together: int, *like: Tensor) -> int:
    """How many programs take an image of ``x`` whose groups are normalised; ``like``: the other wide maps."""
    (chosen,), _ = _backward_tiles(x, together, *like)
    return _of_tiles(1, x.shape[2], x.shape[3], chosen)


def _any_backward_launch(
    x: Tensor, saved: Tensor, grad: Tensor, out: Tensor, window: int, dilation: int
) -> Launch:
    batch, channels, height, width = x.shape

    def programs(chosen: dict[str, int]) -> int:
        tiles = triton.cdiv(width, chosen["BLOCK_W"]) * triton.cdiv(channels, chosen["BLOCK_C"])
        return batch * height * tiles

    strides = (*x.stride(), saved.stride(0), *grad.stride(), *out.stride())
    choices = [
        {"BLOCK_C": rows, "BLOCK_W": columns, "num_warps": 4}
        for rows, columns in ((16, 32), (8, 64), (32, 32), (64, 8))
    ]
    return Launch(programs, [channels, height, width, dilation, *strides], choices, {"WINDOW": window})


def explain(x: Tensor) -> str:
    """Which kernels serve, and why not faster ones."""
    last = is_last(x)
    how = described(last, alignment(last, x.shape[1], x)) if last else "tiles of rows"
    return f"window 3x3: {how}; larger windows: rows (tiles hold four neighbours)"


def cases() -> Iterator[Case]:
    def call(dtype: torch.dtype, order: torch.memory_format, channels: int, width: int, window: int) -> None:
        x = torch.empty((2, channels, 200, width), dtype=dtype, memory_format=order)
        out, saved = local_similarity(x, window, 2, 1e-8, window**2 // 2 + 1)
        local_similarity_backward(x, saved, out, window, 2)

    for dtype in (torch.bfloat16, torch.float32):
        for order in (torch.contiguous_format, torch.channels_last):
            for channels, width, window in ((64, 336, 3), (21, 335, 3), (64, 336, 5)):
                name = f"local_similarity {window}x{window} {channels}x200x{width} {dtype} {order}"
                yield Case(name.replace("torch.", ""), partial(call, dtype, order, channels, width, window))
