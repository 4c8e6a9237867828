"""The similarities in plain torch, half of them computed, and their derivative without what the first pass made."""

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype, layout
from freqfusion.ops._windows import middle, part, reachable
from freqfusion.ops.local_similarity.naive import EPSILON


def local_similarity(x: Tensor, window: int, dilation: int) -> Tensor:
    """As :func:`freqfusion.ops.local_similarity`, at least float32."""
    size, outer = x.shape[2:], window
    window, dilation = reachable(window, dilation, *size)
    radius = window // 2 * dilation
    features = x.to(accumulation_dtype(x))
    unit = features / torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(EPSILON)
    padded = F.pad(unit, (*(radius, radius) * (len(size) - 1), 0, radius))
    # Similarity is symmetric: the value for the neighbour at -d is the value for +d, shifted by d. So only
    # the second half of the taps (below or to the right of the centre) is computed.
    later, earlier = [], []
    for first, *rest in _later_steps(window, dilation, len(size)):
        similarity = (unit * part(padded, (first, *(radius + step for step in rest)), size)).sum(dim=1)
        later.append(similarity)
        shifted = F.pad(similarity, (*(radius, radius) * (len(size) - 1), radius, 0))
        earlier.append(part(shifted, [radius - step for step in (first, *rest)], size))
    return spread(torch.stack(earlier[::-1] + later, dim=1), window, outer)


def local_similarity_backward(
    x: Tensor, similarity: Tensor, grad: Tensor, window: int, dilation: int
) -> Tensor:
    """Derivative of :func:`local_similarity` in ``x``, given the gradient of its result; ``similarity`` is not read.

    Beside the result there are three maps of the size of ``x``, whatever the window.
    """
    size, dtype = x.shape[2:], accumulation_dtype(x)
    radius = window // 2 * dilation
    features = x.to(dtype)
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    floored = norm.clamp_min(EPSILON)
    unit = features / floored
    padded = F.pad(unit, (radius, radius) * len(size))
    to_unit = torch.zeros_like(padded)
    inner = part(to_unit, [radius] * len(size), size)
    for tap, steps in enumerate(_later_steps(window, dilation, len(size))):
        half = window ** len(size) // 2
        # what reaches the pair of a pixel and its neighbour: from either of the two
        later, earlier = grad[:, half + tap, None].to(dtype), grad[:, half - 1 - tap, None].to(dtype)
        there = [radius + step for step in steps]
        shifted = F.pad(earlier, (radius, radius) * len(size))
        weight = later + part(shifted, there, size)
        inner.addcmul_(weight, part(padded, there, size))
        part(to_unit, there, size).addcmul_(weight, unit)
    along = (inner * unit).sum(dim=1, keepdim=True) * (
        norm > EPSILON
    )  # where the floor holds, it is constant
    return ((inner - along * unit) / floored).to(x.dtype).contiguous(memory_format=layout(x))


def _later_steps(window: int, dilation: int, dims: int) -> Iterator[tuple[int, ...]]:
    """Where the neighbours after the centre lie, in pixels by axis."""
    for tap, places in enumerate(product(range(window), repeat=dims)):
        if tap > window**dims // 2:
            yield tuple((place - window // 2) * dilation for place in places)


def neighbours(inner: int, window: int, device: torch.device, dims: int = 2) -> Tensor:
    """Channels of the neighbours in the middle of a window, of side ``inner``; the centre has none."""
    before, after = middle(inner, window, device, dims).tensor_split((inner**dims // 2,))
    return torch.cat((before, after[1:] - 1))


def spread(similarity: Tensor, inner: int, window: int) -> Tensor:
    """Similarities of a window, given those of its middle; the others lie outside the map and have 0."""
    if inner == window:
        return similarity
    batch, _, *size = similarity.shape
    dims = len(size)
    out = similarity.new_zeros(batch, window**dims - 1, *size)
    out = out.contiguous(memory_format=layout(similarity))
    return out.index_copy(1, neighbours(inner, window, similarity.device, dims), similarity)
