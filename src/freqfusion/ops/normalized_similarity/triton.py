"""Group normalisation and the local similarity of its result on a GPU.

torch's own takes a block of threads for each group of each image, a few dozen that read all. Here hundreds of
programs sum over their pixels, so that the whole GPU reads, and the kernels of the similarity normalise what they
read: forward they write it into the channels before theirs, backward they run twice, first for the sums that its
derivative needs. The sums are added in a fixed order. A bad value reaches its group of its image, as by the
definition.
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
from freqfusion.ops._triton.groups import origin_of
from freqfusion.ops._triton.launch import Launch, launch
from freqfusion.ops._triton.registry import Case
from freqfusion.ops._triton.tiles import compiled, is_wide, pixel_stride
from freqfusion.ops.local_similarity.naive import EPSILON
from freqfusion.ops.local_similarity.triton import BACKWARD, FORWARD, backward_programs

PROGRAMS = 1024
"""That sum: enough for every GPU of today."""
DILATION, PLANES = 2, 5


@compiled
def _sums(
    x, parts, channels, pixels, length, chunks, x_b, x_c, x_p,
    WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Of ``length`` pixels of an image: sums of ``x``, counted from its origin, and of its square."""
    program = tl.program_id(0)
    image = (program // chunks).to(tl.int64)
    c = tl.arange(0, BC)
    origin = origin_of(x, image, c, channels, x_b, x_c)[None, :]
    first = program % chunks * length
    end = tl.minimum(first + length, pixels)
    total = tl.zeros((BP, BC), tl.float32)
    squares = tl.zeros((BP, BC), tl.float32)
    for start in tl.range(first, end, BP):
        p = start + tl.arange(0, BP)
        mask = (p < end)[:, None] & (c < channels)[None, :]
        if WIDE:
            p = p.to(tl.int64)
        at = x + image * x_b + ((p * x_p)[:, None] + (c * x_c)[None, :])
        value = tl.where(mask, tl.load(at, mask=mask, other=0.0).to(tl.float32) - origin, 0.0)
        total += value
        squares += value * value
    at = parts + program.to(tl.int64) * (2 * channels) + c
    tl.store(at, tl.sum(total, axis=0), mask=c < channels)
    tl.store(at + channels, tl.sum(squares, axis=0), mask=c < channels)


def _block(channels: int) -> tuple[int, int]:
    """Channels and pixels that a program adds at once."""
    columns = triton.next_power_of_2(channels)
    return columns, max(1, 4096 // columns)


def _summed(x: Tensor) -> Tensor:
    """The ``sums`` of :mod:`freqfusion.ops._triton.groups`."""
    (images, channels, height, width), (_, rows) = x.shape, _block(x.shape[1])
    length = triton.cdiv(triton.cdiv(height * width * images, PROGRAMS), rows) * rows
    chunks = triton.cdiv(height * width, length)
    parts = torch.empty((images, chunks, 2, channels), dtype=torch.float32, device=x.device)
    launch(_sums, (x, parts), _sums_launch, length)
    return parts.sum(1)


def _sums_launch(x: Tensor, parts: Tensor, length: int) -> Launch:
    (images, channels, height, width), chunks = x.shape, parts.shape[1]
    columns, rows = _block(channels)
    step = pixel_stride(x)
    assert step is not None
    return Launch(
        lambda _: images * chunks,
        [channels, height * width, length, chunks, x.stride(0), x.stride(1), step],
        [{"BP": rows, "num_warps": 8}],
        {"WIDE": is_wide(x), "BC": columns},
    )


def normalized_similarity(
    x: Tensor, weight: Tensor, bias: Tensor, known: Tensor | None, groups: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`freqfusion.ops.normalized_similarity.op.normalized_similarity`, and what the backward pass needs.

    Returns:
        The map, in the layout of ``x``; the ``sums`` of :mod:`freqfusion.ops._triton.groups`, or nothing if they are
        ``known``; ``saved`` of :func:`freqfusion.ops.local_similarity.triton.local_similarity`.
    """
    batch, channels, height, width = x.shape
    joined = torch.empty(
        (batch, channels + 8, height, width), dtype=x.dtype, device=x.device, memory_format=layout(x)
    )
    saved = torch.empty((batch, PLANES, height, width), dtype=torch.float32, device=x.device)
    sums = _summed(x) if known is None else x.new_empty((0, 2, channels), dtype=torch.float32)
    kernel, prepare = FORWARD
    weight, bias = weight.contiguous(), bias.contiguous()
    statistics = sums if known is None else known
    tensors = (x, joined[:, channels:], saved, statistics, weight, bias, joined[:, :channels])
    launch(kernel, tensors, prepare, DILATION, EPSILON, channels // groups, epsilon)
    return joined, sums, saved


def normalized_similarity_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    joined: Tensor,
    sums: Tensor,
    saved: Tensor,
    grad: Tensor,
    groups: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives in ``x`` (of its layout), ``weight`` and ``bias``, given what the forward pass kept."""
    batch, channels = x.shape[:2]
    together = channels // groups
    grad = grad.contiguous(memory_format=layout(x))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    weight = weight.contiguous()
    in_weight, in_bias = (torch.empty(channels, dtype=y.dtype, device=y.device) for y in (weight, bias))
    normalized, plus = joined[:, :channels], grad[:, :channels]
    programs = backward_programs(normalized, together, out, plus, x)
    parts = torch.empty((batch, programs, 2, channels), dtype=torch.float32, device=x.device)
    kernel, prepare = BACKWARD
    maps = (normalized, saved, grad[:, channels:], out, plus, x, sums, weight)
    rest = (DILATION, together, epsilon)
    launch(kernel, (*maps, parts, in_weight, in_bias), prepare, *rest, True)
    launch(kernel, (*maps, parts.sum(1), in_weight, in_bias), prepare, *rest, False)
    return out, in_weight, in_bias


def cases() -> Iterator[Case]:
    def call(dtype: torch.dtype, order: torch.memory_format, channels: int) -> None:
        x = torch.empty((2, channels, 200, 336), dtype=dtype, memory_format=order)
        weight = torch.empty(channels, dtype=dtype)
        joined, sums, saved = normalized_similarity(x, weight, weight, None, channels // 8, 1e-5)
        normalized_similarity_backward(x, weight, weight, joined, sums, saved, joined, channels // 8, 1e-5)

    for dtype in (torch.bfloat16, torch.float32):
        for order in (torch.contiguous_format, torch.channels_last):
            for channels in (64, 24):
                name = f"normalized_similarity {channels}x200x336 {dtype} {order}".replace("torch.", "")
                yield Case(name, partial(call, dtype, order, channels))
