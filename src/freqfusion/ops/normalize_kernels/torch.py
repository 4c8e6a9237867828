"""The normalisation as one softmax of torch."""

import torch
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype


def normalize_kernels(logits: Tensor, window: Tensor | None, taps: int) -> Tensor:
    """As :func:`freqfusion.ops.normalize_kernels`; ``taps`` of each group."""
    dtype = accumulation_dtype(logits)
    scores = logits.to(dtype).unflatten(1, (-1, taps))
    if window is not None:
        scores = scores + window.to(dtype).log().reshape(-1, *[1] * (logits.ndim - 2))
    return torch.softmax(scores, dim=2).reshape(logits.shape).to(logits.dtype)
