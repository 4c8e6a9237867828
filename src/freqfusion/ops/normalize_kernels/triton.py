"""Normalisation of predicted kernels and its derivative, both from the logits."""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._checks import layout
from freqfusion.ops._triton.launch import Launch, launch
from freqfusion.ops._triton.registry import Case
from freqfusion.ops._triton.tiles import aligned, alignment, compiled, is_wide, pixel_stride


@triton.jit
def _weights(
    logits, window, program, pixels, groups, x_b, x_c, x_p,
    TAPS: tl.constexpr, PAD: tl.constexpr, BP: tl.constexpr, RUN: tl.constexpr, WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Normalised kernels ``(PAD, BP)`` of some pixels and one group; their channels, pixels, mask and image.

    RUN: how many neighbouring pixels one thread takes; 0 leaves it to the compiler.
    """
    blocks = (pixels + BP - 1) // BP
    p = program % blocks * BP + tl.arange(0, BP)
    if RUN > 0:
        p = tl.max_contiguous(p, [RUN])
    program //= blocks
    image = (program // groups).to(tl.int64)
    tap = tl.arange(0, PAD)
    mask = (tap < TAPS)[:, None] & (p < pixels)[None, :]
    first = program % groups * TAPS
    if WIDE:
        first = first.to(tl.int64)
        tap = tap.to(tl.int64)
        p = p.to(tl.int64)
    at = logits + image * x_b + ((first + tap)[:, None] * x_c + p[None, :] * x_p)
    score = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if WINDOW:
        score += tl.log(tl.load(window + tap, mask=tap < TAPS, other=1.0).to(tl.float32))[:, None]
    score = tl.where((tap < TAPS)[:, None], score, float("-inf"))
    share = tl.exp(score - tl.max(score, axis=0)[None, :])
    share *= (1.0 / tl.sum(share, axis=0))[None, :]
    return share, first + tap, p, mask, image


@compiled
def _forward(
    logits, window, out, pixels, groups, x_b, x_c, x_p, o_b, o_c, o_p,
    TAPS: tl.constexpr, PAD: tl.constexpr, WINDOW: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BP: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    pixels = aligned(pixels, ALIGN)
    x_b = aligned(x_b, ALIGN)
    x_c = aligned(x_c, ALIGN)
    o_b = aligned(o_b, ALIGN)
    o_c = aligned(o_c, ALIGN)
    share, channel, p, mask, image = _weights(
        logits, window, tl.program_id(0), pixels, groups, x_b, x_c, x_p, TAPS, PAD, BP, RUN, WINDOW, WIDE
    )
    at = out + image * o_b + (channel[:, None] * o_c + p[None, :] * o_p)
    tl.store(at, share.to(out.dtype.element_ty), mask=mask)


@compiled
def _backward(
    logits, window, grad, out, pixels, groups, x_b, x_c, x_p, g_b, g_c, g_p, o_b, o_c, o_p,
    TAPS: tl.constexpr, PAD: tl.constexpr, WINDOW: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BP: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """kernels * (grad - sum of kernels * grad), with a window as without."""
    pixels = aligned(pixels, ALIGN)
    x_b = aligned(x_b, ALIGN)
    x_c = aligned(x_c, ALIGN)
    g_b = aligned(g_b, ALIGN)
    g_c = aligned(g_c, ALIGN)
    o_b = aligned(o_b, ALIGN)
    o_c = aligned(o_c, ALIGN)
    share, channel, p, mask, image = _weights(
        logits, window, tl.program_id(0), pixels, groups, x_b, x_c, x_p, TAPS, PAD, BP, RUN, WINDOW, WIDE
    )
    at = grad + image * g_b + (channel[:, None] * g_c + p[None, :] * g_p)
    incoming = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = share * (incoming - tl.sum(share * incoming, axis=0)[None, :])
    at = out + image * o_b + (channel[:, None] * o_c + p[None, :] * o_p)
    tl.store(at, value.to(out.dtype.element_ty), mask=mask)


def _run(kernel: object, window: Tensor | None, taps: int, *maps: Tensor) -> None:
    """Run a kernel on maps of one shape, the last of which it fills."""
    if maps[-1].numel() == 0:
        return
    first, *rest = (x if pixel_stride(x) is not None else x.contiguous() for x in maps)
    tensors = (first, first if window is None else window.reshape(-1), *rest)
    launch(kernel, tensors, _prepare, taps, window is not None)


def _prepare(logits: Tensor, *others: Any) -> Launch:
    """Of the window, the other maps, the number of taps and whether there is a window."""
    _, *rest, taps, windowed = others
    maps = [logits, *rest]
    batch, channels, height, width = logits.shape
    pixels = height * width
    strides: list[Any] = [number for x in maps for number in (x.stride(0), x.stride(1), pixel_stride(x))]
    padded = triton.next_power_of_2(taps)
    rows = all(pixel_stride(x) == 1 for x in maps)
    # measured on an H100 with 25 taps in bfloat16
    if rows:
        choice = {"BP": max(2, min(256, 8192 // padded)), "RUN": 2, "num_warps": 4}
    else:
        choice = {"BP": max(1, min(64, 1024 // padded)), "RUN": 0, "num_warps": 4}
    flat = [x.flatten(2).unsqueeze(2) for x in maps]
    constants = {
        "TAPS": taps,
        "PAD": padded,
        "WINDOW": windowed,
        "ALIGN": alignment(False, pixels, *flat) if rows else 1,
        "WIDE": is_wide(*maps),
    }
    return Launch(
        lambda chosen: batch * (channels // taps) * triton.cdiv(pixels, chosen["BP"]),
        [pixels, channels // taps, *strides],
        [choice],
        constants,
    )


def normalize_kernels(logits: Tensor, window: Tensor | None, taps: int) -> Tensor:
    """As :func:`freqfusion.ops.normalize_kernels`, in the layout of ``logits``; ``taps`` of each group."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=layout(logits))
    _run(_forward, window, taps, logits, out)
    return out


def normalize_kernels_backward(logits: Tensor, window: Tensor | None, grad: Tensor, taps: int) -> Tensor:
    """Derivative of :func:`normalize_kernels` in ``logits``, of their dtype and layout."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=layout(logits))
    _run(_backward, window, taps, logits, grad, out)
    return out


def cases() -> Iterator[Case]:
    def call(dtype: torch.dtype, order: torch.memory_format, side: int, width: int) -> None:
        logits = torch.empty((2, side**2, 200, width), dtype=dtype, memory_format=order)
        window = torch.empty(side, side)
        out = normalize_kernels(logits, window, side**2)
        normalize_kernels_backward(logits, window, out, side**2)

    for dtype in (torch.bfloat16, torch.float32):
        for order in (torch.contiguous_format, torch.channels_last):
            for side, width in ((5, 336), (3, 335), (11, 336)):
                name = f"normalize_kernels {side}x{side} 200x{width} {dtype} {order}".replace("torch.", "")
                yield Case(name, partial(call, dtype, order, side, width))
