"""Reference of the similarities."""

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype

EPSILON = 1e-8
"""Floor of each vector's norm, as in :func:`torch.nn.functional.cosine_similarity`."""


def local_similarity_naive(x: Tensor, window: int = 3, dilation: int = 2) -> Tensor:
    """One cosine a neighbour with torch's own function: the oracle; nothing is checked."""
    height, width = x.shape[-2:]
    dilation = min(dilation, max(height, width))  # from there on nothing lies
    features = x.to(accumulation_dtype(x))
    padded = F.pad(features, [window // 2 * dilation] * 4)
    similarities = []
    for tap in range(window * window):
        if tap == window * window // 2:
            continue
        top, left = (place * dilation for place in divmod(tap, window))
        neighbour = padded[:, :, top : top + height, left : left + width]
        similarities.append(F.cosine_similarity(features, neighbour, dim=1, eps=EPSILON))
    return torch.stack(similarities, dim=1).to(x.dtype)
