"""How far predicted boundaries lie from the true ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion._optional import require
from freqfusion.metrics.functional import check_labels

RESOLUTION = 0.25
"""Distances are counted in steps of this many pixels for the percentile, which is off by half a step at most."""

DIRECTIONS = ("truth_to_prediction", "prediction_to_truth", "both")


def distance_to_boundary(labels: Tensor, max_distance: int, ignore_index: int = 255) -> Tensor:
    """Chessboard distance of every pixel to the nearest pixel of another class.

    1 is a pixel that touches another class, also at a corner. Neither the border of the image nor an ignored
    pixel is another class: what lies beyond is not known.

    Args:
        labels: ``(B, H, W)``, integers from 0 to 2**24, or ``ignore_index``.
        max_distance: where to stop looking, at least 1.
        ignore_index: the label of pixels without truth.

    Returns:
        ``(B, H, W)`` int64 from 1 to ``max_distance``; ``max_distance + 1`` where no other class is as near, and
        at ignored pixels.

    Raises:
        ValueError: for ``max_distance`` below 1.

    Example:
        >>> distance_to_boundary(torch.tensor([[[0, 0, 0, 1, 1, 255, 255, 2]]]), max_distance=2).tolist()
        [[[3, 2, 1, 1, 2, 3, 3, 3]]]
    """
    if max_distance < 1:
        raise ValueError(f"max_distance must be at least 1 pixel, got {max_distance}")
    kept = labels != ignore_index
    # an ignored pixel must be neither the largest nor the smallest label of a window
    largest = labels.where(kept, -1).float()[:, None]
    negated = -labels.where(kept, 2**24).float()[:, None]
    distance = torch.full(labels.shape, max_distance + 1, dtype=torch.int64, device=labels.device)
    for step in range(1, max_distance + 1):
        largest, negated = (F.max_pool2d(x, 3, stride=1, padding=1) for x in (largest, negated))
        differs = (largest > -negated)[:, 0] & kept
        distance = distance.where(~differs | (distance <= max_distance), step)
    return distance


@dataclass(frozen=True)
class BoundaryDisplacement:
    """Distances of boundary pixels to the nearest boundary pixel of their class on the other side, in pixels."""

    mean: float | None
    """Over the pixels that have a counterpart; None if none has."""
    percentile_95: float | None
    """The smallest distance that 95 % of the pixels with a counterpart do not exceed, to 0.125 pixels."""
    within: dict[int, float | None]
    """For each n the share of all boundary pixels with a counterpart at most n pixels away; None without pixels."""
    pixels: int
    """Boundary pixels."""
    unmatched: int
    """Those in images where the other side has no boundary of the class: a whole object missed, or invented."""


@dataclass(frozen=True)
class BoundaryDistanceResult:
    """Displacements by direction: ``"truth_to_prediction"``, ``"prediction_to_truth"`` and ``"both"``."""

    per_class: dict[str, dict[int, BoundaryDisplacement]]
    """Of the classes that have a boundary in truth or prediction."""
    overall: dict[str, BoundaryDisplacement]
    """Of the boundary pixels of all classes together."""

    def rows(self, class_names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One row a direction and class, and one for all classes; for tables and CSV."""
        rows = []
        for direction in DIRECTIONS:
            named = [
                (class_names[k] if class_names else k, score)
                for k, score in self.per_class[direction].items()
            ]
            for name, score in (*named, ("all classes", self.overall[direction])):
                row: dict[str, Any] = {"direction": direction, "class": name, "mean": score.mean}
                row["percentile_95"] = score.percentile_95
                row |= {f"within_{n}": share for n, share in score.within.items()}
                rows.append(row | {"pixels": score.pixels, "unmatched": score.unmatched})
        return rows


@dataclass
class _Sums:
    """What is kept of the distances of one class and direction."""

    within: Tensor
    pixels: int = 0
    matched: int = 0
    total: float = 0.0
    histogram: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def add(self, other: "_Sums") -> None:
        self.within = self.within + other.within
        self.pixels += other.pixels
        self.matched += other.matched
        self.total += other.total
        length = max(len(self.histogram), len(other.histogram))
        mine, others = (F.pad(x, (0, length - len(x))) for x in (self.histogram, other.histogram))
        self.histogram = mine + others

    def displacement(self, steps: Sequence[int]) -> BoundaryDisplacement:
        percentile = None
        if self.matched:
            enough = 20 * self.histogram.cumsum(0) >= 19 * self.matched
            percentile = float(enough.long().argmax()) * RESOLUTION
        return BoundaryDisplacement(
            mean=self.total / self.matched if self.matched else None,
            percentile_95=percentile,
            within={
                n: int(count) / self.pixels if self.pixels else None
                for n, count in zip(steps, self.within, strict=True)
            },
            pixels=self.pixels,
            unmatched=self.pixels - self.matched,
        )


