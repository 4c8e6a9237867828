"""Normalisation of predicted kernels."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from freqfusion.ops._autograd import registered, second_derivative
from freqfusion.ops._backends import OPERATORS, Operator, choose, implementation
from freqfusion.ops._checks import check_count, check_kernel_size, check_map, check_taps, check_tensor, layout
from freqfusion.ops.normalize_kernels.torch import normalize_kernels as softmax

MAX_TAPS = 4096
"""Triton's kernel takes all taps of a pixel at once."""

kernels_for = partial(implementation, "normalize_kernels")


def _cannot(backend: str, logits: Tensor) -> str:
    return f"there are more than {MAX_TAPS} channels" if logits.shape[1] > MAX_TAPS else ""


OPERATORS["normalize_kernels"] = Operator(1, ("triton",), _cannot)


@registered("freqfusion::normalize_kernels")
def _normalize(logits: Tensor, window: Tensor | None, taps: int) -> Tensor:
    return kernels_for("triton").normalize_kernels(logits, window, taps)


@registered("freqfusion::normalize_kernels_backward")
def _normalize_backward(logits: Tensor, window: Tensor | None, grad: Tensor, taps: int) -> Tensor:
    return kernels_for("triton").normalize_kernels_backward(logits, window, grad, taps)


@_normalize.register_fake
@_normalize_backward.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=layout(logits))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # the logits, and not the result: rounded kernels would round the gradient a second time
    logits, window, ctx.taps = inputs
    ctx.save_for_backward(logits, window)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, window, grad, ctx.taps = inputs
    ctx.save_for_backward(logits, window, grad)


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, window = ctx.saved_tensors
    return _normalize_backward(logits, window, grad, ctx.taps), None, None


def _backward_derivative(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    logits, window, grad = ctx.saved_tensors

    def normalized(logits: Tensor) -> Tensor:
        return softmax(logits, window, ctx.taps)

    (in_logits,), incoming = second_derivative(normalized, (logits,), grad, (cotangent,))
    return in_logits, None, incoming, None


_normalize.register_autograd(_derivative, setup_context=_save, ahead=True)
_normalize_backward.register_autograd(_backward_derivative, setup_context=_save_backward)


def normalize_kernels(
    logits: Tensor, kernel_size: int, groups: int = 1, window: Tensor | None = None
) -> Tensor:
    """Turn predicted logits into reassembly kernels that are positive and sum to one.

    ``softmax(logits) * window`` over the taps of each group, renormalised to sum one, computed in one pass as
    ``softmax(logits + log(window))``.

    Args:
        logits: ``(B, groups * kernel_size**2, H, W)`` or ``(B, groups * kernel_size**3, D, H, W)``, floating point.
        kernel_size: odd side of the kernels.
        groups: kernels per pixel.
        window: ``(..., kernel_size, kernel_size)`` or any shape with ``kernel_size**2`` positive entries (for
            example a Hamming window), of a volume ``kernel_size**3``; or None for the plain softmax. With a window
            that requires a gradient, torch computes.

    Returns:
        Kernels of the shape and dtype of ``logits``; half precision is normalised in float32.

    Raises:
        TypeError: for integer tensors and arguments of another type, such as a float kernel size.
        ValueError: for wrong rank, channels, kernel size, and a window of wrong size or on another device.

    Source: Chen et al., "Frequency-aware Feature Fusion for Dense Image Prediction", TPAMI 2024 (the
    softmax of the low-pass and high-pass generators); the window is the released code's.

    >>> kernels = normalize_kernels(torch.zeros(1, 9, 1, 1), kernel_size=3)
    >>> round(float(kernels[0, 4, 0, 0]), 4)
    0.1111
    """
    check_map("logits", logits, (2, 3))
    kernel_size = check_kernel_size("kernel_size", kernel_size)
    groups = check_count("groups", groups)
    dims = logits.ndim - 2
    check_taps("logits", logits.shape[1], kernel_size, groups, dims)
    taps = kernel_size**dims
    if window is not None:
        check_tensor("window", window)
        if window.numel() != taps:
            raise ValueError(
                f"window must have kernel_size**{dims} = {taps} entries, got shape {tuple(window.shape)}"
            )
        if window.device != logits.device:
            raise ValueError(
                f"window is on {window.device} and logits on {logits.device}; move them to one device"
            )
    learnt = window is not None and window.requires_grad and torch.is_grad_enabled()
    if choose("normalize_kernels", None, logits) == "triton" and not learnt:
        return _normalize(logits, window, taps)
    return softmax(logits, window, taps)
