"""Cosine similarity of every pixel with its neighbours."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from freqfusion.ops._autograd import registered, second_derivative
from freqfusion.ops._backends import OPERATORS, Operator, choose, implementation, needs_composite
from freqfusion.ops._checks import accumulation_dtype, check_kernel_size, check_map, check_whole, layout
from freqfusion.ops._windows import reachable
from freqfusion.ops.local_similarity.naive import EPSILON
from freqfusion.ops.local_similarity.torch import local_similarity as mirrored
from freqfusion.ops.local_similarity.torch import neighbours, spread

MAX_DILATION = 2**31
"""Wider than any map: what is more is the same, and operators count in 64 bits."""

kernels_for = partial(implementation, "local_similarity")


OPERATORS["local_similarity"] = Operator(
    1, ("native", "triton"), which_kernels=lambda x, groups, reflect: kernels_for("triton").explain(x)
)


@registered("freqfusion::local_similarity")
def _local_similarity(
    x: Tensor, window: int, dilation: int, backend: str = "native"
) -> tuple[Tensor, Tensor]:
    """The similarities, and what Triton's backward pass needs; the native one needs the similarities themselves.

    torch's, for volumes where no compiled kernels serve, needs neither.
    """
    inner, dilation = reachable(window, dilation, *x.shape[2:])
    kernels = kernels_for(backend)
    if backend == "triton":
        similarity, saved = kernels.local_similarity(x, inner, dilation, EPSILON, _planes(window))
        return spread(similarity, inner, window), saved
    return spread(kernels.local_similarity(x, inner, dilation), inner, window), x.new_empty((0,))


def _planes(window: int) -> int:
    """Of a length and the cosines with half of the neighbours."""
    return window * window // 2 + 1


@registered("freqfusion::local_similarity_backward")
def _local_similarity_backward(
    x: Tensor, saved: Tensor, grad: Tensor, window: int, dilation: int, backend: str = "native"
) -> Tensor:
    inner, dilation = reachable(window, dilation, *x.shape[2:])
    if inner < window:
        middle = neighbours(inner, window, x.device, x.ndim - 2)
        grad = grad.index_select(1, middle)
        if backend == "native":
            saved = saved.index_select(1, middle)
    return kernels_for(backend).local_similarity_backward(x, saved, grad, inner, dilation)


@_local_similarity.register_fake
def _(x: Tensor, window: int, dilation: int, backend: str = "native") -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], window ** (x.ndim - 2) - 1, *x.shape[2:])
    if backend == "triton":
        similarity = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
        return similarity, similarity.new_empty(
            (x.shape[0], _planes(window), *x.shape[-2:]), dtype=torch.float32
        )
    return torch.empty(shape, dtype=accumulation_dtype(x), device=x.device), x.new_empty((0,))


@_local_similarity_backward.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.rest = inputs
    similarity, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, similarity if ctx.rest[-1] == "native" else saved)


def _derivative(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, saved = ctx.saved_tensors
    if grad is None:
        return None, *(None for _ in ctx.rest)
    return _local_similarity_backward(x, saved, grad, *ctx.rest), *(None for _ in ctx.rest)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, grad, *ctx.rest = inputs
    ctx.save_for_backward(x, grad)


def _backward_derivative(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    # what was saved is a function of x alone, so its share of the derivative comes with that of x
    x, grad = ctx.saved_tensors
    window, dilation, _ = ctx.rest

    def similarity(x: Tensor) -> Tensor:
        return mirrored(x, window, dilation)

    (x_part,), grad_part = second_derivative(similarity, (x,), grad, (cotangent,))
    return x_part, None, grad_part, *(None for _ in ctx.rest)


_local_similarity.register_autograd(_derivative, setup_context=_save, ahead=True)
_local_similarity_backward.register_autograd(_backward_derivative, setup_context=_save_backward)


def local_similarity(x: Tensor, window: int = 3, dilation: int = 2, backend: str | None = None) -> Tensor:
    """Cosine similarity between each pixel's feature vector and those of its neighbours.

    Neighbours lie on a ``window`` x ``window`` grid with steps of ``dilation`` pixels, row by row, the centre
    left out; of a volume on a cube: 26 with the default window. Neighbours outside the map, and pixels whose vector
    is zero, have similarity 0.

    Args:
        x: ``(B, C, H, W)`` or ``(B, C, D, H, W)``, floating point.
        window: odd side of the neighbourhood, at least 3.
        dilation: distance of adjacent neighbours in pixels; may exceed the map, at no cost.
        backend: ``"native"``, ``"triton"``, ``"torch"``, or None for the best that can; see
            :func:`freqfusion.ops.use_backend`.

    Returns:
        ``(B, window**2 - 1, H, W)`` or ``(B, window**3 - 1, D, H, W)`` in [-1, 1], of the dtype of ``x``; half
        precision is computed in float32.

        With windows up to 5 and 256 channels, every backend's float32 similarity is within ``4 * 2**-23`` of the
        exact one. The error of a pixel's gradient is up to ``4 * 2**-23 / norm`` times the sum of the absolute
        gradients of the similarities that the pixel takes part in. It grows where vectors are short. With one
        channel a similarity is a sign and the exact gradient 0, so rounding is all that remains: backends
        differ by that bound.

    Raises:
        TypeError: for an integer tensor and arguments of another type, such as a float window.
        ValueError: for wrong rank, window, dilation or backend.
        RuntimeError: if the named backend cannot compute this call.

    Source: Chen et al., TPAMI 2024, local similarity of the offset generator; dilation 2 and zero padding
    are the released code's.

    >>> x = torch.ones(1, 1, 1, 3)
    >>> local_similarity(x, window=3, dilation=1)[0, :, 0, 1]
    tensor([0., 0., 0., 1., 1., 0., 0., 0.])
    """
    check_map("x", x, (2, 3))
    window = check_kernel_size("window", window)
    dilation = check_whole("dilation", dilation)
    if window < 3 or dilation < 1:
        raise ValueError(f"window must be at least 3 and dilation at least 1, got {window} and {dilation}")
    dilation = min(dilation, MAX_DILATION)
    chosen = choose("local_similarity", backend, x)
    if chosen == "torch" and (x.ndim == 4 or needs_composite(x)):
        similarity = mirrored(x, window, dilation)
    else:
        similarity, _ = _local_similarity(x, window, dilation, chosen)
    return similarity.to(x.dtype)
