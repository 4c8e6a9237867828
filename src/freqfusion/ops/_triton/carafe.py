"""The reassembly, its two adjoints, and the reassembly from logits.

A program owns a stretch of one coarse row. The fine pixels whose windows are centred at one coarse pixel are its
*phases*, as in :mod:`freqfusion.ops.carafe.phases`: four at twice the size, at other ratios some of
``ceil(H / h) * ceil(W / w)`` that exist. A value of ``x`` is loaded once for up to four of them. Sums are float32,
and the order of those over taps, phases and channels does not depend on the tile sizes. Offsets into a tensor are
64 bit.
"""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._checks import layout
from freqfusion.ops._triton.launch import launch, tuned, tuning
from freqfusion.ops.carafe.phases import fold_padding

MAX_PHASES = 4
"""Phases that a program computes at once."""


@triton.jit
def _mirrored(place, length):
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


@tuned(
    [(8, 64, 4), (16, 32, 4), (32, 32, 4), (64, 8, 4)],
    ["tuning", "K", "NORMALIZE", "PHASES"],
    ["BLOCK_C", "BLOCK_W"],
)
@triton.jit(do_not_specialize=["tuning"])
def _forward(
    x,
    kernels,
    window,
    out,
    tuning,
    channels,
    groups,
    h,
    w,
    height,
    width,
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
    PHASES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``kernels`` are logits if NORMALIZE; with a GAIN the result is taken from that many times ``x``."""
    program = tl.program_id(0)
    blocks = (channels + BLOCK_C - 1) // BLOCK_C  # programs that follow each other share kernels
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
    kernels += batch * k_b + group * (K * K) * k_t
    row, column, exists = _fine_pixels(i, j, phase, h, w, height, width, SCALE_Y, SCALE_X, EVEN)
    pixel = row * k_h + column * k_w
    if NORMALIZE:
        scores = _scores(kernels + pixel, window, k_t, exists, K, TAPS, WINDOWED)
        peak = tl.max(scores, axis=1)
        share = 1.0 / tl.sum(tl.exp(scores - peak[:, None, :]), axis=1)

    at = c[:, None] * x_c
    total = tl.full((PHASES, BLOCK_C, BLOCK_W), 0.0, tl.float32)
    for dy in range(K):
        down = i + dy - K // 2
        if REFLECT:
            down = _mirrored(down, h)
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
                across = _mirrored(across, w)
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
    tl.store(out + at, total.to(out.dtype.element_ty), mask=real[None, :, None] & exists[:, None, :])


@tuned([(8, 64, 4), (16, 32, 4), (32, 32, 4), (64, 8, 4)], ["tuning", "K", "PHASES"], ["BLOCK_C", "BLOCK_W"])
@triton.jit(do_not_specialize=["tuning"])
def _backward_x(
    kernels,
    grad,
    out,
    tuning,
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
    SCALE_Y: tl.constexpr,
    SCALE_X: tl.constexpr,
    EVEN: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Gathers for each pixel of ``x`` with a ``margin`` around it what the windows that hold it sent."""
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
        for dx in tl.static_range(K):
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
                    at = sent + (row * g_h + column * g_w)[None, :]
                    value = tl.load(grad + at, mask=real[:, None] & exists[None, :], other=0.0)
                    total += value.to(tl.float32) * weight.to(tl.float32)[None, :]
            kernels += k_t
    at = batch * o_b + c[:, None] * o_c + (i.to(tl.int64) * o_h + j.to(tl.int64) * o_w)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=real[:, None] & (j < w + 2 * margin)[None, :])


