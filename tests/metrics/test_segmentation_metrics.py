"""The segmentation metrics against hand-computed examples and an independent, naive implementation."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from freqfusion.metrics import SegmentationMetrics, boundary_band, boundary_counts, confusion_counts
from freqfusion.metrics.functional import boundary_width_in_pixels


def blocky_labels(height: int, width: int, classes: int, seed: int, block: int = 5) -> np.ndarray:
    """Random labels in regions of several pixels, so that interiors exist."""
    coarse = np.random.default_rng(seed).integers(0, classes, (height // block + 1, width // block + 1))
    return np.kron(coarse, np.ones((block, block), int))[:height, :width]


def naive_contour_band(mask: np.ndarray, width: int) -> np.ndarray:
    """A mask minus itself eroded ``width`` times by a 3x3 square, with nothing outside the image."""
    height, columns = mask.shape
    eroded = mask.copy()
    for _ in range(width):
        before = np.zeros((height + 2, columns + 2), bool)
        before[1:-1, 1:-1] = eroded
        for row in range(height):
            for column in range(columns):
                eroded[row, column] = before[row : row + 3, column : column + 3].all()
    return mask & ~eroded


def naive_scores(preds: list, targets: list, classes: int, ignore: int, width: int | float) -> dict:
    confusion = np.zeros((classes, classes), int)
    truth_pixels, both, either = np.zeros(classes), np.zeros(classes), np.zeros(classes)
    boundary_both, boundary_either = np.zeros(classes), np.zeros(classes)
    correct = total = 0
    for pred, target in zip(preds, targets, strict=True):
        kept = target != ignore
        d = width if isinstance(width, int) else max(1, round(width * math.hypot(*target.shape)))
        for k in range(classes):
            truth, guess = (target == k) & kept, (pred == k) & kept
            truth_pixels[k] += truth.sum()
            both[k] += (truth & guess).sum()
            either[k] += (truth | guess).sum()
            truth_band, guess_band = naive_contour_band(truth, d), naive_contour_band(guess, d)
            boundary_both[k] += (truth_band & guess_band).sum()
            boundary_either[k] += (truth_band | guess_band).sum()
            for other in range(classes):
                confusion[k, other] += (truth & (pred == other)).sum()
        correct += (pred == target)[kept].sum()
        total += kept.sum()
    with np.errstate(invalid="ignore"):
        iou, accuracy, boundary = both / either, both / truth_pixels, boundary_both / boundary_either
    return {
        "miou": np.nanmean(iou),
        "pixel_accuracy": correct / total,
        "mean_accuracy": np.nanmean(accuracy),
        "boundary_iou": np.nanmean(boundary),
        "iou": iou,
        "boundary_iou_per_class": boundary,
        "confusion": confusion,
    }


def tensor(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels)[None]


@pytest.mark.parametrize("width", [1, 2, 4, 0.02, 0.1])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 6), (23, 31)])
def test_equals_the_naive_form(size: tuple[int, int], width: int | float) -> None:
    classes = 4
    preds, targets = [], []
    for seed in range(3):
        target = blocky_labels(*size, classes - 1, seed)  # class 3 is never true
        pred = np.roll(target, (1, 2), (0, 1))
        pred[::4, ::3] = 3
        pred[1::5, ::4] = (-1, classes, 255)[seed]  # predictions of no class
        target[::7, 1::4] = 255
        preds.append(pred)
        targets.append(target)
    metric = SegmentationMetrics(classes, boundary_width=width)
    metric.update(
        torch.cat([tensor(pred) for pred in preds[:2]]), torch.cat([tensor(t) for t in targets[:2]])
    )
    metric.update(tensor(preds[2]), tensor(targets[2]))
    scores, expected = metric.compute(), naive_scores(preds, targets, classes, 255, width)
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name].numpy(), value, rtol=1e-12, err_msg=name)


def test_images_of_several_sizes_add_up() -> None:
    sizes = [(9, 14), (20, 11)]
    targets = [blocky_labels(*size, 3, seed) for seed, size in enumerate(sizes)]
    preds = [np.roll(target, 2, 1) for target in targets]
    metric = SegmentationMetrics(3)
    for pred, target in zip(preds, targets, strict=True):
        metric.update(tensor(pred), tensor(target))
    expected = naive_scores(preds, targets, 3, 255, 0.02)
    assert metric.compute()["boundary_iou"].item() == pytest.approx(expected["boundary_iou"], rel=1e-12)


def test_hand_computed_boundary() -> None:
    # a 4x4 square in a 8x8 image, predicted one column too far to the right; d = 1
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[:, 2:6, 2:6] = 1
    intersection, union = boundary_counts(target.roll(1, 2), target, 2, boundary_width=1)
    # each square's band has 12 pixels; they share three pixels of the top row and three of the bottom row
    assert intersection[1] == 6
    assert union[1] == 18
    # a perfect prediction shares everything: 12 pixels of the square, of the ground the image border (28)
    # and the 20 pixels around the square
    intersection, union = boundary_counts(target, target, 2, boundary_width=1)
    assert intersection.tolist() == union.tolist() == [48, 12]


def test_image_border_is_contour_and_interior_is_not() -> None:
    band = boundary_band(torch.full((2, 5, 7), 3), 2)
    assert not band[:, 2:-2, 2:-2].any()
    assert band.sum() == 2 * (35 - 3)
    assert boundary_band(torch.zeros(1, 4, 9, dtype=torch.int64), 2).all()


def test_boundary_weighs_displacement_that_miou_forgives() -> None:
    target = torch.zeros(1, 60, 60, dtype=torch.int64)
    target[:, :, 30:] = 1
    metric = SegmentationMetrics(2, boundary_width=2)
    metric.update(target.roll(2, 2), target)
    scores = metric.compute()
    assert scores["miou"] > 0.8
    assert scores["boundary_iou"] < scores["miou"] - 0.05


def test_prediction_on_ignored_pixels_does_not_count() -> None:
    target = tensor(blocky_labels(20, 24, 3, seed=5))
    pred = target.clone()
    hidden = target.clone()
    hidden[:, 5:12, 8:20] = 255
    results = []
    for value in (0, 1, 7, 255):
        pred[:, 5:12, 8:20] = value
        metric = SegmentationMetrics(3, boundary_width=2)
        metric.update(pred, hidden)
        results.append(metric.compute())
    for scores in results:
        assert scores["miou"] == 1
        assert scores["boundary_iou"] == 1
        assert scores["pixel_accuracy"] == 1


def test_prediction_outside_the_classes_is_a_miss_of_the_truth_alone() -> None:
    target = torch.tensor([[[0, 0, 0, 0, 1, 1]]])
    pred = torch.tensor([[[0, 0, 9, -4, 1, 1]]])
    metric = SegmentationMetrics(2, boundary_width=1)
    metric.update(pred, target)
    scores = metric.compute()
    assert scores["iou"].tolist() == [0.5, 1.0]
    assert scores["confusion"].tolist() == [[2, 0], [0, 2]]
    assert scores["unassigned"].tolist() == [2, 0]
    assert scores["pixel_accuracy"].item() == pytest.approx(4 / 6)


def test_absent_classes_are_nan_and_left_out() -> None:
    labels = torch.tensor([[[0, 0], [2, 2]]])
    metric = SegmentationMetrics(4, boundary_width=1)
    metric.update(labels, labels)
    scores = metric.compute()
    assert scores["iou"].isnan().tolist() == [False, True, False, True]
    assert scores["boundary_iou_per_class"].isnan().tolist() == [False, True, False, True]
    assert scores["miou"] == scores["mean_accuracy"] == scores["boundary_iou"] == 1
    # a class that is only predicted is present: its IoU is 0, but it has no accuracy
    metric.update(torch.full((1, 2, 2), 3), labels)
    scores = metric.compute()
    assert scores["iou"].tolist()[3] == 0
    assert scores["mean_accuracy"] == 0.5


def test_nothing_but_ignored_pixels_gives_nan() -> None:
    metric = SegmentationMetrics(2)
    metric.update(torch.zeros(1, 3, 3, dtype=torch.uint8), torch.full((1, 3, 3), 255, dtype=torch.uint8))
    scores = metric.compute()
    for name in ("miou", "pixel_accuracy", "mean_accuracy", "boundary_iou"):
        assert scores[name].isnan(), name


def test_ignore_index_may_be_next_to_the_classes() -> None:
    target = torch.tensor([[[0, 1, 2, 2]]])
    counts = confusion_counts(torch.tensor([[[0, 2, 0, 1]]]), target, num_classes=2, ignore_index=2)
    assert counts.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_dtype_and_layout_do_not_matter_and_inputs_are_kept() -> None:
    target = tensor(blocky_labels(12, 18, 3, seed=1))
    pred = target.roll(1, 1)
    saved = pred.clone(), target.clone()
    expected = boundary_counts(pred, target, 3, boundary_width=2)
    strided = target.transpose(1, 2).contiguous().transpose(1, 2).to(torch.uint8)
    actual = boundary_counts(pred.to(torch.int32), strided, 3, boundary_width=2)
    assert all(torch.equal(left, right) for left, right in zip(actual, expected, strict=True))
    assert torch.equal(pred, saved[0])
    assert torch.equal(target, saved[1])


def test_reset_starts_anew() -> None:
    metric = SegmentationMetrics(2, boundary_width=1)
    metric.update(torch.ones(1, 3, 3, dtype=torch.int64), torch.zeros(1, 3, 3, dtype=torch.int64))
    metric.reset()
    perfect = torch.zeros(1, 3, 3, dtype=torch.int64)
    metric.update(perfect, perfect)
    assert metric.compute()["miou"] == 1


@pytest.mark.parametrize(
    "pred, target, error, words",
    [
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).long(), TypeError, "argmax"),
        (torch.zeros(2, 2).long(), torch.zeros(2, 2).long(), ValueError, r"\(B, H, W\)"),
        (torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 2).long(), ValueError, "resize the prediction"),
        (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), 3), ValueError, r"labels \[3\], expected 0..2"),
        (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), -1), ValueError, r"labels \[-1\]"),
    ],
)
def test_wrong_input_is_refused(pred: Tensor, target: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SegmentationMetrics(3).update(pred, target)


@pytest.mark.parametrize("width", [0, -1, 0.0, 1.0, 2.5, float("nan")])
def test_wrong_boundary_width_is_refused_at_once(width: int | float) -> None:
    with pytest.raises(ValueError, match="boundary_width"):
        SegmentationMetrics(3, boundary_width=width)


def test_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        SegmentationMetrics(0)


@pytest.mark.parametrize(
    "share, size, pixels", [(0.02, (96, 96), 3), (0.02, (1, 1), 1), (0.005, (1024, 2048), 11)]
)
def test_boundary_width_is_a_share_of_the_diagonal(share: float, size: tuple[int, int], pixels: int) -> None:
    assert boundary_width_in_pixels(share, *size) == pixels


TWO_PROCESSES = """
import json, sys
import torch
import torch.distributed as dist
from freqfusion.metrics import SegmentationMetrics

