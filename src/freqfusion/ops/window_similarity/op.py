"""Inner products of each fine pixel with the coarse pixels of a window."""

from torch import Tensor

from freqfusion.ops._backends import OPERATORS, Operator, choose, needs_composite
from freqfusion.ops._checks import check_filled, check_kernel_size, check_map, check_padding_mode, check_pair
from freqfusion.ops.carafe.op import cannot, carafe_backward_kernels
from freqfusion.ops.window_similarity.naive import window_similarity_naive

OPERATORS["window_similarity"] = Operator(
    2, ("native", "triton"), lambda backend, query, key: cannot(backend, key, query)
)


def window_similarity(query: Tensor, key: Tensor, kernel_size: int, padding_mode: str = "zeros") -> Tensor:
    """Inner product of every fine pixel's query with the keys of the window around its coarse parent.

    Pixel ``(I, J)`` meets the window centred at ``(floor(I * h / H), floor(J * w / W))``, the one that
    :func:`freqfusion.ops.carafe` reads there.

    Args:
        query: ``(B, E, H, W)``, floating point.
        key: ``(B, E, h, w)``, floating point.
        kernel_size: odd side of the window.
        padding_mode: ``"zeros"``: keys outside the map give 0; ``"reflect"``: the mirrored key counts.

    Returns:
        ``(B, kernel_size**2, H, W)`` of the dtype of ``query``, rows outer to columns.

    Raises:
        TypeError: for integer tensors and arguments of another type, such as a float kernel size.
        ValueError: for wrong rank, channels, batch, device, kernel size or padding mode, and an empty ``key``.

    Source: Lu et al., "SAPA", NeurIPS 2022. This is also the derivative of the reassembly in its kernels,
    which computes it.

    >>> import torch
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
    reflect = check_padding_mode(padding_mode)
    if needs_composite(query, key):
        return window_similarity_naive(query, key, kernel_size, padding_mode)
    chosen = choose("window_similarity", None, query, key)
    return carafe_backward_kernels(key, query, kernel_size, 1, reflect, chosen).to(query.dtype)
