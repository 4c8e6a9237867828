"""Statistics of groups of channels in a kernel, from sums over the pixels of an image.

``sums`` ``(B, 2, C)``, float32, are those of ``x - k`` and of its square, ``k`` the image's first pixel: numbers near
those of all, so that large means cost no digits. A program asks for some channels ``c``, whole groups of them.
"""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def origin_of(x, image, c, channels, x_b, x_c):
    """The first pixel of an image, of channels c, or 0 where there is no such channel."""
    return tl.load(x + image * x_b + c * x_c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def sums_of(sums, image, c, channels):
    """Both sums of an image, of channels c, or 0."""
    at = sums + image * (2 * channels) + c
    return tl.load(at, mask=c < channels, other=0.0), tl.load(at + channels, mask=c < channels, other=0.0)


@triton.jit
def mean_of_groups(value, real, TOGETHER: tl.constexpr):
    """The mean over the channels of each group, for each of its channels that is real, else 0."""
    groups: tl.constexpr = value.shape[0] // TOGETHER
    mean = tl.sum(tl.reshape(value, (groups, TOGETHER)), axis=1) / TOGETHER
    mean = tl.reshape(tl.broadcast_to(mean[:, None], (groups, TOGETHER)), (groups * TOGETHER,))
    # without this the compiler exchanges a whole tile of the mean among threads
    return tl.where(real, mean, 0.0)


@triton.jit
def statistics(x, sums, image, c, channels, pixels, epsilon, x_b, x_c, TOGETHER: tl.constexpr):
    """Mean and one over the deviation of the group of each channel, and the channel's origin."""
    real = c < channels
    origin = origin_of(x, image, c, channels, x_b, x_c)
    first, second = sums_of(sums, image, c, channels)
    from_origin = first / pixels
    variance = second / pixels - from_origin * from_origin
    variance = tl.where(variance < 0, 0.0, variance)
    # of the channels' means, counted from the group's: their digits
    mean = mean_of_groups(origin + from_origin, real, TOGETHER)
    apart = origin - mean + from_origin
    variance = mean_of_groups(variance + apart * apart, real, TOGETHER)
    return mean, 1.0 / tl.sqrt(variance + epsilon), origin


@triton.jit
def affine(x, sums, weight, bias, image, c, channels, pixels, epsilon, x_b, x_c, TOGETHER: tl.constexpr):
    """What makes normalised channels: the mean to take away, then the factor, then the term; 0 beyond the last."""
    mean, scale, _ = statistics(x, sums, image, c, channels, pixels, epsilon, x_b, x_c, TOGETHER)
    real = c < channels
    scale = tl.where(real, scale * tl.load(weight + c, mask=real, other=0.0).to(tl.float32), 0.0)
    return mean, scale, tl.load(bias + c, mask=real, other=0.0).to(tl.float32)


@triton.jit
def gradient_of_parameters(
    x, sums, grad_sums, in_weight, in_bias, images, c, channels, pixels, epsilon, x_b, x_c,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Fill some channels of the gradients in weight and bias, from the ``grad_sums`` of :func:`derivative`."""
    along_weight = tl.zeros(c.shape, tl.float32)
    along_bias = tl.zeros(c.shape, tl.float32)
    for number in range(images):
        image = tl.cast(number, tl.int64)
        mean, scale, origin = statistics(x, sums, image, c, channels, pixels, epsilon, x_b, x_c, TOGETHER)
        first, second = sums_of(grad_sums, image, c, channels)
        along_bias += first
        along_weight += scale * (second + (origin - mean) * first)
    tl.store(in_weight + c, along_weight.to(in_weight.dtype.element_ty), mask=c < channels)
    tl.store(in_bias + c, along_bias.to(in_bias.dtype.element_ty), mask=c < channels)


@triton.jit
def derivative(
    value, grad, x, sums, grad_sums, weight, image, c, channels, pixels, epsilon, x_b, x_c,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """The gradient in ``value``, some channels and pixels of ``x``, from ``grad``, that in the normalised map.

    ``grad_sums``, of the shape of ``sums``, are those of ``grad`` and of ``grad`` times ``x - k``.
    """
    mean, scale, origin = statistics(x, sums, image, c, channels, pixels, epsilon, x_b, x_c, TOGETHER)
    first, second = sums_of(grad_sums, image, c, channels)
    real = c < channels
    factor = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    constant = mean_of_groups(factor * first, real, TOGETHER) / pixels
    along = mean_of_groups(factor * scale * (second + (origin - mean) * first), real, TOGETHER) / pixels
    normal = (value - mean[:, None]) * scale[:, None]
    return (grad * factor[:, None] - constant[:, None] - normal * along[:, None]) * scale[:, None]
