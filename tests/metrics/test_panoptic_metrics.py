"""Panoptic quality against a naive form of the benchmark's rules, published numbers and torchmetrics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.detection import panoptic_quality

from freqfusion.metrics import panoptic_counts, score_panoptic
from support import GOLDEN


def segments_of(
    ids: np.ndarray, info: list[dict[str, Any]], classes: dict[int, int]
) -> tuple[Tensor, Tensor]:
    """The map and the labels that the metric takes, from the ids and the segments_info of the COCO form."""
    segments = np.zeros(ids.shape, np.int64)
    for place, segment in enumerate(info, 1):
        segments[ids == segment["id"]] = place
    return torch.from_numpy(segments), torch.tensor([classes[segment["category_id"]] for segment in info])


def read_ids(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int64) @ [1, 256, 256**2]


def check_against_benchmark(
    scores: dict[str, Tensor], expected: dict[str, Any], classes: dict[int, int]
) -> None:
    """``expected`` as panopticapi prints it, where an absent class counts as 0."""
    for suffix, group in (("", "All"), ("_things", "Things"), ("_stuff", "Stuff")):
        for name in ("pq", "sq", "rq"):
            assert scores[name + suffix].item() == pytest.approx(expected[group][name], abs=1e-9)
    for category, k in classes.items():
        for name in ("pq", "sq", "rq"):
            value = scores[f"{name}_per_class"][k].item()
            assert value == pytest.approx(expected["per_class"][str(category)][name], abs=1e-9), (
                category,
                name,
            )


def test_published_scenes() -> None:
    folder = GOLDEN / "evaluators" / "panoptic_deeplab4"
    truth, pred = (json.loads((folder / f"coco_{name}.json").read_text()) for name in ("gt", "pred"))
    classes = {category["id"]: k for k, category in enumerate(truth["categories"])}
    total = torch.zeros(len(classes), 4, dtype=torch.float64)
    for true, guess in zip(truth["annotations"], pred["annotations"], strict=True):
        assert true["image_id"] == guess["image_id"]
        total += panoptic_counts(
            *segments_of(
                read_ids(folder / "coco_pred" / guess["file_name"]), guess["segments_info"], classes
            ),
            *segments_of(read_ids(folder / "coco_gt" / true["file_name"]), true["segments_info"], classes),
            torch.tensor([bool(segment["iscrowd"]) for segment in true["segments_info"]]),
            len(classes),
        )
    expected = json.loads((folder / "expected.json").read_text())
    things = [bool(category["isthing"]) for category in truth["categories"]]
    check_against_benchmark(score_panoptic(total, things), expected, classes)
    assert expected["All"]["n"] == 6


def naive_counts(
    pred: np.ndarray,
    pred_labels: list,
    target: np.ndarray,
    target_labels: list,
    crowd: list,
    num_classes: int,
) -> np.ndarray:
    """The benchmark's rules pair by pair, with masks."""
    counts = np.zeros((num_classes, 4))
    matched_pred, matched_target, crowds = set(), set(), {}
    void = target == 0
    for j, true_class in enumerate(target_labels, 1):
        if crowd[j - 1]:
            crowds[true_class] = target == j
            continue
        for i, pred_class in enumerate(pred_labels, 1):
            truth, guess = target == j, pred == i
            if pred_class != true_class or not (truth & guess).any():
                continue
            iou = (truth & guess).sum() / (truth | (guess & ~void)).sum()
            if iou > 0.5:
                counts[true_class, :2] += iou, 1
                matched_pred.add(i)
                matched_target.add(j)
        if j not in matched_target:
            counts[true_class, 3] += 1
    for i, pred_class in enumerate(pred_labels, 1):
        guess = pred == i
        if i in matched_pred or not guess.any():
            continue
        excused = (guess & void).sum()
        if pred_class in crowds:
            excused += (guess & crowds[pred_class]).sum()
        if excused / guess.sum() <= 0.5:
            counts[pred_class, 2] += 1
    return counts


