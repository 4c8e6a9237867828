"""Cosine similarity of every pixel with its neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype, check_kernel_size, check_map

EPSILON = 1e-8
"""Floor of each vector's norm, as in :func:`torch.nn.functional.cosine_similarity`."""


def local_similarity_naive(x: Tensor, window: int = 3, dilation: int = 2) -> Tensor:
    """One cosine a neighbour with torch's own function: the oracle; nothing is checked."""
    height, width = x.shape[-2:]
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


def local_similarity(x: Tensor, window: int = 3, dilation: int = 2) -> Tensor:
    """Cosine similarity between each pixel's feature vector and those of its neighbours.

    Neighbours lie on a ``window`` x ``window`` grid with steps of ``dilation`` pixels, row by row, the centre
    left out. Neighbours outside the map, and pixels whose vector is zero, have similarity 0.

    Args:
        x: ``(B, C, H, W)``, floating point.
        window: odd side of the neighbourhood, at least 3.
        dilation: distance of adjacent neighbours in pixels.

    Returns:
        ``(B, window**2 - 1, H, W)`` in [-1, 1], of the dtype of ``x``; half precision is computed in float32.

    Raises:
        TypeError: for an integer tensor.
        ValueError: for wrong rank, window or dilation.

    Source: Chen et al., TPAMI 2024, local similarity of the offset generator; dilation 2 and zero padding
    are the released code's.

    >>> x = torch.ones(1, 1, 1, 3)
    >>> local_similarity(x, window=3, dilation=1)[0, :, 0, 1]
    tensor([0., 0., 0., 1., 1., 0., 0., 0.])
    """
    check_map("x", x)
    check_kernel_size("window", window)
    if window < 3 or dilation < 1:
        raise ValueError(f"window must be at least 3 and dilation at least 1, got {window} and {dilation}")
    height, width = x.shape[-2:]
    radius = window // 2 * dilation
    features = x.to(accumulation_dtype(x))
    unit = features / torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(EPSILON)
    padded = F.pad(unit, (radius, radius, 0, radius))
    # Similarity is symmetric: the value for the neighbour at -d is the value for +d, shifted by d. So only
    # the second half of the taps (below or to the right of the centre) is computed.
    later, earlier = [], []
    for tap in range(window * window // 2 + 1, window * window):
        dy, dx = (place * dilation - radius for place in divmod(tap, window))
        left = radius + dx
        similarity = (unit * padded[:, :, dy : dy + height, left : left + width]).sum(dim=1)
        later.append(similarity)
        shifted = F.pad(similarity, (radius, radius, radius, 0))
        top, left = radius - dy, radius - dx
        earlier.append(shifted[:, top : top + height, left : left + width])
    return torch.stack(earlier[::-1] + later, dim=1).to(x.dtype)
