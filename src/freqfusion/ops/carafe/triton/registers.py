"""The reassembly forward on the CUDA cores, for float32: kernels stay in registers, the loop over channels is inside.

A lane owns R coarse pixels of a column with all their phases, and where channels lie side by side one or more of
these. At the borders the columns of a window are shifted into the map and the weights with them, so that no load in
the loop has a mask. Then a bad value in one of the first or last ``kernel_size`` columns reaches each pixel whose
shifted window holds it, at most ``kernel_size // 2`` columns further than by the definition.
"""

# Triton gives the arguments of a kernel their types, and adds tuples, but does not unpack them in a tuple.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._triton import INTERPRETED
from freqfusion.ops._triton.launch import Configuration, Launch
from freqfusion.ops._triton.maps import dense, dense_map, map_strides, span, stride_names
from freqfusion.ops.carafe.triton.sums import SIZES, Call, Sizes, sizes_of

KERNEL_SIZES = (3, 5)
MAX_SCALE = 2


@triton.jit
def _pixel_kernels(
    kernels,
    window,
    kept,
    exists,
    keep,
    i,
    shift,
    h,
    k_t,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAIN: tl.constexpr,
    PLUS: tl.constexpr,
):
    """Weights of a window's places, for some fine pixels that are centred in rows i: one for each row and column.

    Place d of a row holds tap column d + ``shift``, zero if there is no such tap or the row is not in the map. The
    kernels as they are go to ``kept`` if PLUS and ``keep``.
    """
    weights = ()
    if NORMALIZE:
        tl.debug_barrier()  # or the loads of all phases are moved up here, and registers spill
        peak = tl.full(exists.shape, float("-inf"), tl.float32)
        scores = ()
        for t in tl.static_range(K * K):
            score = tl.load(kernels + t * k_t, mask=exists, other=0.0).to(tl.float32)
            peak = tl.maximum(peak, score)
            scores = scores + (score,)
        mass = tl.full(exists.shape, 0.0, tl.float32)
        powers = ()
        for t in tl.static_range(K * K):
            power = tl.exp(scores[t] - peak)
            if WINDOWED:
                power *= tl.load(window + t).to(tl.float32)
            mass += power
            powers = powers + (power,)
        share = 1.0 / mass
        if PLUS:
            for t in tl.static_range(K * K):
                weight = (powers[t] * share).to(kept.dtype.element_ty)
                tl.store(kept + t * k_t, weight, mask=exists & keep)
    for dy in tl.static_range(K):
        row_on = exists & (i + (dy - K // 2) >= 0) & (i + (dy - K // 2) < h)
        for dx in tl.static_range(K):
            if NORMALIZE:
                weight = powers[dy * K + dx]
                for moved in tl.static_range(1, K // 2 + 1):
                    if dx + moved < K:
                        weight = tl.where(shift == moved, powers[dy * K + dx + moved], weight)
                    else:
                        weight = tl.where(shift == moved, 0.0, weight)
                    if dx >= moved:
                        weight = tl.where(shift == -moved, powers[dy * K + dx - moved], weight)
                    else:
                        weight = tl.where(shift == -moved, 0.0, weight)
                weight = tl.where(row_on, weight * share, 0.0)
                if GAIN:
                    weight = -weight
                    if dy == K // 2:
                        weight += tl.where(dx + shift == K // 2, GAIN * 1.0, 0.0)
            else:
                on = row_on & (dx + shift >= 0) & (dx + shift < K)
                weight = tl.load(kernels + (dy * K + dx + shift) * k_t, mask=on, other=0.0).to(tl.float32)
            weights = weights + (weight,)
    return weights


@triton.jit(do_not_specialize=[*SIZES, *stride_names("x", "k", "o")])
def carafe_registers_forward(
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
    EVEN_C: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAIN: tl.constexpr,
    PLUS: tl.constexpr,
    R: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """TH x TW lanes; BLOCK_C channels at a time of CHANNELS in a program: one where columns lie side by side.

    ``plus`` and ``kept`` are as in :func:`freqfusion.ops.carafe.triton.sums.carafe_sums_forward`.
    """
    P: tl.constexpr = TH * TW
    channels = channels * C_UNIT
    w = w * W_UNIT
    width = width * WIDTH_UNIT
    x_b, x_c, x_h, x_w = map_strides(x_b, x_n, x_h, X_LAST, X_UNIT)
    k_b, k_t, k_h, k_w = map_strides(k_b, k_n, k_h, K_LAST, K_UNIT)
    o_b, o_c, o_h, o_w = map_strides(o_b, o_n, o_h, O_LAST, O_UNIT)
    program = tl.program_id(0)
    chunks = (channels + CHANNELS - 1) // CHANNELS
    first_c = program % chunks * CHANNELS
    keep = (keep != 0) & (first_c == 0)
    program //= chunks
    tiles = (w + TW - 1) // TW
    j0 = program % tiles * TW
    program //= tiles
    tiles = (h + TH * R - 1) // (TH * R)
    i0 = program % tiles * (TH * R)
    program //= tiles
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    p = tl.arange(0, P)
    i = i0 + p // TW * R
    j = j0 + p % TW
    left = tl.minimum(tl.maximum(j - K // 2, 0), w - K)
    shift = left - (j - K // 2)
    first_kernel = batch * k_b + group * (K * K) * k_t
    kernels += first_kernel
    weights = ()
    for r in tl.static_range(R):
        for py in tl.static_range(SCALE):
            for px in tl.static_range(SCALE):
                row = (i + r) * SCALE + py
                column = j * SCALE + px
                exists = (row < height) & (column < width)
                pixel = row * k_h + column * k_w
                taken = _pixel_kernels(
                    kernels + pixel,
                    window,
                    kept + (first_kernel + pixel) if PLUS else None,
                    exists,
                    keep,
                    i + r,
                    shift,
                    h,
                    k_t,
                    K,
                    NORMALIZE,
                    WINDOWED,
                    GAIN,
                    PLUS,
                )
                for t in tl.static_range(K * K):
                    weights = weights + (taken[t][:, None] if X_LAST else taken[t],)

    x += batch * x_b + (group * channels + first_c) * x_c
    first_value = batch * o_b + (group * channels + first_c) * o_c
    out += first_value
    if PLUS:
        plus += first_value
    reads = ()
    for q in tl.static_range(R + K - 1):
        source = tl.minimum(tl.maximum(i + (q - K // 2), 0), h - 1)
        reads = reads + (source * x_h + left * x_w,)
    count = tl.minimum(CHANNELS, channels - first_c)
    if X_LAST:
        written = (i * SCALE * o_h + j * SCALE * o_w)[:, None]
        for start in tl.range(0, count, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            real = (c < count)[None, :]
            values = ()
            for q in tl.static_range(R + K - 1):
                at = x + (reads[q][:, None] + (c * x_c)[None, :])
                for dx in tl.static_range(K):
                    if EVEN_C:
                        value = tl.load(at + dx * x_w)
                    else:
                        value = tl.load(at + dx * x_w, mask=real, other=0.0)
                    values = values + (value.to(tl.float32),)
            for r in tl.static_range(R):
                for py in tl.static_range(SCALE):
                    for px in tl.static_range(SCALE):
                        total = _sum_of(values, weights, r * K, ((r * SCALE + py) * SCALE + px) * K * K, K)
                        at = written + ((r * SCALE + py) * o_h + px * o_w) + (c * o_c)[None, :]
                        stored = (((i + r) * SCALE + py < height) & (j * SCALE + px < width))[:, None]
                        if not EVEN_C:
                            stored = stored & real
                        if PLUS:
                            total += tl.load(plus + at, mask=stored, other=0.0).to(tl.float32)
                        tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)
    else:
        p = tl.arange(0, P * SCALE)
        row = (i0 + p // (TW * SCALE) * R) * SCALE
        column = j0 * SCALE + p % (TW * SCALE)
        written = row * o_h + column * o_w
        ahead = ()  # the middle column a channel early, which fills the cache
        for q in tl.static_range(R + K - 1):
            ahead = ahead + (tl.load(x + reads[q] + K // 2 * x_w),)
        for turn in tl.range(0, count):
            values = ()
            for q in tl.static_range(R + K - 1):
                for dx in tl.static_range(K):
                    if dx == K // 2:
                        values = values + (ahead[q].to(tl.float32),)
                    else:
                        values = values + (tl.load(x + reads[q] + dx * x_w).to(tl.float32),)
            x += tl.where(turn + 1 < count, x_c, 0).to(tl.int64)
            later = ()
            for q in tl.static_range(R + K - 1):
                later = later + (tl.load(x + reads[q] + K // 2 * x_w),)
            ahead = later
            for r in tl.static_range(R):
                for py in tl.static_range(SCALE):
                    total = _sum_of(values, weights, r * K, (r * SCALE + py) * SCALE * K * K, K)
                    if SCALE == 2:
                        other = _sum_of(values, weights, r * K, ((r * SCALE + py) * SCALE + 1) * K * K, K)
                        total = tl.interleave(total, other)
                    stored = (row + (r * SCALE + py) < height) & (column < width)
                    at = written + (r * SCALE + py) * o_h
                    if PLUS:
                        total += tl.load(plus + at, mask=stored, other=0.0).to(tl.float32)
                    tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)
            out += o_c
            if PLUS:
                plus += o_c


@triton.jit
def _sum_of(values, weights, FIRST_VALUE: tl.constexpr, FIRST_WEIGHT: tl.constexpr, K: tl.constexpr):
    total = values[FIRST_VALUE] * weights[FIRST_WEIGHT]
    for t in tl.static_range(1, K * K):
        total += values[FIRST_VALUE + t] * weights[FIRST_WEIGHT + t]
    return total


def _choices(sizes: Sizes, last: bool, single: bool) -> list[Configuration]:
    """``single``: float32. EVEN_C: no block of channels needs a mask."""
    kernel_size, scale, channels = sizes.kernel_size, sizes.scale_y, sizes.channels
    options = {"num_warps": 4, "num_stages": 2}
    if INTERPRETED:
        tile = {"R": 2 if scale == 1 else 1, "TH": 2, "TW": 4, "CHANNELS": 8, "BLOCK_C": 4 if last else 1}
        return [tile | options | {"EVEN_C": channels % tile["BLOCK_C"] == 0}]
    if last:
        rows = 2 if (kernel_size, scale) == (3, 1) else 1
        tiles = [{"R": rows, "TH": 2, "TW": 4, "CHANNELS": 2**20, "BLOCK_C": 64}]
        tiles.append({"R": rows, "TH": 2, "TW": 2, "CHANNELS": 2**20, "BLOCK_C": 128})
    elif scale == 1:
        rows = 4 if kernel_size == 3 else 2
        tiles = [{"R": rows, "TH": 2, "TW": 64, "CHANNELS": 32, "BLOCK_C": 1}]
        tiles.append({"R": rows, "TH": 4, "TW": 32, "CHANNELS": 32, "BLOCK_C": 1})
        options["num_warps"] = 2 if kernel_size == 3 and single else 4
    else:
        tiles = [{"R": 1, "TH": 8, "TW": 16, "CHANNELS": 32, "BLOCK_C": 1}]
        tiles.append({"R": 1, "TH": 4, "TW": 32, "CHANNELS": 64, "BLOCK_C": 1})
    return [tile | options | {"EVEN_C": channels % tile["BLOCK_C"] == 0} for tile in tiles]


def why_not(
    kernel_size: int, groups: int, x: Tensor, fine: tuple[int, int], reflect: bool, normalize: bool
) -> str:
    """Why these kernels cannot serve, or ``""``; ``fine`` are the sides of the result."""
    h, w = x.shape[-2:]
    scale = max(1, fine[0] // h)
    if reflect:
        return "they do not mirror borders"
    if kernel_size not in KERNEL_SIZES:
        return f"they are for kernels of {' and '.join(map(str, KERNEL_SIZES))}, got {kernel_size}"
    if normalize and kernel_size > 3:
        return "the softmax of so many logits does not fit into registers"
    if fine != (h * scale, w * scale) or scale > MAX_SCALE:
        return "they are for maps of the same and of twice the size"
    if w < kernel_size:
        return "the map is narrower than a window"
    found = dense(x, groups)
    if found is None:
        return "neither channels nor columns lie side by side in memory"
    if found.last and found.unit < 4 and (kernel_size, scale) == (5, 2):
        return "registers would spill: the channels of a group, or a stride, are not a multiple of 4"
    if span(x) >= 2**31:
        return "one image spans 2**31 values or more"
    return ""


def _forward_launch(
    x: Tensor,
    kernels: Tensor,
    window: Tensor | None,
    out: Tensor,
    plus: Tensor | None,
    kept: Tensor,
    call: Call,
) -> Launch:
    sizes, batch = sizes_of(x, kernels, call), x.shape[0]
    x_map, k_map, o_map = (
        dense_map(x, sizes.groups),
        dense_map(kernels),
        dense_map(out, sizes.groups),
    )
    numbers, units = sizes.arguments((x_map,), (k_map, o_map))

    def programs(chosen: Configuration) -> int:
        rows = triton.cdiv(sizes.h, chosen["TH"] * chosen["R"])
        tiles = rows * triton.cdiv(sizes.w, chosen["TW"])
        return batch * sizes.groups * tiles * triton.cdiv(sizes.channels, chosen["CHANNELS"])

    constants = {
        **units,
        **x_map.constants("X"),
        **k_map.constants("K"),
        **o_map.constants("O"),
        "K": call.kernel_size,
        "SCALE": sizes.scale_y,
        "NORMALIZE": call.normalize,
        "WINDOWED": window is not None,
        "GAIN": call.gain,
        "PLUS": plus is not None,
    }
    return Launch(
        programs,
        [*numbers, int(call.more), *x_map.strides, *k_map.strides, *o_map.strides],
        _choices(sizes, x_map.last, x.dtype == torch.float32),
        constants,
    )


FORWARD = carafe_registers_forward, _forward_launch
