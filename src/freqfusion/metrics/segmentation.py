"""Segmentation scores over a whole set, summed over batches and processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from freqfusion.metrics.functional import (
    boundary_counts,
    boundary_width_in_pixels,
    confusion_counts,
    score_counts,
)


class SegmentationMetrics(Metric):
    """Mean IoU, accuracies and boundary IoU from counts over the whole set.

    Intersections, unions and the confusion matrix are summed over all images (and processes) before any ratio
    is taken, so batch size and order do not change a score. The formulas stand in
    :func:`~freqfusion.metrics.functional.score_counts` and
    :func:`~freqfusion.metrics.functional.boundary_counts`; boundary IoU is that of Cheng et al., CVPR 2021,
    per class over the whole set.

    Args:
        num_classes: K.
        ignore_index: the label of pixels without truth.
        boundary_width: width of the boundary band: an int in pixels, a float as a share of each image's
            diagonal (0.02 in the paper), at least 1 pixel.

    Raises:
        ValueError: for fewer than 1 class or a wrong width.

    Example:
        >>> metric = SegmentationMetrics(num_classes=3, boundary_width=1)
        >>> target = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 255]]])
        >>> pred = torch.tensor([[[0, 1, 1, 1], [0, 0, 1, 0]]])
        >>> metric.update(pred, target)
        >>> scores = metric.compute()
        >>> round(scores["miou"].item(), 4), round(scores["pixel_accuracy"].item(), 4)
        (0.75, 0.8571)
        >>> scores["iou"].tolist()
        [0.75, 0.75, nan]
        >>> scores["confusion"].tolist()
        [[3, 1, 0], [0, 3, 0], [0, 0, 0]]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    confusion: Tensor
    boundary_intersection: Tensor
    boundary_union: Tensor

    def __init__(
        self, num_classes: int, ignore_index: int = 255, boundary_width: int | float = 0.02, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        boundary_width_in_pixels(boundary_width, 1, 1)  # refuses a wrong width now, not after an epoch
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.boundary_width = boundary_width
        for name, shape in (
            ("confusion", (num_classes, num_classes + 1)),
            ("boundary_intersection", (num_classes,)),
            ("boundary_union", (num_classes,)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add the counts of a batch.

        Args:
            pred: ``(B, H, W)``, integers; a value outside ``0..K-1`` is a miss.
            target: ``(B, H, W)``, integers in ``0..K-1`` or ``ignore_index``.

        Raises:
            TypeError: for floating-point maps.
            ValueError: for wrong shapes or a truth label that is no class.
        """
        self.confusion += confusion_counts(pred, target, self.num_classes, self.ignore_index)
        intersection, union = boundary_counts(
            pred, target, self.num_classes, self.ignore_index, self.boundary_width
        )
        self.boundary_intersection += intersection
        self.boundary_union += union

    def compute(self) -> dict[str, Tensor]:
        """Scores of all batches so far; see :func:`~freqfusion.metrics.functional.score_counts`."""
        return score_counts(self.confusion, self.boundary_intersection, self.boundary_union)
