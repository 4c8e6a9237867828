"""Reference of the inner products."""

import torch
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype
from freqfusion.ops._windows import reachable, spread
from freqfusion.ops.carafe.naive import pad


def window_similarity_naive(
    query: Tensor, key: Tensor, kernel_size: int, padding_mode: str = "zeros"
) -> Tensor:
    """One gathered key map a tap: the oracle and the exported form; nothing is checked."""
    (height, width), (h, w) = query.shape[-2:], key.shape[-2:]
    reflect = padding_mode == "reflect"
    inner = kernel_size if reflect else reachable(kernel_size, 1, h, w)[0]
    dtype = accumulation_dtype(query, key)
    padded = pad(key.to(dtype), inner // 2, reflect)
    rows = torch.div(torch.arange(height, device=key.device) * h, height, rounding_mode="floor")
    columns = torch.div(torch.arange(width, device=key.device) * w, width, rounding_mode="floor")
    products = []
    for tap in range(inner * inner):
        dy, dx = divmod(tap, inner)
        keys = padded.index_select(2, rows + dy).index_select(3, columns + dx)
        products.append((query.to(dtype) * keys).sum(dim=1))
    return spread(torch.stack(products, dim=1), inner, kernel_size, axis=1).to(query.dtype)