def work(rank, store, out):
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (5, 9, 7), generator=generator)
    pred = torch.randint(0, 4, (5, 9, 7), generator=generator)
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    metric = SegmentationMetrics(3, boundary_width=1)
    metric.update(pred[mine], target[mine])
    scores = {name: value.tolist() for name, value in metric.compute().items()}
    whole = SegmentationMetrics(3, boundary_width=1, sync_on_compute=False)
    whole.update(pred, target)
    expected = {name: value.tolist() for name, value in whole.compute().items()}
    with open(f"{out}{rank}.json", "w") as file:
        json.dump([scores, expected], file)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, args=(sys.argv[1], sys.argv[2]), nprocs=2, start_method="fork")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, so that they start fast")
def test_two_processes_sum_their_counts(tmp_path: Path) -> None:
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, str(script), str(tmp_path / "store"), str(tmp_path / "scores")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        scores, expected = json.loads((tmp_path / f"scores{rank}.json").read_text())
        assert scores == expected
    assert sum(scores["confusion"][0]) > 0


def test_package_imports_torch_alone() -> None:
    code = (
        "import sys, freqfusion.metrics\n"
        "late = {'torchmetrics', 'torchvision'} & set(sys.modules)\n"
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_absent_torchmetrics_is_named_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    import freqfusion.metrics

    monkeypatch.delitem(vars(freqfusion.metrics), "SegmentationMetrics", raising=False)
    monkeypatch.delitem(sys.modules, "freqfusion.metrics.segmentation", raising=False)
    with pytest.raises(ImportError, match=r'pip install "freqfusion\[train\]"'):
        _ = freqfusion.metrics.SegmentationMetrics
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = freqfusion.metrics.nothing
