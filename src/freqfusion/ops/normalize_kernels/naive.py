"""Reference of the normalisation."""

import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype


def normalize_kernels_naive(
    logits: Tensor, kernel_size: int, groups: int = 1, window: Tensor | None = None
) -> Tensor:
    """Softmax, times the window, divided by the sum: the definition, as three steps; nothing is checked."""
    shape = (logits.shape[0], groups, kernel_size ** (logits.ndim - 2), *logits.shape[2:])
    kernels = F.softmax(logits.to(accumulation_dtype(logits)).reshape(shape), dim=2)
    if window is not None:
        kernels = kernels * window.to(kernels.dtype).reshape(-1, *[1] * (logits.ndim - 2))
        kernels = kernels / kernels.sum(dim=2, keepdim=True)
    return kernels.reshape(logits.shape).to(logits.dtype)
