"""The merge of instances and stuff into segments that do not overlap."""

import pytest
import torch
from torch import Tensor

from freqfusion.models.detection import merge_panoptic
from freqfusion.models.detection.panoptic import SemanticBranch


def rectangle(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_better_instances_lie_on_top() -> None:
    size = (4, 6)
    masks = torch.stack([rectangle(size, 0, 0, 4, 4), rectangle(size, 0, 3, 4, 6)])
    semantic = torch.full(size, 7)
    segments, labels, scores = merge_panoptic(
        masks, torch.tensor([2, 5]), torch.tensor([0.7, 0.9]), semantic, stuff_area=1
    )
    assert labels.tolist() == [5, 2]
    assert scores.tolist() == pytest.approx([0.9, 0.7])
    assert segments.tolist() == [[2, 2, 2, 1, 1, 1]] * 4


def test_a_mask_that_is_mostly_taken_is_dropped() -> None:
    """At exactly one half it stays, with what is left."""
    size = (2, 8)
    better = rectangle(size, 0, 0, 2, 4)
    half, more = rectangle(size, 0, 2, 2, 6), rectangle(size, 0, 1, 2, 5)
    semantic = torch.full(size, -1)
    for worse, kept in ((half, [1, 2]), (more, [1])):
        segments, labels, _ = merge_panoptic(
            torch.stack([better, worse]), torch.tensor([1, 2]), torch.tensor([0.9, 0.8]), semantic
        )
        assert labels.tolist() == kept
        assert int((segments == 2).sum()) == (4 if len(kept) == 2 else 0)


def test_stuff_fills_the_rest_unless_it_is_small() -> None:
    size = (4, 10)
    semantic = torch.full(size, 3)
    semantic[:, 8:] = 6
    semantic[0, 0] = -1
    mask = rectangle(size, 0, 2, 4, 4)[None]
    segments, labels, scores = merge_panoptic(
        mask, torch.tensor([0]), torch.tensor([0.8]), semantic, stuff_area=10
    )
    assert labels.tolist() == [0, 3]
    assert scores.tolist() == pytest.approx([0.8, 1.0])
    assert int((segments == 2).sum()) == 40 - 8 - 8 - 1
    assert int((segments == 0).sum()) == 9
    assert int(segments[0, 0]) == 0


def test_nothing_and_empty_masks() -> None:
    semantic = torch.full((3, 3), -1)
    segments, labels, scores = merge_panoptic(
        torch.zeros(2, 3, 3, dtype=torch.bool), torch.tensor([1, 1]), torch.tensor([0.9, 0.8]), semantic
    )
    assert not segments.any()
    assert len(labels) == len(scores) == 0
    segments, labels, _ = merge_panoptic(
        torch.zeros(0, 3, 3, dtype=torch.bool), torch.zeros(0).long(), torch.zeros(0), semantic
    )
    assert not segments.any()
    assert len(labels) == 0


def test_semantic_branch_meets_odd_levels() -> None:
    branch = SemanticBranch(8, 32, 5)
    sizes = [(13, 9), (7, 5), (4, 3), (2, 2)]
    features = {str(i): torch.randn(2, 8, *size) for i, size in enumerate(sizes)}
    assert branch(features).shape == (2, 5, 13, 9)
    assert [len(blocks) for blocks in branch.levels] == [1, 1, 2, 3]  # type: ignore[arg-type]
