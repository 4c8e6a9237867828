"""Reference of the similarities."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype
from freqfusion.ops._windows import part

EPSILON = 1e-8
"""Floor of each vector's norm, as in :func:`torch.nn.functional.cosine_similarity`."""


def local_similarity_naive(x: Tensor, window: int = 3, dilation: int = 2) -> Tensor:
    """One cosine a neighbour with torch's own function: the oracle; nothing is checked."""
    size = x.shape[2:]
    dilation = min(dilation, max(size))  # from there on nothing lies
    features = x.to(accumulation_dtype(x))
    padded = F.pad(features, [window // 2 * dilation] * 2 * len(size))
    similarities = []
    for tap in product(range(window), repeat=len(size)):
        if set(tap) == {window // 2}:
            continue
        neighbour = part(padded, [place * dilation for place in tap], size)
        similarities.append(F.cosine_similarity(features, neighbour, dim=1, eps=EPSILON))
    return torch.stack(similarities, dim=1).to(x.dtype)