def blocky(height: int, width: int, count: int, rng: np.random.Generator, block: int = 10) -> np.ndarray:
    coarse = rng.integers(0, count + 1, (height // block + 1, width // block + 1))
    return np.kron(coarse, np.ones((block, block), np.int64))[:height, :width]


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (31, 22), (48, 57)])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_naive_form(size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = 3
    total = np.zeros((classes, 4))
    for count in (0, 1, 4, 9):
        target = blocky(*size, count, rng)
        target_labels = rng.integers(0, classes, count)
        crowd = rng.random(count) < 0.4
        pred = np.roll(target, (1, 1), (0, 1))
        shuffled = np.array([0, *rng.permutation(count + 1) + 1])[: count + 1]
        pred = shuffled[pred]  # one of the numbers 1..count+1 has no pixel
        pred_labels = np.zeros(count + 1, np.int64)
        pred_labels[shuffled[1:] - 1] = target_labels
        wrong = rng.random(count + 1) < 0.2
        pred_labels[wrong] = rng.integers(0, classes, wrong.sum())
        pred[:: rng.integers(2, 9)] = rng.integers(0, count + 2)
        args = [pred, pred_labels, target, target_labels, crowd]
        expected = naive_counts(*args, classes)
        counts = panoptic_counts(*map(torch.from_numpy, args), classes)
        assert counts.dtype == torch.float64
        np.testing.assert_allclose(counts, expected, rtol=1e-12)
        total += expected
    if min(size) > 30:
        assert (total.sum(0)[1:] > 0).all()  # there were matches, false positives and misses


def counts(
    pred: list, pred_labels: list, target: list, target_labels: list, crowd: list | None = None
) -> list:
    """Counts of one row of pixels and 2 classes, as lists."""
    flags = torch.tensor(crowd or [False] * len(target_labels), dtype=torch.bool)
    maps = (torch.tensor([pred]), torch.tensor(pred_labels, dtype=torch.int64))
    truth = (torch.tensor([target]), torch.tensor(target_labels, dtype=torch.int64))
    return panoptic_counts(*maps, *truth, flags, 2).tolist()


NONE = [0, 0, 0, 0]


def test_void_of_the_truth_is_no_part_of_a_prediction() -> None:
    assert counts([1, 1, 1, 1], [0], [1, 1, 0, 0], [0]) == [[1, 1, 0, 0], NONE]
    # half in void is a false positive, more is not
    assert counts([1, 1, 1, 1], [1], [1, 1, 0, 0], [0]) == [[0, 0, 0, 1], [0, 0, 1, 0]]
    assert counts([1, 1, 1, 1], [1], [1, 0, 0, 0], [0]) == [[0, 0, 0, 1], NONE]


def test_void_of_the_prediction_counts_against_it() -> None:
    assert counts([1, 1, 1, 0], [0], [1, 1, 1, 1], [0]) == [[0.75, 1, 0, 0], NONE]
    assert counts([1, 1, 0, 0], [0], [1, 1, 1, 1], [0]) == [[0, 0, 1, 1], NONE]
    assert counts([0, 0, 0, 0], [], [1, 1, 1, 1], [0]) == [[0, 0, 0, 1], NONE]


def test_crowds_are_neither_found_nor_missed() -> None:
    assert counts([1, 1, 1, 1], [0], [1, 1, 1, 1], [0], [True]) == [NONE, NONE]
    assert counts([0, 0, 0, 0], [], [1, 1, 1, 1], [0], [True]) == [NONE, NONE]
    # a crowd excuses its own class alone, and only what lies in it and void by more than half
    assert counts([1, 1, 1, 1], [1], [1, 1, 1, 1], [0], [True]) == [NONE, [0, 0, 1, 0]]
    assert counts([1, 1, 1, 1], [0], [1, 1, 2, 0], [0, 1], [True, False]) == [NONE, [0, 0, 0, 1]]
    assert counts([1, 1, 1, 1], [0], [1, 1, 2, 2], [0, 1], [True, False])[0] == [0, 0, 1, 0]
    # of several crowds of a class, the last one
    assert counts([1, 1, 1, 0], [0], [1, 1, 2, 2], [0, 0], [True, True]) == [[0, 0, 1, 0], NONE]
    assert counts([1, 1, 1, 0], [0], [1, 2, 2, 2], [0, 0], [True, True]) == [NONE, NONE]


def test_segments_without_a_pixel() -> None:
    assert counts([0, 0], [0, 1], [0, 0], []) == [NONE, NONE]
    assert counts([0, 0], [], [0, 0], [0, 1, 1], [False, False, True]) == [[0, 0, 0, 1], [0, 0, 0, 1]]


def test_counts_of_void_alone_are_numbers_of_the_same_kind() -> None:
    nothing, none = torch.zeros(1, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    result = panoptic_counts(nothing, none, nothing, none, none.bool(), 2)
    assert result.dtype == torch.float64
    assert result.tolist() == [NONE, NONE]


def test_torchmetrics_example() -> None:
    """The numbers of torchmetrics' documentation; pixels are (category, instance)."""
    # fmt: off
    pred = torch.tensor([[[6, 0], [0, 0], [6, 0], [6, 0]],
                         [[0, 0], [0, 0], [6, 0], [0, 1]],
                         [[0, 0], [0, 0], [6, 0], [0, 1]],
                         [[0, 0], [7, 0], [6, 0], [1, 0]],
                         [[0, 0], [7, 0], [7, 0], [7, 0]]])
    target = torch.tensor([[[6, 0], [0, 1], [6, 0], [0, 1]],
                           [[0, 1], [0, 1], [6, 0], [0, 1]],
                           [[0, 1], [0, 1], [6, 0], [1, 0]],
                           [[0, 1], [7, 0], [1, 0], [1, 0]],
                           [[0, 1], [7, 0], [7, 0], [7, 0]]])
    # fmt: on
    args = []
    for pixels in (pred, target):
        pairs, place = pixels.flatten(0, 1).unique(dim=0, return_inverse=True)
        args += [place.view(5, 4) + 1, torch.tensor([[0, 1, 6, 7].index(c) for c in pairs[:, 0].tolist()])]
    counts = panoptic_counts(*args, torch.zeros(len(args[3]), dtype=torch.bool), 4)
    scores = score_panoptic(counts, [True, True, False, False])
    assert scores["pq"].item() == pytest.approx(0.5463, abs=5e-5)
    assert scores["sq"].item() == pytest.approx(0.6111, abs=5e-5)
    assert scores["rq"].item() == pytest.approx(0.6667, abs=5e-5)
    assert scores["pq_per_class"].tolist() == pytest.approx([0.5185, 0, 0.6667, 1], abs=5e-5)


def as_categories(segments: Tensor, labels: Tensor, void: int) -> Tensor:
    """(1, H, W, 2) of class and instance, as torchmetrics takes it."""
    return torch.stack([torch.cat([torch.tensor([void]), labels])[segments], segments], -1)[None]


def test_differs_from_torchmetrics_by_void_alone() -> None:
    target = (torch.arange(16).view(4, 4) % 7 + 1).repeat_interleave(10, 0).repeat_interleave(10, 1)
    pred = target.roll((1, 1), (0, 1))
    target_labels, pred_labels = torch.tensor([0, 1, 0, 1, 0, 1, 0]), torch.tensor([0, 1, 0, 1, 0, 0, 1])
    no_crowd = torch.zeros(7, dtype=torch.bool)

    def both(pred: Tensor) -> tuple[list[float], list[float]]:
        counts = panoptic_counts(pred, pred_labels, target, target_labels, no_crowd, 2)
        theirs = panoptic_quality(
            as_categories(pred, pred_labels, 2),
            as_categories(target, target_labels, 2),
            things={0, 1},
            stuffs=set(),
            allow_unknown_preds_category=True,
            return_per_class=True,
        )
        return score_panoptic(counts, [True, True])["pq_per_class"].tolist(), theirs[0].tolist()

    ours, theirs = both(pred)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert 0 < min(ours) < max(ours) < 1
    # of most of the picture left void by the prediction, theirs takes no notice
    ours_cut, theirs_cut = both(pred * (torch.arange(40) < 12))
    assert all(now < before / 2 for now, before in zip(ours_cut, ours, strict=True))
    assert all(now > 2 * other for now, other in zip(theirs_cut, ours_cut, strict=True))


def test_means_leave_absent_classes_out() -> None:
    table = torch.tensor([[1.5, 2, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0.8, 1, 0, 0]], dtype=torch.float64)
    scores = score_panoptic(table, [True, True, False, False])
    assert scores["pq_per_class"].tolist() == pytest.approx([0.6, float("nan"), 0, 0.8], nan_ok=True)
    assert scores["sq_per_class"].tolist() == pytest.approx([0.75, float("nan"), 0, 0.8], nan_ok=True)
    assert scores["rq_per_class"].tolist() == pytest.approx([0.8, float("nan"), 0, 1], nan_ok=True)
    assert scores["pq"].item() == pytest.approx(1.4 / 3)
    assert [scores[name].item() for name in ("pq_things", "sq_things", "rq_things")] == [0.6, 0.75, 0.8]
    assert scores["pq_stuff"].item() == pytest.approx(0.4)
    assert scores["rq_stuff"].item() == 0.5


def test_nothing_to_score_is_nan() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    counts = panoptic_counts(torch.zeros(2, 3).int(), none, torch.zeros(2, 3).int(), none, none.bool(), 1)
    scores = score_panoptic(counts, [True])
    assert all(value.isnan().all() for value in scores.values())
    assert scores["pq_stuff"].ndim == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_dtype_and_layout_do_not_matter_and_inputs_are_kept(dtype: torch.dtype) -> None:
    target = torch.from_numpy(blocky(12, 18, 4, np.random.default_rng(1)))
    labels, crowd = torch.tensor([0, 1, 1, 0]), torch.tensor([False, False, True, False])
    pred = target.roll(1, 1)
    expected = panoptic_counts(pred, labels, target, labels, crowd, 2)
    args = [pred.T.contiguous().T.to(dtype), labels.to(dtype), target.to(dtype), labels.to(dtype), crowd]
    saved = [value.clone() for value in args]
    assert torch.equal(panoptic_counts(*args, 2), expected)
    assert all(torch.equal(left, right) for left, right in zip(args, saved, strict=True))


MAP, LABELS, CROWD = torch.tensor([[0, 1, 2]]), torch.tensor([0, 1]), torch.tensor([False, True])


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((MAP.float(), LABELS, MAP, LABELS, CROWD), TypeError, "pred_segments must have an integer dtype"),
        (
            (MAP, LABELS, MAP, CROWD, CROWD),
            TypeError,
            "target_labels must have an integer dtype, got torch.bool",
        ),
        ((MAP[0], LABELS, MAP, LABELS, CROWD), ValueError, r"pred_segments .* \(H, W\), got \(3,\)"),
        ((MAP, LABELS, MAP, LABELS[None], CROWD), ValueError, r"target_labels .* \(N\), got \(1, 2\)"),
        (
            (MAP, LABELS[:1], MAP, LABELS, CROWD),
            ValueError,
            r"pred_segments holds the values \[2\].* the 1 of",
        ),
        ((MAP, LABELS, MAP - 1, LABELS, CROWD), ValueError, r"target_segments holds the values \[-1\]"),
        (
            (MAP, LABELS + 1, MAP, LABELS, CROWD),
            ValueError,
            r"pred_labels holds the labels \[2\], expected 0\.\.1",
        ),
        (
            (MAP[:, 1:], LABELS, MAP, LABELS, CROWD),
            ValueError,
            "bring the prediction to the size of the truth",
        ),
        ((MAP, LABELS, MAP, LABELS, CROWD.int()), TypeError, "target_iscrowd must be bool, got torch.int32"),
        ((MAP, LABELS, MAP, LABELS, CROWD[:1]), ValueError, "one entry for each of the 2 true segments"),
    ],
)
def test_wrong_input_is_refused(args: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        panoptic_counts(*args, 2)


def test_wrong_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"counts must have the shape \(2, 4\).* got \(3, 4\)"):
        score_panoptic(torch.zeros(3, 4), [True, False])
