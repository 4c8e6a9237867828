"""Attention of every output pixel to coarse pixels near it, by dense products over tiles."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from freqfusion.features._rows import Rows

MAX_WEIGHTS = 2**23
"""Attention weights that exist at a time, where a tile has no more."""
_MAX_TILE = 32


def every(fine: int, coarse: int) -> Tensor:
    """Each output row sees each coarse row.

    Returns:
        ``(fine, coarse)``: how often output row I sees coarse row i, float32 on the CPU; so do the other rules.
    """
    return torch.ones(fine, coarse, device="cpu")


def around(fine: int, coarse: int, ratio: float) -> Tensor:
    """Coarse rows within a share ``ratio`` of the map's height of the centre of the output row.

    Evaluated in float32, as the published AnyUp does, which decides exact ties.
    """
    centres = (torch.arange(fine, dtype=torch.float32, device="cpu") + 0.5) / fine
    start = ((centres - ratio).clamp(0, 1) * coarse).floor()
    stop = ((centres + ratio).clamp(0, 1) * coarse).ceil()
    rows = torch.arange(coarse, device="cpu")
    return ((rows >= start[:, None]) & (rows < stop[:, None])).float()


def neighbourhood(fine: int, coarse: int, kernel_size: int, name: str) -> Tensor:
    """The window of neighbourhood attention, dilated by ``fine // coarse`` and shifted inside at borders.

    It is taken on output rows that read their coarse rows as nearest interpolation does, so a coarse row counts
    several times, or is skipped, where ``fine`` is no multiple of ``coarse``.

    Args:
        name: of the axis, for messages.

    Raises:
        ValueError: where the dilated window is longer than the axis.

    Source: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023.
    """
    dilation = fine // coarse
    if dilation < 1 or kernel_size * dilation > fine:
        raise ValueError(
            f"a window of {kernel_size} coarse {name} does not fit: {kernel_size} * ({fine} // {coarse}) is over "
            f"{fine}; give features of at least {kernel_size} {name}, or choose a smaller window"
        )
    places = torch.arange(fine, device="cpu")
    phase, place = places % dilation, places // dilation
    length = (fine - phase + dilation - 1) // dilation
    start = torch.minimum((place - kernel_size // 2).clamp_min(0), length - kernel_size)
    seen = phase[:, None] + dilation * (start[:, None] + torch.arange(kernel_size, device="cpu"))
    seen = ((2 * seen + 1) * coarse) // (2 * fine)
    counts = torch.zeros(fine, coarse, device="cpu")
    return counts.scatter_add_(1, seen, torch.ones(seen.shape, device="cpu"))


class _Tiles(NamedTuple):
    """One axis cut into tiles of output rows, each with one run of coarse rows that all of them read."""

    rows: int
    window: int
    starts: Tensor
    """``(tiles,)``"""
    bias: Tensor | None
    """``(tiles, rows, window)``: logarithm of the counts; None where all are 1."""


@torch.compiler.disable  # reads the counts' values
def _cut(counts: Tensor, like: Tensor, most: int = _MAX_TILE) -> _Tiles:
    """The tiles of least estimated cost: larger ones make better matrix products, of more unneeded entries."""
    fine, coarse = counts.shape
    scale = max(1, fine // coarse)
    sizes = {min(size, fine) for size in (1, 4, 8, 16, 32, scale, 2 * scale) if size <= most}
    best, least = None, math.inf
    for size in sorted(sizes):
        tiles = -(-fine // size)
        rows = torch.arange(tiles * size, device="cpu").clamp_max(fine - 1)
        tiled = counts[rows].unflatten(0, (tiles, size))
        seen = (tiled > 0).any(1)
        first, last = seen.int().argmax(1), coarse - 1 - seen.flip(1).int().argmax(1)
        window = int((last - first).max()) + 1
        cost = tiles * size * window * (1 + 4 / size)
        if cost < least:
            best, least = (size, window, first.clamp_max(coarse - window), tiled), cost
    assert best is not None
    size, window, starts, tiled = best
    places = starts[:, None, None] + torch.arange(window, device="cpu")
    picked = tiled.gather(2, places.expand(-1, size, -1))
    bias = None if bool((picked == 1).all()) else picked.double().log().to(like)
    return _Tiles(size, window, starts.to(like.device), bias)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, rows: Tensor, columns: Tensor, heads: int, mean: bool
) -> Tensor:
    """Softmax attention of output pixels to the coarse pixels that both axes let them see.

    Output pixel ``(I, J)`` sees coarse pixel ``(i, j)`` ``rows[I, i] * columns[J, j]`` times. Tiles of output
    pixels share a window of coarse pixels, so the work is dense matrix products; where gradients are computed the
    weights are computed again in the backward pass instead of being kept.

    Args:
        queries: ``(B, D, H, W)``; heads are runs of ``D / heads`` channels.
        keys: ``(B, D, h, w)``.
        values: ``(B, C, h, w)``.
        rows: ``(H, h)`` as :func:`every`, :func:`around` and :func:`neighbourhood` give it.
        columns: ``(W, w)``.
        heads: number of heads.
        mean: apply the mean of the heads' weights to all values; otherwise each head's to its ``C / heads``.

    Returns:
        ``(B, C, H, W)`` of the dtype of ``values``.
    """
    batch, channels, height, width = queries.shape
    dtype = values.dtype
    w = keys.shape[3]
    parts = 1 if mean else heads
    d, c = channels // heads, values.shape[1] // parts
    keys = _heads_last(keys * d**-0.5, heads)
    values = _heads_last(values.to(queries.dtype), parts)
    bands, stripes = _cut(rows, queries), _cut(columns, queries)
    per_row = max(1, batch * heads) * bands.window * stripes.rows * stripes.window
    if per_row * bands.rows > MAX_WEIGHTS:
        bands = _cut(rows, queries, max(1, MAX_WEIGHTS // per_row))
    missing = len(bands.starts) * bands.rows - height, len(stripes.starts) * stripes.rows - width
    queries = F.pad(queries, (0, missing[1], 0, missing[0])) if any(missing) else queries

    def block(queries: Tensor, keys: Tensor, values: Tensor, band: int, stripe: int) -> Tensor:
        """Of one rectangle of tiles, the first of which is tile ``(band, stripe)``."""
        down, across = queries.shape[2] // bands.rows, queries.shape[3] // stripes.rows
        band_stop, stripe_stop = band + down, stripe + across
        y = bands.starts[band:band_stop, None] + torch.arange(bands.window, device=queries.device)
        x = stripes.starts[stripe:stripe_stop, None] + torch.arange(stripes.window, device=queries.device)
        seen = (y[:, None, :, None] * w + x[None, :, None, :]).flatten()
        tiles = down * across
        if tiles == 1 and len(seen) == keys.shape[1]:  # the whole map
            k, v = keys[:, None], values[:, None]
        else:
            k, v = (z.index_select(1, seen).unflatten(1, (tiles, -1)) for z in (keys, values))
        q = queries.reshape(batch, heads, d, down, bands.rows, across, stripes.rows)
        # channels before pixels, so that runs of a row stay runs when they are copied
        q = q.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch * heads, tiles, d, bands.rows * stripes.rows)
        logits = q.transpose(-1, -2) @ k.transpose(-1, -2)
        bias = 0.0
        if bands.bias is not None:
            bias = bias + bands.bias[band:band_stop, None, :, None, :, None]
        if stripes.bias is not None:
            bias = bias + stripes.bias[None, stripe:stripe_stop, None, :, None, :]
        if isinstance(bias, Tensor):
            full = down, across, bands.rows, stripes.rows, bands.window, stripes.window
            logits = logits + bias.expand(full).reshape(logits.shape[1:])
        weights = logits.softmax(-1)
        if mean:
            weights = weights.unflatten(0, (batch, heads)).mean(1)
        out = v.transpose(-1, -2) @ weights.to(v.dtype).transpose(-1, -2)
        out = out.reshape(batch, parts, down, across, c, bands.rows, stripes.rows)
        return out.permute(0, 1, 4, 2, 5, 3, 6)

    per_tile = max(1, batch * heads * bands.rows * stripes.rows * bands.window * stripes.window)
    across = min(len(stripes.starts), max(1, MAX_WEIGHTS // per_tile))
    down = min(len(bands.starts), max(1, MAX_WEIGHTS // (per_tile * len(stripes.starts))))
    single = across == len(stripes.starts) and down == len(bands.starts)
    high, wide = down * bands.rows, across * stripes.rows
    # split, whose backward pass is one concatenation, where slices would each make a whole map
    pieces = [
        [(part, keys, values, i * down, j * across) for j, part in enumerate(band.split(wide, 3))]
        for i, band in enumerate(queries.split(high, 2))
    ]
    if torch.is_grad_enabled():
        bands_done = []
        for line in pieces:
            done = [
                block(*piece)
                if single
                else checkpoint(block, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in line
            ]
            bands_done.append(
                torch.cat([x.flatten(5).flatten(3, 4).flatten(1, 2) for x in done], 3).to(dtype)
            )
        return torch.cat(bands_done, 2)[..., :height, :width]
    out = queries.new_empty(batch, parts * c, *queries.shape[2:], dtype=dtype)
    for i, places in enumerate(out.split(high, 2)):
        for j, place in enumerate(places.split(wide, 3)):
            place = place.unflatten(3, (-1, stripes.rows)).unflatten(2, (-1, bands.rows))
            place.unflatten(1, (parts, c)).copy_(block(*pieces[i][j]))
    return out[..., :height, :width]


def attend_rows(
    queries: Rows, keys: Tensor, values: Tensor, rows: Tensor, columns: Tensor, heads: int, mean: bool
) -> Tensor:
    """:func:`attend` for queries that are computed by strips; their results go into one map at once."""
    strips = queries.strips()
    if len(strips) == 1:
        return attend(queries.whole(), keys, values, rows, columns, heads, mean)
    out = values.new_empty(*values.shape[:2], queries.height, columns.shape[0])
    for lo, hi in strips:
        out[:, :, lo:hi] = attend(queries(lo, hi), keys, values, rows[lo:hi], columns, heads, mean)
    return out


def _heads_last(x: Tensor, heads: int) -> Tensor:
    """``(B, C, h, w)`` to ``(B * heads, h * w, C / heads)``."""
    return x.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3).flatten(0, 1).contiguous()
