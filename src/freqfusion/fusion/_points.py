"""Attention of fine pixels to a few bilinear samples of the coarse map, at places of their own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from freqfusion.ops import resample
from freqfusion.ops._backends import needs_composite
from freqfusion.ops._checks import accumulation_dtype


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    heads: int,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Each pixel's mean of the samples of ``value``, weighted by ``softmax(scale * (query . sampled key + bias))``.

    The map is zero outside: a point there keeps its share of the softmax and brings nothing. The samples of one point
    at a time exist; the backward pass takes them again, rather than keep ``P`` enlarged copies of both maps.

    Args:
        query: ``(B, D, H, W)``.
        key: ``(B, D, h, w)``.
        value: ``(B, C, h, w)``.
        rows: ``(B, P, groups, H, W)`` where to sample, in coarse pixels, 0 at the centre of the first; at least
            float32. Key and value are cut into ``groups`` of channels with points of their own.
        columns: the same along the other axis.
        heads: parts that the channels are cut into for the products and weights.
        scale: of the products.
        bias: ``(B, P, heads, H, W)``, added to the products.

    Returns:
        ``(B, C, H, W)`` of the dtype of ``value``.
    """
    (h, w), (height, width) = value.shape[-2:], query.shape[-2:]
    # `resample` reads the border beyond the map, so the map gets a border of zeros, and counts from its own grid
    key, value = F.pad(key, (1, 1, 1, 1)), F.pad(value, (1, 1, 1, 1))
    row, column = (torch.arange(side, dtype=rows.dtype, device=rows.device) for side in (height, width))
    offsets = torch.cat(
        (
            columns + 1.5 - (column + 0.5) * (w + 2) / width,
            rows + 1.5 - (row[:, None] + 0.5) * (h + 2) / height,
        ),
        dim=2,
    ).unbind(1)
    dtype, groups = accumulation_dtype(query, value), rows.shape[2]

    def product(query: Tensor, key: Tensor, offsets: Tensor) -> Tensor:
        return (query * resample(key, offsets, groups)).unflatten(1, (heads, -1)).sum(2, dtype=dtype)

    def weighted(share: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
        sample = resample(value, offsets, groups).to(dtype).unflatten(1, (heads, -1))
        return (share[:, :, None] * sample).flatten(1, 2)

    recompute = torch.is_grad_enabled() and not (
        torch.compiler.is_compiling() or needs_composite(query, value)
    )

    def call(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        if not recompute:
            return function(*tensors)
        out: Tensor = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
        return out

    logits = torch.stack([call(product, query, key, point) for point in offsets], dim=1)
    shares = (scale * (logits if bias is None else logits + bias)).softmax(dim=1)
    parts = (
        call(weighted, *part) for part in zip(shares.unbind(1), [value] * len(offsets), offsets, strict=True)
    )
    out = next(parts)
    for part in parts:
        out = out + part
    return out.to(value.dtype)
