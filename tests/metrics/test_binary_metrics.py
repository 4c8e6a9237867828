"""Dice, sensitivity, specificity and the area under the ROC curve."""

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import BinaryAUROC
from torchmetrics.functional.classification import binary_auroc

from freqfusion.metrics import BinaryMetrics


def make_images(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(count, 31, 23, generator=generator) < 0.2).long()
    probability = (0.35 * target + 0.8 * torch.rand(target.shape, generator=generator)).clamp(0, 1)
    target[:, :4] = 255
    return probability, target


def test_against_plain_counting() -> None:
    probability, target = make_images()
    metric = BinaryMetrics()
    metric.update(probability[:2], target[:2])
    metric.update(probability[2:], target[2:])
    scores = metric.compute()
    known = target != 255
    dice = []
    for p, t, k in zip(probability >= 0.5, target == 1, known, strict=True):
        dice.append(2 * (p & t & k).sum() / ((p & k).sum() + (t & k).sum()))
    assert scores["dice"].item() == pytest.approx(torch.stack(dice).double().mean().item(), rel=1e-6)
    positive = (probability >= 0.5)[known]
    truth = target[known] == 1
    assert scores["sensitivity"].item() == pytest.approx(positive[truth].float().mean().item(), rel=1e-6)
    assert scores["specificity"].item() == pytest.approx(1 - positive[~truth].float().mean().item(), rel=1e-6)
    exact = binary_auroc(probability[known], truth.long())
    assert scores["auc"].item() == pytest.approx(exact.item(), abs=2e-4)
    binned = BinaryAUROC(thresholds=4097, ignore_index=255)
    assert scores["auc"].item() == pytest.approx(binned(probability, target).item(), abs=1e-6)
    metric.reset()
    metric.update(target.where(target == 1, 0).float(), target)
    assert all(value.item() == pytest.approx(1) for value in metric.compute().values())


def test_images_without_the_class() -> None:
    """Left out of Dice where nothing is predicted either, and 0 where something is."""
    metric = BinaryMetrics()
    empty = torch.zeros(1, 4, 5, dtype=torch.long)
    metric.update(torch.zeros(1, 4, 5), empty)
    assert metric.compute()["dice"].isnan()
    metric.update(torch.ones(1, 4, 5), empty)
    assert metric.compute()["dice"].item() == 0
    assert metric.compute()["sensitivity"].isnan()


def test_called_batch_by_batch() -> None:
    """torchmetrics' ``forward`` gives the batch's figures and keeps the whole."""
    probability, target = make_images()
    whole, stepwise, second = BinaryMetrics(), BinaryMetrics(), BinaryMetrics()
    whole.update(probability, target)
    stepwise(probability[:2], target[:2])
    of_batch = stepwise(probability[2:], target[2:])
    second.update(probability[2:], target[2:])
    assert of_batch == second.compute()
    torch.testing.assert_close(stepwise.compute(), whole.compute())


@pytest.mark.parametrize("label", [0, 1, 255])
def test_one_class_alone_has_no_curve(label: int) -> None:
    metric = BinaryMetrics()
    metric.update(torch.rand(1, 4, 5), torch.full((1, 4, 5), label))
    assert metric.compute()["auc"].isnan()


def test_wrong_input() -> None:
    metric = BinaryMetrics()
    for value in (1.001, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"probability must be within \[0, 1\]"):
            metric.update(torch.full((1, 2, 2), value), torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"target holds the labels \[2\]"):
        metric.update(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 2))
    with pytest.raises(TypeError, match="target must hold class indices"):
        metric.update(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
