"""The reassembly and its two adjoints in plain torch, without unfolded copies of the feature map.

Output pixels that read the same window are brought side by side: with ``s = ceil(H / h)`` rows (and as many
columns) for every coarse pixel, a fine map becomes ``s * s`` *phases* of the coarse size, and each tap is
one multiply-add of a shifted view of the coarse map. Where the ratio is no whole number some phases have no
output pixel; their kernels are zero. Nothing but the inputs is kept for the backward pass, and the adjoints
gather (no atomics), so they are deterministic.
"""

import torch
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype, is_channels_last, layout
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


def _split(x: Tensor, h: int, w: int) -> Tensor:
    """``(B, N, H, W)`` to phases ``(B, N, sy, sx, h, w)``; a view where the ratios are whole numbers."""
    x = _spread(_spread(x, 2, h), 3, w)
    return x.unflatten(3, (w, -1)).unflatten(2, (h, -1)).permute(0, 1, 3, 5, 2, 4)


def _merge(phases: Tensor, height: int, width: int) -> Tensor:
    """Phases ``(B, N, sy, sx, h, w)`` back to ``(B, N, H, W)``."""
    batch, channels, sy, sx, h, w = phases.shape
    x = phases.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, h * sy, w * sx)
    return _collect(_collect(x, 2, height, h), 3, width, w)


def fold_padding(padded: Tensor, radius: int, reflect: bool) -> Tensor:
    """Adjoint of :func:`pad`: crop, and under reflection add each border row to the row it was taken from."""
    for axis in (-2, -1):
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
    """Reassemble ``x`` ``(B, C, h, w)`` by ``kernels`` ``(B, groups * k * k, H, W)`` to ``(B, C, H, W)``."""
    (batch, channels, h, w), (height, width) = x.shape, kernels.shape[-2:]
    if x.numel() == 0 or kernels.numel() == 0:
        return x.new_zeros(batch, channels, height, width).contiguous(memory_format=layout(x))
    dtype = accumulation_dtype(x, kernels)
    padded = pad(x.to(dtype), kernel_size // 2, reflect).unflatten(1, (groups, channels // groups))
    taps = _split(kernels.to(dtype), h, w).unflatten(1, (groups, kernel_size * kernel_size)).contiguous()
    sy, sx = taps.shape[3:5]
    if is_channels_last(x):  # channels innermost: the sums land in the output's own layout
        out = torch.zeros(batch, h, sy, w, sx, groups, channels // groups, dtype=dtype, device=x.device)
        out = out.permute(0, 5, 6, 2, 4, 1, 3)
    else:
        out = torch.zeros(batch, groups, channels // groups, sy, sx, h, w, dtype=dtype, device=x.device)
    for tap in range(kernel_size * kernel_size):
        dy, dx = divmod(tap, kernel_size)
        window = padded[..., dy : dy + h, dx : dx + w]
        out.addcmul_(window[:, :, :, None, None], taps[:, :, tap, None])
    merged = _merge(out.flatten(1, 2), height, width)
    return merged.to(x.dtype).contiguous(memory_format=layout(x))


def carafe_backward_x(
    kernels: Tensor, grad: Tensor, h: int, w: int, kernel_size: int, groups: int, reflect: bool
) -> Tensor:
    """Adjoint of :func:`carafe` in ``x``: ``grad`` ``(B, C, H, W)`` to ``(B, C, h, w)`` of grad's dtype."""
    batch, channels = grad.shape[:2]
    if grad.numel() == 0 or kernels.numel() == 0:
        return grad.new_zeros(batch, channels, h, w).contiguous(memory_format=layout(grad))
    dtype = accumulation_dtype(kernels, grad)
    radius = kernel_size // 2
    incoming = _split(grad.to(dtype), h, w).unflatten(1, (groups, channels // groups)).contiguous()
    taps = _split(kernels.to(dtype), h, w).unflatten(1, (groups, kernel_size * kernel_size)).contiguous()
    sy, sx = taps.shape[3:5]
    out = torch.zeros(
        batch, groups, channels // groups, h + 2 * radius, w + 2 * radius, dtype=dtype, device=grad.device
    )
    for tap in range(kernel_size * kernel_size):
        dy, dx = divmod(tap, kernel_size)
        window = out[..., dy : dy + h, dx : dx + w]
        for py in range(sy):
            for px in range(sx):
                window.addcmul_(incoming[:, :, :, py, px], taps[:, :, tap, None, py, px])
    folded = fold_padding(out.flatten(1, 2), radius, reflect)
    return folded.to(grad.dtype).contiguous(memory_format=layout(grad))


def carafe_backward_kernels(x: Tensor, grad: Tensor, kernel_size: int, groups: int, reflect: bool) -> Tensor:
    """Adjoint of :func:`carafe` in ``kernels``: ``(B, groups * k * k, H, W)``, at least float32."""
    (batch, channels, h, w), (height, width) = x.shape, grad.shape[-2:]
    taps = kernel_size * kernel_size
    dtype = accumulation_dtype(x, grad)
    if x.numel() == 0 or grad.numel() == 0:
        return torch.zeros(batch, groups * taps, height, width, dtype=dtype, device=grad.device)
    padded = pad(x.to(dtype), kernel_size // 2, reflect).unflatten(1, (groups, channels // groups))
    incoming = _split(grad.to(dtype), h, w).unflatten(1, (groups, channels // groups)).contiguous()
    sy, sx = incoming.shape[3:5]
    out = torch.empty(batch, groups, taps, sy, sx, h, w, dtype=dtype, device=grad.device)
    for tap in range(taps):
        dy, dx = divmod(tap, kernel_size)
        window = padded[..., dy : dy + h, dx : dx + w]
        for py in range(sy):
            for px in range(sx):
                torch.sum(incoming[:, :, :, py, px] * window, dim=2, out=out[:, :, tap, py, px])
    return _merge(out.flatten(1, 2), height, width).contiguous()
