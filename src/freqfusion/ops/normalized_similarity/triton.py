"""Group normalisation and the local similarity of its result on a GPU.

torch's own takes a block of threads for each group of each image, a few dozen that read all. Here hundreds of
programs sum over their pixels, so that the whole GPU reads. The kernel that sums serves the backward pass too:

    forward     sums of x - k and of (x - k)^2 by channel, k the image's first pixel, which keeps digits
    backward    sums of g and of g (x - k), g the gradient in the normalised map

Both results go straight into the channels of one map. The sums are added in a fixed order. A bad value reaches its
group of its image, as by the definition.
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
from freqfusion.ops._triton.launch import Launch, launch
from freqfusion.ops._triton.registry import Case
from freqfusion.ops._triton.tiles import compiled, is_wide, pixel_stride
from freqfusion.ops.local_similarity.naive import EPSILON
from freqfusion.ops.local_similarity.triton import local_similarity, local_similarity_backward
from freqfusion.ops.normalized_similarity.op import padded

PROGRAMS = 1024
"""That sum: enough for every GPU of today."""
DILATION, PLANES = 2, 5


@triton.jit
def _tile(
    image, start, end, x, x_b, x_c, x_p, channels, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr
):
    """Addresses (BP, BC) of some pixels of an image, and which exist."""
    p = start + tl.arange(0, BP)
    c = tl.arange(0, BC)
    mask = (p < end)[:, None] & (c < channels)[None, :]
    if WIDE:
        p = p.to(tl.int64)
        c = c.to(tl.int64)
    return x + tl.cast(image, tl.int64) * x_b + ((p * x_p)[:, None] + (c * x_c)[None, :]), mask


@triton.jit
def _origin(image, x, x_b, x_c, channels, BC: tl.constexpr):
    """The first pixel of an image (BC,): numbers near those of all."""
    c = tl.arange(0, BC)
    return tl.load(
        x + tl.cast(image, tl.int64) * x_b + c.to(tl.int64) * x_c, mask=c < channels, other=0.0
    ).to(tl.float32)


@compiled
def _sums(
    a, x, partial, channels, pixels, length, chunks, shifted, a_b, a_c, a_p, x_b, x_c, x_p,
    WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Of ``length`` pixels of an image: sums of ``a``, and of that times ``x``, which counts from its origin.

    So does ``a`` if ``shifted`` is 1.
    """
    program = tl.program_id(0)
    chunk = program % chunks
    image = program // chunks
    origin = _origin(image, x, x_b, x_c, channels, BC)[None, :]
    first = chunk * length
    end = tl.minimum(first + length, pixels)
    total = tl.zeros((BP, BC), tl.float32)
    product = tl.zeros((BP, BC), tl.float32)
    for start in tl.range(first, end, BP):
        at, mask = _tile(image, start, end, x, x_b, x_c, x_p, channels, BC, BP, WIDE)
        value = tl.where(mask, tl.load(at, mask=mask, other=0.0).to(tl.float32) - origin, 0.0)
        at, mask = _tile(image, start, end, a, a_b, a_c, a_p, channels, BC, BP, WIDE)
        other = tl.where(mask, tl.load(at, mask=mask, other=0.0).to(tl.float32) - shifted * origin, 0.0)
        total += other
        product += other * value
    at = partial + tl.cast(program, tl.int64) * (2 * BC) + tl.arange(0, BC)
    tl.store(at, tl.sum(total, axis=0))
    tl.store(at + BC, tl.sum(product, axis=0))


@triton.jit
def _mean_of_groups(value, BC: tl.constexpr, TOGETHER: tl.constexpr):
    """The mean over the channels of each group, for each of its channels."""
    groups: tl.constexpr = BC // TOGETHER
    mean = tl.sum(tl.reshape(value, (groups, TOGETHER)), axis=1) / TOGETHER
    return tl.reshape(tl.broadcast_to(mean[:, None], (groups, TOGETHER)), (BC,))


