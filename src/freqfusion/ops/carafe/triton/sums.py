"""The reassembly and its derivatives as plain sums, for every call; and what the other kernels share with them.

A program owns a stretch of one coarse row. The fine pixels whose windows are centred at one coarse pixel are its
*phases*, as in :mod:`freqfusion.ops.carafe.torch`: four at twice the size, at other ratios some of
``ceil(H / h) * ceil(W / w)`` that exist. A value of ``x`` is loaded once for up to four of them. Sums are float32,
and the order of those over taps, phases and channels does not depend on the tile sizes. Offsets into a tensor are
64 bit. A bad value reaches the windows that hold it and nothing else.
"""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._checks import is_channels_last
from freqfusion.ops._triton import INTERPRETED
from freqfusion.ops._triton.launch import Configuration, Launch, capability
from freqfusion.ops._triton.maps import Dense, dense
from freqfusion.ops.carafe.torch import fold_padding

MAX_PHASES = 4
"""Phases that a program computes at once."""

SIZES = ["channels", "groups", "h", "w", "height", "width", "margin", "keep", "has_more"]
"""Numbers that the kernels are not compiled again for."""
_STRIDES = [f"{name}_{axis}" for name in "xkgo" for axis in "bcthw"]


@triton.jit
def mirrored(place, length):
    """The row (or column) that a place of a window reads where the map is mirrored at its borders."""
    period = tl.maximum(2 * length - 2, 1)
    place = tl.abs(place) % period
    return tl.minimum(place, period - place)


@triton.jit
def _fine_pixels(
    i, j, phase, h, w, height, width, SCALE_Y: tl.constexpr, SCALE_X: tl.constexpr, EVEN: tl.constexpr
):
    """Rows (P, 1) and columns (P, W) of the phases (P,) of coarse pixels i, j (W,), and which of them exist."""
    top = i * SCALE_Y if EVEN else (i * height + h - 1) // h
    bottom = top + SCALE_Y if EVEN else ((i + 1) * height + h - 1) // h
    left = j * SCALE_X if EVEN else (j * width + w - 1) // w
    right = left + SCALE_X if EVEN else ((j + 1) * width + w - 1) // w
    row = (top + phase // SCALE_X)[:, None]
    column = left[None, :] + (phase % SCALE_X)[:, None]
    exists = (row < bottom) & (column < right[None, :]) & (j < w)[None, :]
    return row.to(tl.int64), column.to(tl.int64), exists


@triton.jit
def _scores(logits, window, k_t, exists, K: tl.constexpr, TAPS: tl.constexpr, WINDOWED: tl.constexpr):
    """Logits plus logarithm of the window, (P, TAPS, W); taps beyond the last have none."""
    tap = tl.arange(0, TAPS)
    real = tap < K * K
    at = logits[:, None, :] + tap.to(tl.int64)[None, :, None] * k_t
    scores = tl.load(at, mask=exists[:, None, :] & real[None, :, None], other=0.0).to(tl.float32)
    if WINDOWED:
        scores += tl.log(tl.load(window + tap, mask=real, other=1.0).to(tl.float32))[None, :, None]
    return tl.where(real[None, :, None], scores, float("-inf"))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=_STRIDES)
