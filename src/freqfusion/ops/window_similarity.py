"""Inner products of each fine pixel with the coarse pixels of a window."""

import torch
from torch import Tensor

from freqfusion.ops._backends import needs_composite
from freqfusion.ops._checks import accumulation_dtype, check_filled, check_kernel_size, check_map, check_pair
from freqfusion.ops._windows import reachable, spread
from freqfusion.ops.carafe.function import kernel_gradient
from freqfusion.ops.carafe.naive import pad


def window_similarity_naive(query: Tensor, key: Tensor, kernel_size: int) -> Tensor:
    """One gathered key map a tap: the oracle and the exported form; nothing is checked."""
    (height, width), (h, w) = query.shape[-2:], key.shape[-2:]
    inner, _ = reachable(kernel_size, 1, h, w)
    dtype = accumulation_dtype(query, key)
    padded = pad(key.to(dtype), inner // 2, reflect=False)
    rows = torch.div(torch.arange(height, device=key.device) * h, height, rounding_mode="floor")
    columns = torch.div(torch.arange(width, device=key.device) * w, width, rounding_mode="floor")
    products = []
    for tap in range(inner * inner):
        dy, dx = divmod(tap, inner)
        keys = padded.index_select(2, rows + dy).index_select(3, columns + dx)
        products.append((query.to(dtype) * keys).sum(dim=1))
    return spread(torch.stack(products, dim=1), inner, kernel_size, axis=1).to(query.dtype)


def window_similarity(query: Tensor, key: Tensor, kernel_size: int) -> Tensor:
    """Inner product of every fine pixel's query with the keys of the window around its coarse parent.

    Pixel ``(I, J)`` meets the window centred at ``(floor(I * h / H), floor(J * w / W))``, the one that
    :func:`freqfusion.ops.carafe` reads there. Keys outside the map give 0.

    Args:
        query: ``(B, E, H, W)``, floating point.
        key: ``(B, E, h, w)``, floating point.
        kernel_size: odd side of the window.

    Returns:
        ``(B, kernel_size**2, H, W)`` of the dtype of ``query``, rows outer to columns.

    Raises:
        TypeError: for integer tensors and arguments of another type, such as a float kernel size.
        ValueError: for wrong rank, channels, batch, device or kernel size, and an empty ``key``.

    Source: Lu et al., "SAPA", NeurIPS 2022. This is also the derivative of the reassembly in its kernels,
    which computes it.

    >>> query, key = torch.ones(1, 2, 2, 2), torch.ones(1, 2, 1, 1)
    >>> window_similarity(query, key, kernel_size=3)[0, :, 0, 0]
    tensor([0., 0., 0., 0., 2., 0., 0., 0., 0.])
    """
    check_map("query", query)
    check_map("key", key)
    check_pair("query", query, "key", key)
    check_filled("key", key)
    kernel_size = check_kernel_size("kernel_size", kernel_size)
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"query and key must have equal channels, got {query.shape[1]} and {key.shape[1]}")
    if needs_composite(query, key):
        return window_similarity_naive(query, key, kernel_size)
    return kernel_gradient(key, query, kernel_size).to(query.dtype)
