"""How a map lies in memory, told to a kernel so that it is compiled once for all sizes that lie alike."""

# Triton gives the arguments of a kernel their types.
# mypy: disallow-untyped-defs=False

import math
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Dense(NamedTuple):
    """A map whose channels (``last``) or columns lie side by side.

    ``strides`` over images, over the other of channels and columns, and over rows, divided by ``unit``, the power of
    two up to eight that divides them and the length of what lies side by side: it tells which loads may be wide. A
    kernel takes the strides unspecialised, and ``last`` and ``unit`` as constants.
    """

    strides: tuple[int, int, int]
    last: bool
    unit: int

    def constants(self, name: str) -> dict[str, Any]:
        return {f"{name}_LAST": self.last, f"{name}_UNIT": self.unit}


def dense(x: Tensor, groups: int = 1) -> Dense | None:
    """How a map lies in memory; None where neither channels nor columns lie side by side."""
    return _dense(x.shape, x.stride(), groups)


@lru_cache(4096)  # every launch asks about all its maps
def _dense(shape: tuple[int, ...], strides: tuple[int, ...], groups: int) -> Dense | None:
    last = strides[1] == 1 and shape[1] > 1
    if not last and strides[3] != 1 and shape[3] > 1:
        return None
    axes = (0, 3 if last else 1, 2)
    images, other, rows = (strides[axis] if shape[axis] > 1 else 0 for axis in axes)
    unit = math.gcd(8, images, other, rows, shape[1] // groups if last else shape[3])
    return Dense((images // unit, other // unit, rows // unit), last, unit)


def dense_map(x: Tensor, groups: int = 1) -> Dense:
    """:func:`dense` of a map that is."""
    found = dense(x, groups)
    assert found is not None, f"neither channels nor columns lie side by side: strides {x.stride()}"
    return found


def span(x: Tensor) -> int:
    """Places from the first to the last value of one image: below 2**31, 32 bits count them."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def stride_names(*maps: str) -> list[str]:
    """The arguments that a kernel takes for the strides of maps, for ``do_not_specialize``."""
    return [f"{name}_{axis}" for name in maps for axis in ("b", "n", "h")]


@triton.jit
def map_strides(images, other, rows, LAST: tl.constexpr, UNIT: tl.constexpr):
    """Strides over images (64 bit), channels, rows and columns of a :class:`Dense` map."""
    images = images.to(tl.int64) * UNIT
    other = other * UNIT
    rows = rows * UNIT
    return (images, 1, rows, other) if LAST else (images, other, rows, 1)