@triton.jit
def _statistics(
    image, x, sums, x_b, x_c, channels, pixels, epsilon, BC: tl.constexpr, TOGETHER: tl.constexpr
):
    """Mean and one over the deviation of each channel's group, and the image's origin: (BC,) each."""
    origin = _origin(image, x, x_b, x_c, channels, BC)
    at = sums + tl.cast(image, tl.int64) * (2 * BC) + tl.arange(0, BC)
    from_origin = tl.load(at) / pixels
    variance = tl.maximum(tl.load(at + BC) / pixels - from_origin * from_origin, 0.0)
    # of the channels' means, counted from the first channel's: their digits
    mean = _mean_of_groups(origin + from_origin, BC, TOGETHER)
    apart = origin - mean + from_origin
    variance = _mean_of_groups(variance + apart * apart, BC, TOGETHER)
    return mean, 1.0 / tl.sqrt(variance + epsilon), origin


@compiled
def _normalize(
    x, sums, weight, bias, out, channels, pixels, chunks, epsilon, x_b, x_c, x_p, o_b, o_c, o_p,
    WIDE: tl.constexpr, TOGETHER: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """BP pixels."""
    program = tl.program_id(0)
    image = program // chunks
    start = program % chunks * BP
    mean, scale, _ = _statistics(image, x, sums, x_b, x_c, channels, pixels, epsilon, BC, TOGETHER)
    c = tl.arange(0, BC)
    scale *= tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    at, mask = _tile(image, start, pixels, x, x_b, x_c, x_p, channels, BC, BP, WIDE)
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
    at, mask = _tile(image, start, pixels, out, o_b, o_c, o_p, channels, BC, BP, WIDE)
    tl.store(at, value.to(out.dtype.element_ty), mask=mask)


@compiled
def _normalize_backward(
    x, sums, weight, grad, grad_sums, out, in_weight, in_bias, channels, pixels, chunks, images, epsilon,
    x_b, x_c, x_p, g_b, g_c, g_p, o_b, o_c, o_p,
    WIDE: tl.constexpr, TOGETHER: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """BP pixels; the first program also sums the gradients in weight and bias over the images."""
    program = tl.program_id(0)
    c = tl.arange(0, BC)
    real = c < channels
    if program == 0:
        along_weight = tl.zeros((BC,), tl.float32)
        along_bias = tl.zeros((BC,), tl.float32)
        for number in range(images):
            mean, scale, origin = _statistics(
                number, x, sums, x_b, x_c, channels, pixels, epsilon, BC, TOGETHER
            )
            at = grad_sums + tl.cast(number, tl.int64) * (2 * BC) + c
            incoming = tl.load(at)
            along_bias += incoming
            along_weight += scale * (tl.load(at + BC) + (origin - mean) * incoming)
        tl.store(in_weight + c, along_weight.to(in_weight.dtype.element_ty), mask=real)
        tl.store(in_bias + c, along_bias.to(in_bias.dtype.element_ty), mask=real)

    image = program // chunks
    start = program % chunks * BP
    mean, scale, origin = _statistics(image, x, sums, x_b, x_c, channels, pixels, epsilon, BC, TOGETHER)
    factor = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    at = grad_sums + tl.cast(image, tl.int64) * (2 * BC) + c
    incoming = tl.load(at)
    along = scale * (tl.load(at + BC) + (origin - mean) * incoming)
    constant = _mean_of_groups(factor * incoming, BC, TOGETHER) / pixels
    along = _mean_of_groups(factor * along, BC, TOGETHER) / pixels
    at, mask = _tile(image, start, pixels, x, x_b, x_c, x_p, channels, BC, BP, WIDE)
    normal = (tl.load(at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
    at, mask = _tile(image, start, pixels, grad, g_b, g_c, g_p, channels, BC, BP, WIDE)
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
    value = (value - constant[None, :] - normal * along[None, :]) * scale[None, :]
    at, mask = _tile(image, start, pixels, out, o_b, o_c, o_p, channels, BC, BP, WIDE)
    tl.store(at, value.to(out.dtype.element_ty), mask=mask)


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def _strides(*maps: Tensor) -> list[int]:
    """Over images, channels and pixels of maps whose rows follow each other."""
    found = []
    for x in maps:
        step = pixel_stride(x)
        assert step is not None
        found += [x.stride(0), x.stride(1), step]
    return found


def _block(channels: int, values: int = 2048) -> tuple[int, int]:
    """Channels and pixels of a tile of so many values."""
    columns = padded(channels)
    return columns, max(1, values // columns)


def _summed(a: Tensor, x: Tensor, shifted: bool) -> Tensor:
    """Sums ``(B, 2, channels)``, float32, the channels filled up to a power of two: see :func:`_sums`."""
    columns, rows = _block(x.shape[1], 4096)
    pixels, images = _pixels(x), x.shape[0]
    length = triton.cdiv(triton.cdiv(pixels * images, PROGRAMS), rows) * rows
    chunks = triton.cdiv(pixels, length)
    parts = torch.empty((images, chunks, 2, columns), dtype=torch.float32, device=x.device)
    launch(_sums, (a, x, parts), _sums_launch, length, shifted)
    return parts.sum(1)


def _sums_launch(a: Tensor, x: Tensor, parts: Tensor, length: int, shifted: bool) -> Launch:
    images, chunks = parts.shape[:2]
    columns, rows = _block(x.shape[1], 4096)
    return Launch(
        lambda _: images * chunks,
        [x.shape[1], _pixels(x), length, chunks, int(shifted), *_strides(a, x)],
        [{"BP": rows, "num_warps": 8}],
        {"WIDE": is_wide(a, x), "BC": columns},
    )


def normalized_similarity(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`freqfusion.ops.normalized_similarity.op.normalized_similarity`, and what the backward pass needs.

    Returns:
        The map, in the layout of ``x``; the sums of :func:`_summed`; ``saved`` of
        :func:`freqfusion.ops.local_similarity.triton.local_similarity`.
    """
    batch, channels, height, width = x.shape
    joined = torch.empty(
        (batch, channels + 8, height, width), dtype=x.dtype, device=x.device, memory_format=layout(x)
    )
    normalized, similarity = joined[:, :channels], joined[:, channels:]
    sums = _summed(x, x, True)
    launch(_normalize, (x, sums, weight, bias, normalized), _normalize_launch, groups, epsilon)
    _, saved = local_similarity(normalized, 3, DILATION, EPSILON, PLANES, similarity)
    return joined, sums, saved


def _normalize_launch(
    x: Tensor, sums: Tensor, weight: Tensor, bias: Tensor, out: Tensor, groups: int, epsilon: float
) -> Launch:
    return _by_pixels(x, groups, [epsilon], x, out)


def _by_pixels(x: Tensor, groups: int, numbers: list[float], *maps: Tensor) -> Launch:
    """A tile of pixels for each program; ``numbers`` come between the sizes of ``x`` and the strides of ``maps``."""
    columns, rows = _block(x.shape[1])
    chunks = triton.cdiv(_pixels(x), rows)
    programs = x.shape[0] * chunks
    return Launch(
        lambda _: programs,
        [x.shape[1], _pixels(x), chunks, *numbers, *_strides(*maps)],
        [{"BP": rows, "num_warps": 4}],
        {"WIDE": is_wide(*maps), "TOGETHER": x.shape[1] // groups, "BC": columns},
    )


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
    channels = x.shape[1]
    grad = grad.contiguous(memory_format=layout(x))
    in_normalized, out = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x)) for _ in range(2)
    )
    parts = joined[:, :channels], saved, grad[:, channels:]
    local_similarity_backward(*parts, 3, DILATION, grad[:, :channels], in_normalized)
    grad_sums = _summed(in_normalized, x, False)
    in_weight, in_bias = torch.empty_like(weight), torch.empty_like(bias)
    tensors = (x, sums, weight, in_normalized, grad_sums, out, in_weight, in_bias)
    launch(_normalize_backward, tensors, _backward_launch, groups, epsilon)
    return out, in_weight, in_bias


def _backward_launch(
    x: Tensor,
    sums: Tensor,
    weight: Tensor,
    grad: Tensor,
    grad_sums: Tensor,
    out: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    groups: int,
    epsilon: float,
) -> Launch:
    return _by_pixels(x, groups, [x.shape[0], epsilon], x, grad, out)


def cases() -> Iterator[Case]:
    def call(dtype: torch.dtype, order: torch.memory_format, channels: int) -> None:
        x = torch.empty((2, channels, 200, 336), dtype=dtype, memory_format=order)
        weight = torch.empty(channels, dtype=dtype)
        joined, sums, saved = normalized_similarity(x, weight, weight, channels // 8, 1e-5)
        normalized_similarity_backward(x, weight, weight, joined, sums, saved, joined, channels // 8, 1e-5)

    for dtype in (torch.bfloat16, torch.float32):
        for order in (torch.contiguous_format, torch.channels_last):
            for channels in (64, 24):
                name = f"normalized_similarity {channels}x200x336 {dtype} {order}".replace("torch.", "")
                yield Case(name, partial(call, dtype, order, channels))
