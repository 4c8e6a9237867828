"""Normalisation of predicted kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import (
    accumulation_dtype,
    check_count,
    check_kernel_size,
    check_map,
    check_taps,
    check_tensor,
)


def normalize_kernels_naive(
    logits: Tensor, kernel_size: int, groups: int = 1, window: Tensor | None = None
) -> Tensor:
    """Softmax, times the window, divided by the sum: the definition, as three steps; nothing is checked."""
    shape = (logits.shape[0], groups, kernel_size * kernel_size, *logits.shape[-2:])
    kernels = F.softmax(logits.to(accumulation_dtype(logits)).reshape(shape), dim=2)
    if window is not None:
        kernels = kernels * window.to(kernels.dtype).reshape(1, 1, -1, 1, 1)
        kernels = kernels / kernels.sum(dim=2, keepdim=True)
    return kernels.reshape(logits.shape).to(logits.dtype)


def normalize_kernels(
    logits: Tensor, kernel_size: int, groups: int = 1, window: Tensor | None = None
) -> Tensor:
    """Turn predicted logits into reassembly kernels that are positive and sum to one.

    ``softmax(logits) * window`` over the taps of each group, renormalised to sum one, computed in one pass as
    ``softmax(logits + log(window))``.

    Args:
        logits: ``(B, groups * kernel_size**2, H, W)``, floating point.
        kernel_size: odd side of the kernels.
        groups: kernels a pixel.
        window: ``(..., kernel_size, kernel_size)`` or any shape with ``kernel_size**2`` positive entries (for
            example a Hamming window), or None for the plain softmax.

    Returns:
        Kernels of the shape and dtype of ``logits``; half precision is normalised in float32.

    Raises:
        TypeError: for integer tensors and arguments of another type, such as a float kernel size.
        ValueError: for wrong rank, channels, kernel size or window size.

    Source: Chen et al., "Frequency-aware Feature Fusion for Dense Image Prediction", TPAMI 2024 (the
    softmax of the low-pass and high-pass generators); the window is the released code's.

    >>> kernels = normalize_kernels(torch.zeros(1, 9, 1, 1), kernel_size=3)
    >>> round(float(kernels[0, 4, 0, 0]), 4)
    0.1111
    """
    check_map("logits", logits)
    kernel_size = check_kernel_size("kernel_size", kernel_size)
    groups = check_count("groups", groups)
    check_taps("logits", logits.shape[1], kernel_size, groups)
    dtype = accumulation_dtype(logits)
    shape = (logits.shape[0], groups, kernel_size * kernel_size, *logits.shape[-2:])
    scores = logits.to(dtype).reshape(shape)
    if window is not None:
        check_tensor("window", window)
        if window.numel() != kernel_size * kernel_size:
            raise ValueError(
                f"window must have kernel_size**2 = {kernel_size * kernel_size} entries, "
                f"got shape {tuple(window.shape)}"
            )
        scores = scores + window.to(dtype).log().reshape(1, 1, -1, 1, 1)
    return torch.softmax(scores, dim=2).reshape(logits.shape).to(logits.dtype)
