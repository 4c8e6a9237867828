"""Scores of two-class segmentation as medical imaging reports them."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from freqfusion.metrics.functional import confusion_counts

BINS = 4096


class BinaryMetrics(Metric):
    """Dice, sensitivity, specificity and the area under the ROC curve of the second of two classes.

    Dice is ``2 TP / (2 TP + FP + FN)`` of each image, and its mean over the images is the score, as observers are
    compared; an image without the class in truth and prediction is left out. The other figures are of all pixels
    together. The ROC curve has 4,096 thresholds evenly from 0 to 1, so that memory does not grow with the set. It is
    summed up as a histogram of each class, which gives what torchmetrics' ``BinaryAUROC(thresholds=4097)`` gives,
    without its pass over the pixels for every threshold.

    Args:
        ignore_index: the label of pixels without truth.

    Example:
        >>> metric = BinaryMetrics()
        >>> metric.update(torch.tensor([[[0.9, 0.2, 0.6, 0.1]]]), torch.tensor([[[1, 1, 0, 0]]]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'dice': 0.5, 'sensitivity': 0.5, 'specificity': 0.5, 'auc': 0.75}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: Tensor
    dice: Tensor
    images: Tensor
    histogram: Tensor

    def __init__(self, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.add_state("counts", torch.zeros(2, 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("dice", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(2, BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probability: Tensor, target: Tensor) -> None:
        """Add images.

        Args:
            probability: ``(B, H, W)`` of the second class, in [0, 1]; from one half on it is predicted.
            target: ``(B, H, W)``, integers: 0, 1 or ``ignore_index``.

        Raises:
            TypeError: for a truth that is not of integers.
            ValueError: for wrong shapes, a truth label that is no class, or what is no probability.
        """
        if not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError(
                "probability must be within [0, 1]; turn scores into one with sigmoid or softmax"
            )
        predicted = (probability >= 0.5).long()
        for image, truth in zip(predicted, target, strict=True):
            counts = confusion_counts(image[None], truth[None], 2, self.ignore_index)[:, :2]
            self.counts += counts
            whole = counts[1].sum() + counts[:, 1].sum()
            if whole:
                self.dice += 2 * counts[1, 1] / whole
                self.images += 1
        bins = (probability.float() * BINS).long().clamp(max=BINS - 1)
        for label in (0, 1):
            self.histogram[label] += torch.bincount(bins[target == label], minlength=BINS)

    def compute(self) -> dict[str, Tensor]:
        """``dice``, ``sensitivity``, ``specificity`` and ``auc``; NaN where there is nothing to be found."""
        rates = self.counts.diagonal() / self.counts.sum(1)
        negatives, positives = self.histogram.cpu().double()  # not every device has doubles
        below = negatives.cumsum(0) - negatives / 2  # a tie counts half
        auc = (positives * below).sum() / (positives.sum() * negatives.sum())
        return {
            "dice": self.dice / self.images,
            "sensitivity": rates[1],
            "specificity": rates[0],
            "auc": auc.float().to(self.histogram.device),
        }
