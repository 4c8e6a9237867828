"""The reassembly and its two adjoints in plain torch, without unfolded copies of the feature map.

Output pixels that read the same window are brought side by side: with ``s = ceil(H / h)`` rows (and as many
columns) for every coarse pixel, a fine map becomes ``s * s`` *phases* of the coarse size, and each tap is
one multiply-add of a shifted view of the coarse map. Where the ratio is no whole number some phases have no
output pixel; their kernels are zero. Nothing but the inputs is kept for the backward pass, and the adjoints
gather (no atomics), so they are deterministic.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype, is_channels_last, layout
from freqfusion.ops._windows import part
from freqfusion.ops.carafe.naive import pad, reflect_index


def _slots(fine: int, coarse: int) -> list[int]:
    """Place of each output row among the ``coarse * ceil(fine / coarse)`` rows of the phase layout."""
    scale = -(-fine // coarse)
    slots = []
    for row in range(fine):
        centre = row * coarse // fine
        first = -(-centre * fine // coarse)  # first output row whose window is centred there
        slots.append(centre * scale + row - first)
    return slots


def _spread(x: Tensor, axis: int, coarse: int) -> Tensor:
    """Put the rows of ``axis`` at their slots, zeros at the others; ``x`` itself at a whole-number ratio."""
    fine = x.shape[axis]
    full = coarse * -(-fine // coarse)
    if fine == full:
        return x
    out = x.new_zeros(*x.shape[:axis], full, *x.shape[axis + 1 :])
    slots = _slots(fine, coarse)
    if slots[-1] == fine - 1:  # only the end is missing, as from a map of 2 h - 1 rows
        out.narrow(axis, 0, fine).copy_(x)
        return out
    return out.index_copy_(axis, torch.tensor(slots, device=x.device), x)


def _collect(x: Tensor, axis: int, fine: int, coarse: int) -> Tensor:
    """Adjoint of :func:`_spread`: take the rows of ``axis`` from their slots."""
    if fine == x.shape[axis]:
        return x
    slots = _slots(fine, coarse)
    if slots[-1] == fine - 1:
        return x.narrow(axis, 0, fine)
    return x.index_select(axis, torch.tensor(slots, device=x.device))


def _split(x: Tensor, coarse: Sequence[int]) -> Tensor:
    """``(B, N, H, W)`` to phases ``(B, N, sy, sx, h, w)``; a view where the ratios are whole numbers."""
    for axis, side in enumerate(coarse, 2):
        x = _spread(x, axis, side)
    for axis, side in reversed(list(enumerate(coarse, 2))):
        x = x.unflatten(axis, (side, -1))
    return x.permute(0, 1, *range(3, x.ndim, 2), *range(2, x.ndim, 2))


def _merge(phases: Tensor, fine: Sequence[int]) -> Tensor:
    """Phases ``(B, N, sy, sx, h, w)`` back to ``(B, N, H, W)``."""
    scale, coarse = phases.shape[2 : 2 + len(fine)], phases.shape[2 + len(fine) :]
    pairs = [axis for pair in enumerate(range(2, 2 + len(fine)), 2 + len(fine)) for axis in pair]
    sides = [h * s for h, s in zip(coarse, scale, strict=True)]
    x = phases.permute(0, 1, *pairs).reshape(*phases.shape[:2], *sides)
    for axis, (side, length) in enumerate(zip(fine, coarse, strict=True), 2):
        x = _collect(x, axis, side, length)
    return x


def _phase(phases: Tensor, place: Sequence[int]) -> Tensor:
    """One phase ``(B, groups, N, h, w)`` of ``(B, groups, N, sy, sx, h, w)``; a view."""
    for index in place:
        phases = phases.select(3, index)
    return phases


def fold_padding(padded: Tensor, radius: int, reflect: bool) -> Tensor:
    """Adjoint of :func:`pad`: crop, and under reflection add each border row to the row it was taken from."""
    for axis in range(2, padded.ndim):
        length = padded.shape[axis] - 2 * radius
        core = padded.narrow(axis, radius, length)
        if reflect:
            core = core.clone()
            sources = reflect_index(length, radius, torch.device("cpu")).tolist()
            for place in (*range(radius), *range(radius + length, 2 * radius + length)):
                core.select(axis, sources[place]).add_(padded.select(axis, place))
        padded = core
    return padded


def carafe(x: Tensor, kernels: Tensor, kernel_size: int, groups: int, reflect: bool) -> Tensor:
    """Reassemble ``x`` ``(B, C, h, w)`` by ``kernels`` ``(B, groups * k * k, H, W)`` to ``(B, C, H, W)``.

    Volumes too, here and in the adjoints.
    """
    (batch, channels, *coarse), fine = x.shape, kernels.shape[2:]
    dims = len(coarse)
    if x.numel() == 0 or kernels.numel() == 0:
        return x.new_zeros(batch, channels, *fine).contiguous(memory_format=layout(x))
    dtype = accumulation_dtype(x, kernels)
    padded = pad(x.to(dtype), kernel_size // 2, reflect).unflatten(1, (groups, channels // groups))
    for _ in range(dims):
        padded = padded.unsqueeze(3)  # the same for all phases
    taps = _split(kernels.to(dtype), coarse).unflatten(1, (groups, kernel_size**dims)).contiguous()
    scale = taps.shape[3 : 3 + dims]
    if is_channels_last(x):  # channels innermost: the sums land in the output's own layout
        pairs = [side for pair in zip(coarse, scale, strict=True) for side in pair]
        out = torch.zeros(batch, *pairs, groups, channels // groups, dtype=dtype, device=x.device)
        out = out.permute(0, -2, -1, *range(2, 2 * dims + 1, 2), *range(1, 2 * dims + 1, 2))
    else:
        out = torch.zeros(batch, groups, channels // groups, *scale, *coarse, dtype=dtype, device=x.device)
    for tap, places in enumerate(product(range(kernel_size), repeat=dims)):
        out.addcmul_(part(padded, places, coarse), taps[:, :, tap, None])
    return _merge(out.flatten(1, 2), fine).to(x.dtype).contiguous(memory_format=layout(x))


def carafe_backward_x(
    kernels: Tensor, grad: Tensor, coarse: Sequence[int], kernel_size: int, groups: int, reflect: bool
) -> Tensor:
    """Adjoint of :func:`carafe` in ``x``: ``grad`` ``(B, C, H, W)`` to ``(B, C, h, w)`` of grad's dtype."""
    batch, channels = grad.shape[:2]
    dims = len(coarse)
    if grad.numel() == 0 or kernels.numel() == 0:
        return grad.new_zeros(batch, channels, *coarse).contiguous(memory_format=layout(grad))
    dtype = accumulation_dtype(kernels, grad)
    radius = kernel_size // 2
    incoming = _split(grad.to(dtype), coarse).unflatten(1, (groups, channels // groups)).contiguous()
    taps = _split(kernels.to(dtype), coarse).unflatten(1, (groups, kernel_size**dims)).contiguous()
    scale = taps.shape[3 : 3 + dims]
    sides = [side + 2 * radius for side in coarse]
    out = torch.zeros(batch, groups, channels // groups, *sides, dtype=dtype, device=grad.device)
    for tap, places in enumerate(product(range(kernel_size), repeat=dims)):
        window = part(out, places, coarse)
        for phase in product(*map(range, scale)):
            window.addcmul_(_phase(incoming, phase), _phase(taps[:, :, tap, None], phase))
    folded = fold_padding(out.flatten(1, 2), radius, reflect)
    return folded.to(grad.dtype).contiguous(memory_format=layout(grad))


def carafe_backward_kernels(x: Tensor, grad: Tensor, kernel_size: int, groups: int, reflect: bool) -> Tensor:
    """Adjoint of :func:`carafe` in ``kernels``: ``(B, groups * k * k, H, W)``, at least float32."""
    (batch, channels, *coarse), fine = x.shape, grad.shape[2:]
    dims = len(coarse)
    taps = kernel_size**dims
    dtype = accumulation_dtype(x, grad)
    if x.numel() == 0 or grad.numel() == 0:
        return torch.zeros(batch, groups * taps, *fine, dtype=dtype, device=grad.device)
    padded = pad(x.to(dtype), kernel_size // 2, reflect).unflatten(1, (groups, channels // groups))
    incoming = _split(grad.to(dtype), coarse).unflatten(1, (groups, channels // groups)).contiguous()
    scale = incoming.shape[3 : 3 + dims]
    out = torch.empty(batch, groups, taps, *scale, *coarse, dtype=dtype, device=grad.device)
    for tap, places in enumerate(product(range(kernel_size), repeat=dims)):
        window = part(padded, places, coarse)
        for phase in product(*map(range, scale)):
            place = _phase(out[:, :, tap, None], phase)[:, :, 0]
            torch.sum(_phase(incoming, phase) * window, dim=2, out=place)
    return _merge(out.flatten(1, 2), fine).contiguous()
