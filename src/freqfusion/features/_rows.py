"""Image encoders written once for the whole map and for strips of its rows, which give the same result."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Read = Callable[[int, int], Tensor]


class Rows:
    """A map whose rows are computed when they are read.

    Every step from one map to the next says which rows it reads, so a few rows of the last map cost a few rows of
    each before. Nothing is kept but statistics: :meth:`norm` reads the map once when it is built.

    Args:
        height: number of rows.
        read: ``read(lo, hi)`` gives rows ``lo`` to ``hi - 1``, ``(B, C, hi - lo, W)``.
        chunk: rows that are read at a time in passes over the whole map.

    >>> image = torch.rand(1, 3, 9, 8)
    >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
    >>> with torch.no_grad():
    ...     rows = Rows.of(image, chunk=2).through(encoder)
    ...     torch.allclose(rows(3, 6), encoder(image)[:, :, 3:6], atol=1e-5)
    True
    """

    def __init__(self, height: int, read: Read, chunk: int) -> None:
        self.height = height
        self.read = read
        self.chunk = chunk

    def __call__(self, lo: int, hi: int) -> Tensor:
        return self.read(lo, hi)

    @staticmethod
    def of(x: Tensor, chunk: int | None) -> "Rows":
        """Rows of a map that is there, ``(B, C, H, W)``; without ``chunk`` each step computes the whole next map."""
        return _Whole(x) if chunk is None else Rows(x.shape[2], lambda lo, hi: x[:, :, lo:hi], chunk)

    def strips(self) -> list[tuple[int, int]]:
        """``(lo, hi)`` of runs of at most ``chunk`` rows that make up the map."""
        return [(lo, min(lo + self.chunk, self.height)) for lo in range(0, self.height, self.chunk)]

    def whole(self) -> Tensor:
        """The map, for one that is small."""
        return torch.cat([self(lo, hi) for lo, hi in self.strips()], 2)

    def through(self, module: nn.Module) -> "Rows":
        """The map after a layer.

        Sequences, convolutions of stride 1 that keep the size, group norms, and layers that act on each pixel by
        itself are understood; a module of several layers says in a method ``rows(self, x: Rows) -> Rows`` what it
        does.
        """
        own: Callable[[Rows], Rows] | None = getattr(module, "rows", None)
        if own is not None:
            return own(self)
        if isinstance(module, nn.Sequential):
            x = self
            for layer in module:
                x = x.through(layer)
            return x
        if isinstance(module, nn.GroupNorm):
            return self.norm(module)
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            return self.convolved(module)
        return self.each(module)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """The map after a function that acts on each pixel by itself."""
        return Rows(self.height, lambda lo, hi: function(self(lo, hi)), self.chunk)

    def placed(self, function: Callable[[Tensor, int, int], Tensor]) -> "Rows":
        """The same for a function that is told the rows' places: ``function(x, lo, hi)``."""
        return Rows(self.height, lambda lo, hi: function(self(lo, hi), lo, hi), self.chunk)

    def kept(self) -> "Rows":
        """This map with the rows of a read kept for the next, for one that is read by both sides of a sum.

        The side that needs more rows has to read first.
        """
        first, rows = 0, None

        def read(lo: int, hi: int) -> Tensor:
            nonlocal first, rows
            if rows is not None and first <= lo and hi <= first + rows.shape[2]:
                found, rows = rows[:, :, lo - first : hi - first], None
                return found
            first, rows = lo, self(lo, hi)
            return rows

        return Rows(self.height, read, self.chunk)

    def joined(self, other: "Rows", how: Callable[[Tensor, Tensor], Tensor]) -> "Rows":
        """A function of this map and another, pixel by pixel; this one is read first."""
        return Rows(self.height, lambda lo, hi: how(self(lo, hi), other(lo, hi)), self.chunk)

    def norm(self, module: nn.GroupNorm) -> "Rows":
        """After a group norm, whose statistics are of the whole map."""
        count = 0
        mean = spread = torch.zeros(())  # spread: sum of squared differences from the mean
        for lo, hi in self.strips():
            x = self(lo, hi).unflatten(1, (module.num_groups, -1)).flatten(2)
            more = x.shape[2]
            dtype = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
            variance, middle = (y.to(dtype) for y in torch.var_mean(x, 2, correction=0))
            step = middle - mean
            mean = mean + step * (more / (count + more))
            spread = spread + variance * more + step.square() * (count * more / (count + more))
            count += more
        scale, shift = _affine(mean, spread / count, module)
        return self.each(lambda x: torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype)))

    def pooled(self, size: Sequence[int]) -> "Rows":
        """After adaptive average pooling to ``size``."""
        height, width = size
        ends = [(t * self.height // height, -(-(t + 1) * self.height // height)) for t in range(height)]

        def read(lo: int, hi: int) -> Tensor:
            first, last = ends[lo][0], ends[hi - 1][1]
            x = self(first, last)
            x = x if x.shape[3] == width else F.adaptive_avg_pool2d(x, (x.shape[2], width))
            if height == self.height:
                return x
            return torch.stack([x[:, :, a - first : b - first].mean(2) for a, b in ends[lo:hi]], 2)

        return Rows(height, read, max(1, self.chunk * height // self.height))

    def convolved(self, module: nn.Conv2d) -> "Rows":
        """After a convolution of stride 1 that keeps the size, with borders of zeros or reflected."""
        reach = (module.kernel_size[0] - 1) * module.dilation[0] // 2
        side = (module.kernel_size[1] - 1) * module.dilation[1] // 2
        reflect = module.padding_mode == "reflect"
        if module.padding_mode not in ("zeros", "reflect") or module.stride != (1, 1):
            raise ValueError(
                f"{module} cannot be computed by strips: expected stride 1 and borders of zeros or mirrored"
            )

        def read(lo: int, hi: int) -> Tensor:
            first, last = max(0, lo - reach), min(self.height, hi + reach)
            top, bottom = first - (lo - reach), hi + reach - last
            if reflect and (top or bottom):  # mirrored rows may lie beyond those of the window
                end = self.height - 1
                places = [end - abs(end - abs(i)) for i in range(lo - reach, hi + reach)]
                first, last = min(places), max(places) + 1
                x = self(first, last)
                x = x.index_select(2, torch.tensor([i - first for i in places], device=x.device))
            else:
                x = self(first, last)
                x = F.pad(x, (0, 0, top, bottom)) if top or bottom else x
            x = F.pad(x, (side, side, 0, 0), mode="reflect" if reflect else "constant")
            return F.conv2d(x, module.weight, module.bias, 1, 0, module.dilation, module.groups)

        return Rows(self.height, read, self.chunk)


class _Whole(Rows):
    """A map that is there, and so is that after every step; gradients flow."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(
            x.shape[2], lambda lo, hi: x if (lo, hi) == (0, x.shape[2]) else x[:, :, lo:hi], x.shape[2]
        )
        self.x = x

    def whole(self) -> Tensor:
        return self.x

    def each(self, function: Callable[[Tensor], Tensor]) -> Rows:
        return _Whole(function(self.x))

    def placed(self, function: Callable[[Tensor, int, int], Tensor]) -> Rows:
        return _Whole(function(self.x, 0, self.height))

    def kept(self) -> Rows:
        return self

    def joined(self, other: Rows, how: Callable[[Tensor, Tensor], Tensor]) -> Rows:
        return _Whole(how(self.x, other.whole()))

    def norm(self, module: nn.GroupNorm) -> Rows:
        return _Whole(module(self.x))

    def pooled(self, size: Sequence[int]) -> Rows:
        height, width = size
        same = (height, width) == self.x.shape[2:]
        return self if same else _Whole(F.adaptive_avg_pool2d(self.x, (height, width)))

    def convolved(self, module: nn.Conv2d) -> Rows:
        return _Whole(module(self.x))


def _affine(mean: Tensor, variance: Tensor, module: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift ``(B, C, 1, 1)`` that a group norm of these statistics ``(B, groups)`` is."""
    width = module.num_channels // module.num_groups
    scale = (variance + module.eps).rsqrt().repeat_interleave(width, 1)
    mean = mean.repeat_interleave(width, 1)
    scale = scale if module.weight is None else scale * module.weight
    shift = -mean * scale if module.bias is None else module.bias - mean * scale
    return scale[..., None, None], shift[..., None, None]