def carafe_sums_forward(
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
    x_c,
    x_h,
    x_w,
    k_b,
    k_t,
    k_h,
    k_w,
    o_b,
    o_c,
    o_h,
    o_w,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    REFLECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAIN: tl.constexpr,
    SCALE_Y: tl.constexpr,
    SCALE_X: tl.constexpr,
    EVEN: tl.constexpr,
    PLUS: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``kernels`` are logits if NORMALIZE; with a GAIN the result is taken from that many times ``x``.

    If PLUS, ``plus``, of the strides of ``out``, is added, and if ``keep`` is not 0, ``kept``, of those of
    ``kernels``, gets the kernels.
    """
    program = tl.program_id(0)
    blocks = (channels + BLOCK_C - 1) // BLOCK_C  # programs that follow each other share kernels
    keep = (keep != 0) & (program % blocks == 0)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= blocks
    blocks = (SCALE_Y * SCALE_X + PHASES - 1) // PHASES
    phase = program % blocks * PHASES + tl.arange(0, PHASES)
    program //= blocks
    blocks = (w + BLOCK_W - 1) // BLOCK_W
    j = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program //= blocks
    i = program % h
    program //= h
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    real = c < channels
    c = group * channels + c
    x += batch * x_b
    first_kernel = batch * k_b + group * (K * K) * k_t
    kernels += first_kernel
    row, column, exists = _fine_pixels(i, j, phase, h, w, height, width, SCALE_Y, SCALE_X, EVEN)
    pixel = row * k_h + column * k_w
    if NORMALIZE:
        scores = _scores(kernels + pixel, window, k_t, exists, K, TAPS, WINDOWED)
        peak = tl.max(scores, axis=1)
        share = 1.0 / tl.sum(tl.exp(scores - peak[:, None, :]), axis=1)
        if PLUS:
            tap = tl.arange(0, TAPS)
            kept += first_kernel + pixel[:, None, :] + tap.to(tl.int64)[None, :, None] * k_t
            weights = tl.exp(scores - peak[:, None, :]) * share[:, None, :]
            taken = exists[:, None, :] & (tap < K * K)[None, :, None] & keep
            tl.store(kept, weights.to(kept.dtype.element_ty), mask=taken)

    at = c[:, None] * x_c
    total = tl.full((PHASES, BLOCK_C, BLOCK_W), 0.0, tl.float32)
    for dy in range(K):
        down = i + dy - K // 2
        if REFLECT:
            down = mirrored(down, h)
        x_row = x + down.to(tl.int64) * x_h
        row_inside = (down + 0 * j >= 0) & (down + 0 * j < h)
        for dx in tl.static_range(K):
            weight = tl.load(kernels + pixel, mask=exists, other=0.0).to(tl.float32)
            kernels += k_t
            if NORMALIZE:
                if WINDOWED:
                    weight += tl.log(tl.load(window + dy * K + dx).to(tl.float32))
                weight = tl.exp(weight - peak) * share
            across = j + dx - K // 2
            if REFLECT:
                across = mirrored(across, w)
            inside = row_inside & (across >= 0) & (across < w)
            value = tl.load(
                x_row + at + (across.to(tl.int64) * x_w)[None, :],
                mask=real[:, None] & inside[None, :],
                other=0.0,
            )
            total += value.to(tl.float32)[None, :, :] * weight[:, None, :]
    if GAIN:
        at = at + (i.to(tl.int64) * x_h + j.to(tl.int64) * x_w)[None, :]
        value = tl.load(x + at, mask=real[:, None] & (j < w)[None, :], other=0.0).to(tl.float32)
        total = GAIN * value[None, :, :] - total
    at = batch * o_b + c[None, :, None] * o_c + (row * o_h + column * o_w)[:, None, :]
    stored = real[None, :, None] & exists[:, None, :]
    if PLUS:
        total += tl.load(plus + at, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=_STRIDES)
def carafe_sums_x(
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
    k_t,
    k_h,
    k_w,
    g_b,
    g_c,
    g_h,
    g_w,
    o_b,
    o_c,
    o_h,
    o_w,
    K: tl.constexpr,
    GAIN: tl.constexpr,
    SCALE_Y: tl.constexpr,
    SCALE_X: tl.constexpr,
    EVEN: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Gathers for each pixel of ``x`` with a ``margin`` around it what the windows that hold it sent.

    With a GAIN the kernels count negatively, and it is added to their centre.
    """
    program = tl.program_id(0)
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= blocks
    blocks = (w + 2 * margin + BLOCK_W - 1) // BLOCK_W
    j = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program //= blocks
    i = program % (h + 2 * margin)
    program //= h + 2 * margin
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    real = c < channels
    c = group * channels + c
    kernels += batch * k_b + group * (K * K) * k_t
    grad += batch * g_b
    sent = c[:, None] * g_c
    total = tl.full((BLOCK_C, BLOCK_W), 0.0, tl.float32)
    for dy in range(K):
        down = i - margin - dy + K // 2  # the centre of the windows whose tap (dy, dx) lies here
        top = down * SCALE_Y if EVEN else (down * height + h - 1) // h
        bottom = top + SCALE_Y if EVEN else ((down + 1) * height + h - 1) // h
        row_inside = (down + 0 * j >= 0) & (down + 0 * j < h)
        for dx in range(K):
            across = j - margin - dx + K // 2
            left = across * SCALE_X if EVEN else (across * width + w - 1) // w
            right = left + SCALE_X if EVEN else ((across + 1) * width + w - 1) // w
            inside = row_inside & (across >= 0) & (across < w)
            for block in range((SCALE_Y * SCALE_X + PHASES - 1) // PHASES):
                for place in tl.static_range(PHASES):
                    row = top + (block * PHASES + place) // SCALE_X
                    column = left + (block * PHASES + place) % SCALE_X
                    exists = inside & (row + 0 * column < bottom) & (column < right)
                    row = row.to(tl.int64)
                    column = column.to(tl.int64)
                    weight = tl.load(kernels + (row * k_h + column * k_w), mask=exists, other=0.0)
                    weight = weight.to(tl.float32)
                    if GAIN:
                        weight = tl.where((dy == K // 2) & (dx == K // 2), GAIN * 1.0, 0.0) - weight
                    at = sent + (row * g_h + column * g_w)[None, :]
                    value = tl.load(grad + at, mask=real[:, None] & exists[None, :], other=0.0)
                    total += value.to(tl.float32) * weight[None, :]
            kernels += k_t
    at = batch * o_b + c[:, None] * o_c + (i.to(tl.int64) * o_h + j.to(tl.int64) * o_w)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=real[:, None] & (j < w + 2 * margin)[None, :])


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=_STRIDES)
def carafe_sums_kernels(
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
    x_c,
    x_h,
    x_w,
    g_b,
    g_c,
    g_h,
    g_w,
    k_b,
    k_t,
    k_h,
    k_w,
    o_b,
    o_t,
    o_h,
    o_w,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    REFLECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    GAIN: tl.constexpr,
    SCALE_Y: tl.constexpr,
    SCALE_X: tl.constexpr,
    EVEN: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """All taps of some fine pixels at once, so that the derivative of their softmax ends it if NORMALIZE.

    Then ``applied`` receives the normalised kernels, and ``more``, if ``has_more`` is not 0, is a further gradient in
    them. All are of the strides of ``out``.
    """
    program = tl.program_id(0)
    blocks = (SCALE_Y * SCALE_X + PHASES - 1) // PHASES
    phase = program % blocks * PHASES + tl.arange(0, PHASES)
    program //= blocks
    blocks = (w + BLOCK_W - 1) // BLOCK_W
    j = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program //= blocks
    i = program % h
    program //= h
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    row, column, exists = _fine_pixels(i, j, phase, h, w, height, width, SCALE_Y, SCALE_X, EVEN)
    tap = tl.arange(0, TAPS)
    real = tap < K * K
    down = (i + tap // K - K // 2)[:, None]
    across = j[None, :] + (tap % K - K // 2)[:, None]
    if REFLECT:
        down = mirrored(down, h)
        across = mirrored(across, w)
    inside = real[:, None] & (down >= 0) & (down < h) & (across >= 0) & (across < w)
    read = down.to(tl.int64) * x_h + across.to(tl.int64) * x_w
    sent = row * g_h + column * g_w
    x += batch * x_b + group * channels * x_c
    grad += batch * g_b + group * channels * g_c
    total = tl.full((PHASES, TAPS, BLOCK_W), 0.0, tl.float32)
    for _ in tl.range(0, channels, loop_unroll_factor=4):
        value = tl.load(x + read, mask=inside, other=0.0).to(tl.float32)
        incoming = tl.load(grad + sent, mask=exists, other=0.0).to(tl.float32)
        total += incoming[:, None, :] * value[None, :, :]
        x += x_c
        grad += g_c

    at = batch * o_b + (group * (K * K) + tap)[None, :, None] * o_t + (row * o_h + column * o_w)[:, None, :]
    stored = exists[:, None, :] & real[None, :, None]
    if NORMALIZE:
        logits += batch * k_b + group * (K * K) * k_t
        scores = _scores(logits + row * k_h + column * k_w, window, k_t, exists, K, TAPS, WINDOWED)
        weight = tl.exp(scores - tl.max(scores, axis=1)[:, None, :])
        weight = weight / tl.sum(weight, axis=1)[:, None, :]
        total += tl.load(more + at, mask=stored & (has_more != 0), other=0.0).to(tl.float32)
        total = weight * (total - tl.sum(weight * total, axis=1)[:, None, :])
        if GAIN:
            total = -total
        tl.store(applied + at, weight.to(applied.dtype.element_ty), mask=stored)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)


class Call(NamedTuple):
    """What is asked for beside the tensors."""

    kernel_size: int
    groups: int
    reflect: bool = False
    """Whether borders are mirrored."""
    normalize: bool = False
    """Whether the kernels are logits."""
    gain: int = 0
    """Where not 0, the result is taken from that many times the map."""
    more: bool = False
    """Forward: whether the normalised kernels are kept. Backward: whether a further gradient in these comes."""


class Sizes(NamedTuple):
    """Of a reassembly."""

    kernel_size: int
    groups: int
    channels: int
    """Of one group."""
    h: int
    w: int
    height: int
    width: int

    @property
    def scale_y(self) -> int:
        return -(-self.height // self.h)

    @property
    def scale_x(self) -> int:
        return -(-self.width // self.w)

    @property
    def numbers(self) -> list[int]:
        return [self.channels, self.groups, self.h, self.w, self.height, self.width]

    @property
    def ratio(self) -> dict[str, Any]:
        even = (self.height, self.width) == (self.h * self.scale_y, self.w * self.scale_x)
        return {"SCALE_Y": self.scale_y, "SCALE_X": self.scale_x, "EVEN": even}

    @property
    def taps(self) -> int:
        """A power of two above the number of taps: one place is left for what is off the band."""
        return 1 << (self.kernel_size**2).bit_length()

    def arguments(
        self, coarse: tuple[Dense, ...], fine: tuple[Dense, ...]
    ) -> tuple[list[int], dict[str, Any]]:
        """Sizes, in units where that tells how the ends of rows of these maps are aligned."""
        c = math.gcd(8, self.channels)
        w = 1 if all(x.last for x in coarse) else math.gcd(8, self.w)
        width = 1 if all(x.last for x in fine) else math.gcd(8, self.width)
        sizes = [self.channels // c, self.groups, self.h, self.w // w, self.height, self.width // width]
        return sizes, {"C_UNIT": c, "W_UNIT": w, "WIDTH_UNIT": width}

    def tiles(self, batch: int, chosen: Configuration, margin: int = 0) -> int:
        rows, columns = self.h + 2 * margin, self.w + 2 * margin
        return batch * self.groups * triton.cdiv(rows, chosen["TH"]) * triton.cdiv(columns, chosen["TW"])


def sizes_of(x: Tensor, fine: Tensor, call: Call, margin: int = 0) -> Sizes:
    """Of a map ``x``, or of its gradient with a ``margin`` around it, and the fine map."""
    h, w = x.shape[2] - 2 * margin, x.shape[3] - 2 * margin
    channels = x.shape[1] // call.groups
    return Sizes(call.kernel_size, call.groups, channels, h, w, fine.shape[2], fine.shape[3])


def small(kernels: Tensor) -> Tensor:
    """Kernels or logits as a dense map; a copy of theirs is small beside the features."""
    return kernels if dense(kernels) else kernels.contiguous()


def padded_gradient(grad: Tensor, h: int, w: int, margin: int, memory: torch.memory_format) -> Tensor:
    """An empty map for the gradient in ``x`` and a ``margin`` around it, float32 if there is one."""
    return torch.empty(
        (*grad.shape[:2], h + 2 * margin, w + 2 * margin),
        dtype=torch.float32 if margin else grad.dtype,
        device=grad.device,
        memory_format=memory,
    )


def folded(out: Tensor, grad: Tensor, margin: int, memory: torch.memory_format) -> Tensor:
    """:func:`padded_gradient` as the gradient of ``x`` alone."""
    if not margin:
        return out
    return fold_padding(out, margin, True).to(grad.dtype).contiguous(memory_format=memory)


def _choices(x: Tensor, channels: int) -> list[Configuration]:
    """With lanes along channels or columns, whichever lie side by side; ``channels`` are those of a group."""
    if INTERPRETED:
        return [{"BLOCK_C": 8, "BLOCK_W": 8}]
    tiles = [(32, 16, 2), (64, 8, 4) if is_channels_last(x) else (8, 32, 4)]
    if channels > 32 or capability(x.device) < 90:  # where registers would spill
        tiles.reverse()
    return [{"BLOCK_C": c, "BLOCK_W": w, "num_warps": warps} for c, w, warps in tiles]


def _phases(sizes: Sizes) -> int:
    return min(MAX_PHASES, triton.next_power_of_2(sizes.scale_y * sizes.scale_x))


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
    phases = _phases(sizes)

    def programs(chosen: Configuration) -> int:
        tiles = triton.cdiv(sizes.w, chosen["BLOCK_W"]) * triton.cdiv(sizes.channels, chosen["BLOCK_C"])
        return batch * sizes.groups * sizes.h * tiles * triton.cdiv(sizes.scale_y * sizes.scale_x, phases)

    constants = {
        "K": call.kernel_size,
        "TAPS": triton.next_power_of_2(call.kernel_size**2),
        "REFLECT": call.reflect,
        "NORMALIZE": call.normalize,
        "WINDOWED": window is not None,
        "GAIN": call.gain,
        "PLUS": plus is not None,
        "PHASES": phases,
        **sizes.ratio,
    }
    numbers = [*sizes.numbers, int(call.more), *x.stride(), *kernels.stride(), *out.stride()]
    return Launch(programs, numbers, _choices(x, sizes.channels), constants)


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
    sizes, batch = sizes_of(x, grad, call), x.shape[0]
    phases = _phases(sizes)
    taps = triton.next_power_of_2(call.kernel_size**2)
    choices = [{"BLOCK_W": 8}]
    if not INTERPRETED:  # a program's sums are phases * taps * BLOCK_W, which have to fit into registers
        first = {"BLOCK_W": 32 if phases * taps <= 128 else 16, "num_warps": 4}
        choices = [first, {"BLOCK_W": 16, "num_warps": 4}]

    def programs(chosen: Configuration) -> int:
        blocks = triton.cdiv(sizes.w, chosen["BLOCK_W"]) * triton.cdiv(sizes.scale_y * sizes.scale_x, phases)
        return batch * sizes.groups * sizes.h * blocks

    strides = [*x.stride(), *grad.stride(), *(out if logits is None else logits).stride(), *out.stride()]
    constants = {
        "K": call.kernel_size,
        "TAPS": taps,
        "REFLECT": call.reflect,
        "NORMALIZE": logits is not None,
        "WINDOWED": window is not None,
        "GAIN": call.gain,
        "PHASES": phases,
        **sizes.ratio,
    }
    return Launch(programs, [*sizes.numbers, int(call.more), *strides], choices, constants)


def _x_launch(kernels: Tensor, grad: Tensor, out: Tensor, call: Call, margin: int) -> Launch:
    sizes, batch = sizes_of(out, grad, call, margin), grad.shape[0]

    def programs(chosen: Configuration) -> int:
        columns = triton.cdiv(sizes.w + 2 * margin, chosen["BLOCK_W"])
        blocks = columns * triton.cdiv(sizes.channels, chosen["BLOCK_C"])
        return batch * sizes.groups * (sizes.h + 2 * margin) * blocks

    numbers = [*sizes.numbers, margin, *kernels.stride(), *grad.stride(), *out.stride()]
    constants = {"K": call.kernel_size, "GAIN": call.gain, "PHASES": _phases(sizes), **sizes.ratio}
    return Launch(programs, numbers, _choices(grad, sizes.channels), constants)


FORWARD = carafe_sums_forward, _forward_launch
IN_KERNELS = carafe_sums_kernels, _kernels_launch
IN_X = carafe_sums_x, _x_launch