class BoundaryDistance:
    """Distance between predicted and true boundaries per class, over any number of images.

    A boundary pixel of class k is a pixel of k that touches another class, also at a corner (so a boundary runs
    along both its sides, once for each class). The border of the image and ignored pixels make no boundary, other
    than in :func:`~freqfusion.metrics.functional.boundary_counts`: both lie at the same place in truth and
    prediction, and their distance of zero would say nothing about the prediction. Where the truth is ignored, so is
    the prediction. If a band of ignored pixels covers a boundary, as in Pascal VOC, there is no boundary to
    measure, and none is counted.

    Each boundary pixel of class k in the truth is measured to the nearest boundary pixel of k in the prediction of
    the same image, Euclidean and exact (``truth_to_prediction``), and the other way round; ``both`` pools the two.
    Distances are summed in float64; memory does not grow with the images.

    Args:
        num_classes: K.
        ignore_index: the label of pixels without truth.
        within: distances n, in pixels, for the shares within n.

    Raises:
        ValueError: for fewer than 1 class, or a distance that is not a number of 0 or more.
        ImportError: at the first update, if SciPy is not installed.

    Example:
        >>> target = torch.zeros(1, 6, 8, dtype=torch.int64)
        >>> target[:, :, 4:] = 1
        >>> metric = BoundaryDistance(num_classes=2, within=(1, 3))
        >>> metric.update(target.roll(2, dims=2).index_fill(2, torch.tensor([0, 1]), 0), target)
        >>> score = metric.compute().overall["both"]
        >>> score.mean, score.percentile_95, score.within
        (2.0, 2.0, {1: 0.0, 3: 1.0})
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, within: Sequence[int] = (1, 3, 5)) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if any(n < 0 for n in within):
            raise ValueError(f"within must hold distances of 0 or more pixels, got {tuple(within)}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.within = tuple(within)
        self._sums: dict[str, dict[int, _Sums]] = {direction: {} for direction in DIRECTIONS[:2]}

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            pred: ``(B, H, W)``, integers; a value outside ``0..K-1`` is no class, but bounds one.
            target: ``(B, H, W)``, integers in ``0..K-1`` or ``ignore_index``.

        Raises:
            TypeError: for floating-point maps.
            ValueError: for wrong shapes or a truth label that is no class.
        """
        neighbours = require("scipy.spatial", "train").cKDTree
        check_labels(pred, target, self.num_classes, self.ignore_index)
        target, pred = target.long(), pred.long()
        kept = target != self.ignore_index
        nothing, ignored = self.num_classes, -1
        pred = pred.where((pred >= 0) & (pred < self.num_classes), nothing).where(kept, ignored)
        target = target.where(kept, ignored)
        for truth, guess in zip(self._boundaries(target), self._boundaries(pred), strict=True):
            for direction, here, there in zip(DIRECTIONS, (truth, guess), (guess, truth), strict=False):
                for k, points in here.items():
                    distances = torch.empty(0, dtype=torch.float64)
                    if k in there:
                        found, _ = neighbours(there[k].numpy()).query(points.numpy())
                        distances = torch.from_numpy(found)
                    sums = self._sums[direction].setdefault(k, self._nothing())
                    sums.add(self._measured(distances, len(points)))

    def _boundaries(self, labels: Tensor) -> Iterator[dict[int, Tensor]]:
        """For each image the places ``(N, 2)`` of the boundary pixels by class."""
        edges = (distance_to_boundary(labels, 1, ignore_index=-1) == 1).cpu()
        for edge, image in zip(edges, labels.cpu(), strict=True):
            classes, order = image[edge].sort(stable=True)
            found, counts = classes.unique_consecutive(return_counts=True)
            places = edge.nonzero()[order].split(counts.tolist())
            yield {k: x for k, x in zip(found.tolist(), places, strict=True) if k < self.num_classes}

    def _nothing(self) -> _Sums:
        return _Sums(torch.zeros(len(self.within), dtype=torch.int64))

    def _measured(self, distances: Tensor, pixels: int) -> _Sums:
        counts = torch.tensor([int((distances <= n).sum()) for n in self.within], dtype=torch.int64)
        histogram = torch.bincount((distances / RESOLUTION).round().long(), minlength=1)
        return _Sums(counts, pixels, len(distances), float(distances.sum()), histogram)

    def compute(self) -> BoundaryDistanceResult:
        """Displacements of all batches so far.

        What is not defined is None, never NaN: the mean and the percentile where no pixel has a counterpart, all
        of them where there is no boundary. A class without a boundary has no entry.
        """
        classes = sorted(set().union(*self._sums.values()))
        per_class: dict[str, dict[int, BoundaryDisplacement]] = {direction: {} for direction in DIRECTIONS}
        overall = {}
        for direction in DIRECTIONS:
            every = self._nothing()
            for k in classes:
                sums = self._nothing()
                for one in DIRECTIONS[:2] if direction == "both" else (direction,):
                    sums.add(self._sums[one].get(k, self._nothing()))
                per_class[direction][k] = sums.displacement(self.within)
                every.add(sums)
            overall[direction] = every.displacement(self.within)
        return BoundaryDistanceResult(per_class, overall)
