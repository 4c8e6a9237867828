"""Maps of which rows are computed when they are asked for, so that no map but the result is ever whole."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.ops._checks import accumulation_dtype

Read = Callable[[int, int], Tensor]
"""``(first, last)`` to rows ``first`` to ``last - 1`` of a map, ``(B, C, last - first, W)``."""


def rows_of(x: Tensor) -> Read:
    """Rows of a map that is there, ``(B, C, H, W)``."""
    return lambda first, last: x[:, :, first:last]


class Stream:
    """A map that is computed from the top as its rows are asked for; rows that all readers have passed are forgotten.

    Args:
        compute: gives the rows ``(first, last)``; each is computed once.
        readers: how many read it, each from the top down.
    """

    def __init__(self, compute: Read, readers: int = 1) -> None:
        self._compute = compute
        self._blocks: list[Tensor] = []
        self._first = self._end = 0  # of the rows that are kept
        self._passed = [0] * readers

    def __call__(self, first: int, last: int) -> Tensor:
        return self.take(range(first, last))

    def take(self, rows: Sequence[int], reader: int = 0) -> Tensor:
        """The rows of these ascending numbers, for one of the readers."""
        self._passed[reader] = rows[0]
        while self._blocks and self._first + self._blocks[0].shape[2] <= min(self._passed):
            self._first += self._blocks.pop(0).shape[2]
        if rows[-1] >= self._end:
            self._blocks.append(self._compute(self._end, rows[-1] + 1))
            self._end = rows[-1] + 1
        found, first = [], self._first
        for block in self._blocks:
            places = [row - first for row in rows if 0 <= row - first < block.shape[2]]
            if places and places[-1] - places[0] == len(places) - 1:  # in a row, so no copy
                found.append(block[:, :, places[0] : places[-1] + 1])
            elif places:
                found.append(block[:, :, places])
            first += block.shape[2]
        return found[0] if len(found) == 1 else torch.cat(found, 2)


class Resized:
    """Stream of a map that :func:`torch.nn.functional.interpolate` would bring to another size.

    Args:
        read: the map.
        like: a tensor of its dtype and device.
        height: how many rows it has.
        size: to which size.
        options: ``mode`` and other arguments of ``interpolate``.
    """

    def __init__(self, read: Read, like: Tensor, height: int, size: Sequence[int], **options: Any) -> None:
        self._like = like
        self._read, self._height, self._size, self._options = read, height, tuple(size), options
        self._weights: Tensor | None = None

    def __call__(self, first: int, last: int) -> Tensor:
        height, width = self._size
        if (first, last) == (0, height):
            x = self._read(0, self._height)
            return interpolate(x, self._size, **self._options)
        if self._weights is None:
            self._weights = row_weights(self._like, self._height, height, **self._options)
        weights = self._weights[first:last]
        used = weights.any(0).nonzero()
        lowest, highest = int(used[0]), int(used[-1]) + 1
        x = self._read(lowest, highest)
        x = interpolate(x, (highest - lowest, width), **self._options)
        return weights[:, lowest:highest] @ x


def interpolate(x: Tensor, size: Sequence[int], **options: Any) -> Tensor:
    """:func:`torch.nn.functional.interpolate`; the map itself where it has that size already."""
    if x.shape[-2:] == tuple(size):
        return x
    wide = (
        accumulation_dtype(x) if options.get("antialias") else x.dtype
    )  # half precision has no antialiasing
    return F.interpolate(x.to(wide), tuple(size), **options).to(x.dtype)


def row_weights(like: Tensor, height: int, out: int, **options: Any) -> Tensor:
    """``(out, height)``: what interpolation makes of each row of a map alone; of the dtype of ``like``."""
    eye = torch.eye(height, dtype=accumulation_dtype(like), device=like.device)[None, None]
    return F.interpolate(eye, (out, height), **options)[0, 0].to(like.dtype)


def refuse_training(module: nn.Module, chunk: int | None) -> None:
    """Batch norm would take each strip's own statistics, and dropout leave out other channels in each."""
    if module.training and chunk is not None:
        raise ValueError(
            f"chunk is for evaluation: call .eval() of the {type(module).__name__}, or leave chunk out"
        )


def in_strips(read: Read, height: int, chunk: int | None, dtype: torch.dtype) -> Tensor:
    """A whole map ``(B, C, H, W)``, ``chunk`` of its ``height`` rows at a time; by default all at once."""
    if chunk is None or chunk >= height:
        return read(0, height).to(dtype)
    out: Tensor | None = None
    for first in range(0, height, chunk):
        strip = read(first, min(first + chunk, height))
        if out is None:
            batch, channels, _, width = strip.shape
            out = strip.new_empty(batch, channels, height, width, dtype=dtype)
        out[:, :, first : first + chunk] = strip
    assert out is not None  # a map has rows
    return out
