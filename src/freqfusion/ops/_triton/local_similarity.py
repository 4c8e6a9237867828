"""The local similarity and its derivative: all neighbours of a stretch of one row at once."""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._checks import layout
from freqfusion.ops._triton.launch import launch, tuned, tuning


@tuned([(32, 4), (64, 4), (128, 4), (128, 8)], ["tuning", "WINDOW"], ["BLOCK_W"])
@triton.jit(do_not_specialize=["tuning"])
def _forward(
    x,
    out,
    tuning,
    channels,
    height,
    width,
    dilation,
    epsilon,
    x_b,
    x_c,
    x_h,
    x_w,
    o_b,
    o_c,
    o_h,
    o_w,
    WINDOW: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = (width + BLOCK_W - 1) // BLOCK_W
    j = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    program //= blocks
    i = program % height
    batch = (program // height).to(tl.int64)

    number = tl.arange(0, NEIGHBOURS)
    real = number < WINDOW * WINDOW - 1
    tap = number + number // (WINDOW * WINDOW // 2)  # the centre is left out
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
    own = tl.maximum(tl.sqrt(own), epsilon)
    similarity = product / (own[None, :] * tl.maximum(tl.sqrt(theirs), epsilon))
    similarity = tl.where(inside, similarity, 0.0)  # of a bad value too there is none outside
    here = (i + 0 * j).to(tl.int64) * o_h + j.to(tl.int64) * o_w
    at = batch * o_b + number.to(tl.int64)[:, None] * o_c + here[None, :]
    tl.store(out + at, similarity, mask=real[:, None] & (j < width)[None, :])


@tuned([(8, 64, 4), (16, 32, 4), (32, 32, 4), (64, 8, 4)], ["tuning", "WINDOW"], ["BLOCK_C", "BLOCK_W"])
@triton.jit(do_not_specialize=["tuning"])
def _backward(
    x,
    similarity,
    grad,
    norms,
    out,
    tuning,
    channels,
    height,
    width,
    dilation,
    epsilon,
    x_b,
    x_c,
    x_h,
    x_w,
    s_b,
    s_c,
    s_h,
    s_w,
    g_b,
    g_c,
    g_h,
    g_w,
    o_b,
    o_c,
    o_h,
    o_w,
    WINDOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
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

    x += batch * x_b
    similarity += batch * s_b
    grad += batch * g_b
    norms += batch * height * width  # contiguous
    real = c < channels
    valid = j < width
    c = c.to(tl.int64)
    row = i.to(tl.int64)
    column = j.to(tl.int64)
    norm = tl.load(norms + row * width + column, mask=valid, other=1.0)
    inverse = 1.0 / tl.maximum(norm, epsilon)
    radial = tl.full((BLOCK_W,), 0.0, tl.float32)
    total = tl.full((BLOCK_C, BLOCK_W), 0.0, tl.float32)
    for neighbour in range(WINDOW * WINDOW - 1):
        tap = neighbour + neighbour // (WINDOW * WINDOW // 2)
        number = tl.cast(neighbour, tl.int64)
        mirrored = WINDOW * WINDOW - 2 - number
        down = row + (tap // WINDOW - WINDOW // 2) * dilation
        across = column + (tap % WINDOW - WINDOW // 2) * dilation
        inside = valid & (down >= 0) & (down < height) & (across >= 0) & (across < width)
        own = tl.load(grad + number * g_c + row * g_h + column * g_w, mask=inside, other=0.0)
        theirs = tl.load(grad + mirrored * g_c + down * g_h + across * g_w, mask=inside, other=0.0)
        cosine = tl.load(similarity + number * s_c + row * s_h + column * s_w, mask=inside, other=0.0)
        other = tl.load(norms + down * width + across, mask=inside, other=1.0)
        incoming = own.to(tl.float32) + theirs.to(tl.float32)
        radial += incoming * cosine
        weight = incoming * inverse / tl.maximum(other, epsilon)
        at = c[:, None] * x_c + (down * x_h + across * x_w)[None, :]
        value = tl.load(x + at, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += weight[None, :] * value
    # a pixel's own length changes nothing, unless it is below the floor
    weight = tl.where(norm > epsilon, radial * inverse * inverse, 0.0)
    at = c[:, None] * x_c + (row * x_h + column * x_w)[None, :]
    value = tl.load(x + at, mask=real[:, None] & valid[None, :], other=0.0).to(tl.float32)
    total -= weight[None, :] * value
    at = batch * o_b + c[:, None] * o_c + (row * o_h + column * o_w)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=real[:, None] & valid[None, :])


def local_similarity(x: Tensor, window: int, dilation: int, epsilon: float) -> Tensor:
    """As :func:`freqfusion.ops.local_similarity`, float32."""
    batch, channels, height, width = x.shape
    neighbours = window**2 - 1
    out = torch.empty((batch, neighbours, height, width), dtype=torch.float32, device=x.device)
    if out.numel():
        launch(
            _forward,
            lambda chosen: batch * height * triton.cdiv(width, chosen["BLOCK_W"]),
            out,
            x,
            out,
            tuning(x, channels),
            channels,
            height,
            width,
            dilation,
            epsilon,
            *x.stride(),
            *out.stride(),
            WINDOW=window,
            NEIGHBOURS=triton.next_power_of_2(neighbours),
        )
    return out


def local_similarity_backward(
    x: Tensor, similarity: Tensor, grad: Tensor, window: int, dilation: int, epsilon: float
) -> Tensor:
    """Derivative of :func:`local_similarity` in ``x``, given its result and the gradient of that."""
    batch, channels, height, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    if out.numel() == 0:
        return out
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).contiguous()

    def programs(chosen: dict[str, Any]) -> int:
        tiles = triton.cdiv(width, chosen["BLOCK_W"]) * triton.cdiv(channels, chosen["BLOCK_C"])
        return batch * height * tiles

    launch(
        _backward,
        programs,
        out,
        x,
        similarity,
        grad,
        norms,
        out,
        tuning(x, channels),
        channels,
        height,
        width,
        dilation,
        epsilon,
        *x.stride(),
        *similarity.stride(),
        *grad.stride(),
        *out.stride(),
        WINDOW=window,
    )
    return out
