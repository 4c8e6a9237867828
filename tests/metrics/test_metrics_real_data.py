"""The metrics against numbers that others computed, on data of the user's.

Set FREQFUSION_TEST_DATA to a folder with ``camvid``, ``retina_drive`` and ``evaluator_fixtures``, and run with
``-m slow``.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from freqfusion.data import read_mask
from freqfusion.metrics import BinaryMetrics, SegmentationMetrics

pytestmark = pytest.mark.slow


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("FREQFUSION_TEST_DATA")
    if not folder:
        pytest.skip("FREQFUSION_TEST_DATA is not set")
    return Path(folder)


def test_camvid_labels_rolled(data: Path) -> None:
    expected = json.loads((data / "evaluator_fixtures" / "semantic_rolled" / "expected.json").read_text())
    metric = SegmentationMetrics(11, ignore_index=11)
    paths = sorted((data / "camvid" / "val" / "labels").glob("*.png"))
    assert len(paths) == 101
    for path in paths:
        label = read_mask(path)
        metric.update(label.roll((3, 5), (0, 1))[None], label[None])
    scores = metric.compute()
    counts = torch.tensor(expected["confusion_rows_gt_cols_pred"])
    assert torch.equal(scores["confusion"], counts[:, :11])
    assert torch.equal(scores["unassigned"], counts[:, 11])
    assert scores["iou"].tolist() == pytest.approx(expected["iou"], rel=1e-12)
    assert scores["miou"].item() == pytest.approx(expected["miou"], rel=1e-12)
    assert scores["pixel_accuracy"].item() == pytest.approx(expected["pixel_accuracy"], rel=1e-12)
    assert scores["mean_accuracy"].item() == pytest.approx(expected["mean_class_accuracy"], rel=1e-12)
    assert scores["boundary_iou"] < scores["miou"]


def test_drive_second_observer(data: Path) -> None:
    expected = json.loads(
        (data / "evaluator_fixtures" / "semantic_rolled" / "drive_second_observer.json").read_text()
    )
    test = data / "retina_drive" / "test"
    metric = SegmentationMetrics(2, boundary_width=1)
    binary = BinaryMetrics()
    each = []
    for path in sorted((test / "labels").iterdir()):
        first = (read_mask(path) > 0).long()[None]
        number = path.name[:2]
        (partner,) = (test / "labels_2nd").glob(f"{number}*")
        second = (read_mask(partner) > 0).long()[None]
        single = SegmentationMetrics(2, boundary_width=1)
        single.update(second, first)
        metric.update(second, first)
        binary.update(second.float(), first)
        each.append(single.compute()["iou"][1].item())
    assert each == pytest.approx(expected["iou_per_image"], rel=1e-12)
    assert binary.compute()["dice"].item() == pytest.approx(expected["mean_dice"], rel=1e-6)
    scores, pooled = metric.compute(), expected["pooled"]
    assert scores["confusion"].tolist() == [[pooled["tn"], pooled["fp"]], [pooled["fn"], pooled["tp"]]]
    assert scores["pixel_accuracy"].item() == pytest.approx(pooled["accuracy"], rel=1e-12)