@tuned([(8, 4), (16, 4), (32, 4), (32, 8)], ["tuning", "K", "NORMALIZE", "PHASES"], ["BLOCK_W"])
@triton.jit(do_not_specialize=["tuning"])
def _backward_kernels(
    x,
    grad,
    logits,
    window,
    out,
    applied,
    tuning,
    channels,
    groups,
    h,
    w,
    height,
    width,
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

    Then ``applied``, of the strides of ``out``, receives the kernels that the forward pass amounted to.
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
        down = _mirrored(down, h)
        across = _mirrored(across, w)
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
        total = weight * (total - tl.sum(weight * total, axis=1)[:, None, :])
        if GAIN:
            total = -total
            weight = tl.where(tap == K * K // 2, GAIN * 1.0, 0.0)[None, :, None] - weight
        tl.store(applied + at, weight, mask=stored)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)


def _sizes(h: int, w: int, height: int, width: int) -> dict[str, Any]:
    scale_y, scale_x = -(-height // h), -(-width // w)
    return {
        "SCALE_Y": scale_y,
        "SCALE_X": scale_x,
        "EVEN": (height, width) == (h * scale_y, w * scale_x),
        "PHASES": min(MAX_PHASES, triton.next_power_of_2(scale_y * scale_x)),
    }


def _run_forward(
    x: Tensor,
    kernels: Tensor,
    window: Tensor | None,
    kernel_size: int,
    groups: int,
    reflect: bool,
    normalize: bool,
    gain: int,
) -> Tensor:
    (batch, channels, h, w), (height, width) = x.shape, kernels.shape[-2:]
    out = torch.empty(
        (batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout(x)
    )
    if out.numel() == 0:
        return out
    sizes = _sizes(h, w, height, width)
    channels //= groups

    def programs(chosen: dict[str, int]) -> int:
        phase_blocks = triton.cdiv(sizes["SCALE_Y"] * sizes["SCALE_X"], sizes["PHASES"])
        tiles = triton.cdiv(w, chosen["BLOCK_W"]) * triton.cdiv(channels, chosen["BLOCK_C"])
        return batch * groups * h * tiles * phase_blocks

    launch(
        _forward,
        programs,
        out,
        x,
        kernels,
        window,
        out,
        tuning(x, channels),
        channels,
        groups,
        h,
        w,
        height,
        width,
        *x.stride(),
        *kernels.stride(),
        *out.stride(),
        K=kernel_size,
        TAPS=triton.next_power_of_2(kernel_size**2),
        REFLECT=reflect,
        NORMALIZE=normalize,
        WINDOWED=window is not None,
        GAIN=gain,
        **sizes,
    )
    return out


def _run_backward_kernels(
    x: Tensor,
    grad: Tensor,
    logits: Tensor | None,
    window: Tensor | None,
    out: Tensor,
    applied: Tensor | None,
    kernel_size: int,
    groups: int,
    reflect: bool,
    gain: int,
) -> None:
    (batch, channels, h, w), (height, width) = x.shape, grad.shape[-2:]
    sizes = _sizes(h, w, height, width)
    channels //= groups

    def programs(chosen: dict[str, int]) -> int:
        phase_blocks = triton.cdiv(sizes["SCALE_Y"] * sizes["SCALE_X"], sizes["PHASES"])
        return batch * groups * h * triton.cdiv(w, chosen["BLOCK_W"]) * phase_blocks

    launch(
        _backward_kernels,
        programs,
        out,
        x,
        grad,
        logits,
        window,
        out,
        applied,
        tuning(x, channels),
        channels,
        groups,
        h,
        w,
        height,
        width,
        *x.stride(),
        *grad.stride(),
        *(out if logits is None else logits).stride(),
        *out.stride(),
        K=kernel_size,
        TAPS=triton.next_power_of_2(kernel_size**2),
        REFLECT=reflect,
        NORMALIZE=logits is not None,
        WINDOWED=window is not None,
        GAIN=gain,
        **sizes,
    )


def carafe(x: Tensor, kernels: Tensor, kernel_size: int, groups: int, reflect: bool) -> Tensor:
    """As :func:`freqfusion.ops.carafe.phases.carafe`."""
    return _run_forward(x, kernels, None, kernel_size, groups, reflect, normalize=False, gain=0)


def carafe_backward_x(
    kernels: Tensor, grad: Tensor, h: int, w: int, kernel_size: int, groups: int, reflect: bool
) -> Tensor:
    """As :func:`freqfusion.ops.carafe.phases.carafe_backward_x`."""
    batch, channels, height, width = grad.shape
    margin = kernel_size // 2 if reflect else 0
    out = torch.empty(
        (batch, channels, h + 2 * margin, w + 2 * margin),
        dtype=torch.float32 if reflect else grad.dtype,
        device=grad.device,
        memory_format=layout(grad),
    )
    if grad.numel() == 0:
        return grad.new_zeros(batch, channels, h, w).contiguous(memory_format=layout(grad))
    sizes = _sizes(h, w, height, width)
    channels //= groups

    def programs(chosen: dict[str, int]) -> int:
        tiles = triton.cdiv(w + 2 * margin, chosen["BLOCK_W"]) * triton.cdiv(channels, chosen["BLOCK_C"])
        return batch * groups * (h + 2 * margin) * tiles

    launch(
        _backward_x,
        programs,
        out,
        kernels,
        grad,
        out,
        tuning(grad, channels),
        channels,
        groups,
        h,
        w,
        height,
        width,
        margin,
        *kernels.stride(),
        *grad.stride(),
        *out.stride(),
        K=kernel_size,
        **sizes,
    )
    if not reflect:
        return out
    folded = fold_padding(out, margin, reflect)
    return folded.to(grad.dtype).contiguous(memory_format=layout(grad))


def carafe_backward_kernels(x: Tensor, grad: Tensor, kernel_size: int, groups: int, reflect: bool) -> Tensor:
    """As :func:`freqfusion.ops.carafe.phases.carafe_backward_kernels`."""
    shape = (x.shape[0], groups * kernel_size**2, *grad.shape[-2:])
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    if out.numel():
        _run_backward_kernels(x, grad, None, None, out, None, kernel_size, groups, reflect, gain=0)
    return out


def carafe_from_logits(
    x: Tensor, logits: Tensor, window: Tensor | None, kernel_size: int, groups: int, reflect: bool, gain: int
) -> Tensor:
    """As :func:`freqfusion.ops.carafe.logits.carafe_from_logits`, in one pass."""
    return _run_forward(x, logits, window, kernel_size, groups, reflect, normalize=True, gain=gain)


def carafe_from_logits_backward(
    x: Tensor,
    logits: Tensor,
    window: Tensor | None,
    grad: Tensor,
    kernel_size: int,
    groups: int,
    reflect: bool,
    gain: int,
) -> tuple[Tensor, Tensor]:
    """Derivatives of :func:`carafe_from_logits` in ``x`` and ``logits``, of their dtypes."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=x.device)
    applied = torch.empty(logits.shape, dtype=torch.float32, device=x.device)
    if logits.numel():
        _run_backward_kernels(
            x, grad, logits, window, grad_logits, applied, kernel_size, groups, reflect, gain
        )
    h, w = x.shape[-2:]
    return carafe_backward_x(applied, grad, h, w, kernel_size, groups, reflect), grad_logits
