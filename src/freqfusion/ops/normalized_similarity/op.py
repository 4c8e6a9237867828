"""Group normalisation with the local similarity of its result, in one map."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._autograd import registered, second_derivative
from freqfusion.ops._backends import OPERATORS, Operator, choose, implementation
from freqfusion.ops._checks import layout
from freqfusion.ops.local_similarity.op import local_similarity
from freqfusion.ops.local_similarity.torch import local_similarity as mirrored

MAX_CHANNELS = 256
"""A program adds up all channels of its pixels."""
TOGETHER = (1, 2, 4, 8, 16)
"""Channels of a group that the kernels can normalise."""

kernels_for = partial(implementation, "normalized_similarity")


def _cannot(backend: str, x: Tensor) -> str:
    if x.shape[1] > MAX_CHANNELS:
        return f"the map has more than {MAX_CHANNELS} channels"
    if x.numel() == 0 or not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return "the map is empty, or not contiguous"
    return ""


OPERATORS["normalized_similarity"] = Operator(1, ("triton",), _cannot)


@registered("freqfusion::normalized_similarity")
def _joined(
    x: Tensor, weight: Tensor, bias: Tensor, sums: Tensor | None, groups: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The map and its similarities; sums for the statistics, unless they are known; what the similarity keeps."""
    return kernels_for("triton").normalized_similarity(x, weight, bias, sums, groups, epsilon)


@registered("freqfusion::normalized_similarity_backward")
def _joined_backward(
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
    tensors = (x, weight, bias, joined, sums, saved, grad)
    return kernels_for("triton").normalized_similarity_backward(*tensors, groups, epsilon)


@_joined.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, known: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, *sides = x.shape
    joined = torch.empty(
        (batch, channels + 8, *sides), dtype=x.dtype, device=x.device, memory_format=layout(x)
    )
    sums = x.new_empty((batch if known is None else 0, 2, channels), dtype=torch.float32)
    return joined, sums, x.new_empty((batch, 5, *sides), dtype=torch.float32)


@_joined_backward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=layout(x)), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, known, *ctx.rest = inputs
    joined, sums, saved = output
    ctx.mark_non_differentiable(sums, saved)
    ctx.set_materialize_grads(False)
    sums = sums if known is None else known
    ctx.save_for_backward(x, weight, bias, joined, sums, saved)


def _derivative(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *_joined_backward(*ctx.saved_tensors, grad, *ctx.rest), None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, _, grad, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, bias, grad)


def _backward_derivative(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    # all that was saved is a function of the first three, so its share of the derivative comes with theirs
    *inputs, grad = ctx.saved_tensors
    in_inputs, in_grad = second_derivative(partial(_composed, *ctx.rest), inputs, grad, cotangents)
    return *in_inputs, None, None, None, in_grad, None, None


def _composed(groups: int, epsilon: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normalized = F.group_norm(x, groups, weight, bias, epsilon)
    return torch.cat((normalized, mirrored(normalized, 3, 2)), dim=1)


_joined.register_autograd(_derivative, setup_context=_save, ahead=True)
_joined_backward.register_autograd(_backward_derivative, setup_context=_save_backward)


def normalized_similarity(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float = 1e-5, sums: Tensor | None = None
) -> Tensor:
    """The map after group normalisation, and the similarity of its pixels to their neighbours, joined.

    Args:
        x: ``(B, C, H, W)``, or a volume, floating point.
        weight: ``(C,)`` of the normalisation.
        bias: ``(C,)``.
        groups: of the channels that are normalised together.
        epsilon: added to their variance.
        sums: of ``x``, if they are known: see :func:`freqfusion.ops.convolution.op.convolution`.

    Returns:
        ``(B, C + 8, H, W)``, or 26 channels more of a volume: first the map.

    Source: Chen et al., TPAMI 2024, the offset generator's input.

    >>> x, one, zero = torch.rand(1, 4, 3, 3), torch.ones(4), torch.zeros(4)
    >>> tuple(normalized_similarity(x, one, zero, groups=2).shape)
    (1, 12, 3, 3)
    """
    fits = x.shape[1] // groups in TOGETHER and weight.shape == bias.shape == (x.shape[1],)
    if fits and choose("normalized_similarity", None, x) == "triton":
        return _joined(x, weight, bias, sums, groups, epsilon)[0]
    normalized = F.group_norm(x, groups, weight, bias, epsilon)
    return torch.cat((normalized, local_similarity(normalized)), dim=1)
