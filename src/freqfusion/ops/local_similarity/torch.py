"""The similarities in plain torch, half of them computed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype, layout
from freqfusion.ops._windows import middle, reachable
from freqfusion.ops.local_similarity.naive import EPSILON


def local_similarity(x: Tensor, window: int, dilation: int) -> Tensor:
    """As :func:`freqfusion.ops.local_similarity`, at least float32."""
    height, width = x.shape[-2:]
    outer = window
    window, dilation = reachable(window, dilation, height, width)
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
    return spread(torch.stack(earlier[::-1] + later, dim=1), window, outer)


def neighbours(inner: int, window: int, device: torch.device) -> Tensor:
    """Channels of the neighbours of the middle ``inner`` x ``inner`` of a window; the centre has none."""
    before, after = middle(inner, window, device).tensor_split((inner * inner // 2,))
    return torch.cat((before, after[1:] - 1))


def spread(similarity: Tensor, inner: int, window: int) -> Tensor:
    """Similarities of a window, given those of its middle; the others lie outside the map and have 0."""
    if inner == window:
        return similarity
    batch, _, height, width = similarity.shape
    out = similarity.new_zeros(batch, window * window - 1, height, width)
    out = out.contiguous(memory_format=layout(similarity))
    return out.index_copy(1, neighbours(inner, window, similarity.device), similarity)
