"""Tiles of pixels, and what a kernel may know of how its maps lie in memory."""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

from math import gcd
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from freqfusion.ops._triton import INTERPRETED
from freqfusion.ops._triton.maps import span

SIZES = (
    *("channels", "groups", "pixels", "height", "width", "h", "w", "unit_height", "unit_width"),
    *("tile_rows", "tile_columns", "length", "chunks", "images", "summing", "outputs"),
)
STRIDES = tuple(f"{name}_{axis}" for name in "xfgospr" for axis in "bchwp")


def compiled(function: Any) -> Any:
    """A kernel that is not compiled again for other sizes: of its numbers it knows only strides of one.

    What more it may rely on are constants: ``LAST`` (of :func:`is_last`), ``WIDE`` (of :func:`is_wide`) and ``ALIGN``
    (of :func:`alignment`).
    """
    return triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STRIDES)(function)


def is_last(*maps: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side in all maps."""
    return all(x.shape[1] > 1 and x.stride(1) == 1 for x in maps)


def is_wide(*maps: Tensor) -> bool:
    """Whether the places of one image's values do not all fit 32 bits."""
    return any(span(x) >= 2**31 for x in maps)


def pixel_stride(x: Tensor) -> int | None:
    """From one pixel to the next through all rows, where it is the same everywhere."""
    height, width = x.shape[-2:]
    down, across = x.stride()[-2:]
    if width == 1:
        return down
    return across if height == 1 or down == width * across else None


def alignment(last: bool, size: int, *maps: Tensor) -> int:
    """How many neighbouring values one access may take: up to 8 channels, or 2 pixels of a row.

    It divides the strides of all maps but those of the neighbours, which are one, and the number of these.

    Args:
        last: whether neighbours are channels of a pixel, instead of pixels of a row.
        size: their number.
        maps: whose values they are.
    """
    near, most = (1, 8) if last else (3, 2)
    if any(x.stride(near) != 1 for x in maps):
        return 1
    numbers = [size, most]
    for x in maps:
        numbers += [stride for axis, stride in enumerate(x.stride()) if axis != near]
        numbers.append(x.data_ptr() // x.element_size())
    return gcd(*numbers)


def described(last: bool, align: int) -> str:
    """How a map is read, and why not faster."""
    if not last:
        return "rows (the channels of a pixel do not lie side by side)"
    if align < 4:
        return "channels one by one (their number or a stride is not a multiple of 4)"
    return "channels side by side"


def tile_of_last(channels: int, align: int, values: int = 2048) -> dict[str, int]:
    """Height, width and channels of a tile of a map whose channels lie last.

    It has so many values, and fewer where a thread cannot take 8 of them at once: its registers hold so many.
    """
    block = min(64, max(16, triton.next_power_of_2(channels)))
    pixels = values // block if align >= 4 else 512 // block
    height = 8 if pixels >= 64 else 4 if pixels >= 16 else 2
    return {"TH": height, "TW": pixels // height, "BC": block, "RUN": 0}


def small(choices: list[dict[str, int]]) -> list[dict[str, int]]:
    """The choices; in the interpreter, tiles so narrow that a tiny map has several."""
    if not INTERPRETED:
        return choices
    return [
        {name: min(size, 8) if name in ("TW", "SW") else size for name, size in c.items()} for c in choices
    ]


@triton.jit
def aligned(number, ALIGN: tl.constexpr):
    """A multiple of ALIGN, so that the compiler knows that it is one."""
    return number // ALIGN * ALIGN


@triton.jit
def tile(program, height, width, TH: tl.constexpr, TW: tl.constexpr, RUN: tl.constexpr):
    """Rows and columns ``(TH * TW,)`` of the tile of a program, and the number of its image.

    RUN: how many neighbours of a row one thread takes; 0 leaves it to the compiler.
    """
    tiles = (width + TW - 1) // TW
    p = tl.arange(0, TH * TW)
    j = program % tiles * TW + p % TW
    if RUN > 0:
        j = tl.max_contiguous(j, [RUN])
    program //= tiles
    tiles = (height + TH - 1) // TH
    i = program % tiles * TH + p // TW
    return i, j, program // tiles
