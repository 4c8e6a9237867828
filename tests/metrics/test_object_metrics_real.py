"""The metrics of objects against numbers that others computed, on data of the user's.

Set FREQFUSION_TEST_DATA to a folder with ``cityscapes_sample``, ``coco_mini``, ``evaluator_fixtures`` and
``nuclei_dsb2018``, and run with ``-m slow``.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from freqfusion.data import read_image, read_mask
from freqfusion.metrics import CocoMetric, panoptic_counts, score_panoptic, write_detections

pytestmark = pytest.mark.slow


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("FREQFUSION_TEST_DATA")
    if not folder:
        pytest.skip("FREQFUSION_TEST_DATA is not set")
    return Path(folder)


@pytest.mark.parametrize(
    "truth, results",
    [
        (
            "evaluator_fixtures/coco_val2014_100/instances_val2014_100.json",
            "evaluator_fixtures/coco_val2014_100/instances_val2014_fake{}100_results.json",
        ),
        (
            "coco_mini/annotations/instances_val2017.json",
            "evaluator_fixtures/coco_mini_perturbed/{}_results.json",
        ),
    ],
)
def test_coco(data: Path, tmp_path: Path, truth: str, results: str) -> None:
    metric = CocoMetric(json.loads((data / truth).read_text()), iou_types=("bbox", "segm"))
    for kind in metric.iou_types:
        detections = json.loads((data / results.format(kind)).read_bytes())
        metric.extend(detections)
        write_detections(tmp_path / f"{kind}.json", metric.results(kind))

        def keyed(entries: list[dict]) -> list[str]:
            return sorted(json.dumps(entry, sort_keys=True) for entry in entries)

        assert keyed(json.loads((tmp_path / f"{kind}.json").read_bytes())) == keyed(detections)
    scores = metric.compute()
    expected = json.loads((data / results).with_name("expected.json").read_text())["stats"]
    for kind in metric.iou_types:
        assert len(expected[kind]) == 12
        for name, value in expected[kind].items():
            assert scores[kind][name] == pytest.approx(value, abs=1e-9), (kind, name)
        for name, value in expected.get(f"{kind}_per_category_AP", {}).items():
            average = scores[kind]["AP_per_class"][metric.classes.index(name)].item()
            assert average == pytest.approx(math.nan if value is None else value, abs=1e-9, nan_ok=True), name
    assert ("coco_mini" in results) == ("bbox_per_category_AP" in expected)


def test_nuclei_against_themselves(data: Path) -> None:
    """Up to 369 nuclei in an image: found all with that many detections, not with COCO's 100."""
    root = data / "nuclei_dsb2018" / "val"
    truth = json.loads((root / "instances.json").read_text())
    most, usual = (CocoMetric(truth, iou_types=("segm",), max_detections=n) for n in (369, 100))
    for image in truth["images"]:
        instances = read_mask(root / "instances" / Path(image["file_name"]).with_suffix(".png"))
        count = int(instances.max())
        masks = instances == torch.arange(1, count + 1)[:, None, None]
        boxes, labels = torch.zeros(count, 4), torch.zeros(count, dtype=torch.int64)
        for metric in (most, usual):
            metric.update(image["id"], boxes, torch.linspace(1, 0.5, count), labels, masks)
    scores = most.compute()["segm"]
    assert scores["AP"] == scores["AR369"] == 1
    assert scores["AR1"] < scores["AR10"] < 0.5
    assert 0.8 < usual.compute()["segm"]["AR100"] < 1


def test_rolled_cityscapes(data: Path) -> None:
    sample = data / "cityscapes_sample"
    truth = json.loads((sample / "panoptic_val.json").read_text())
    classes = {category["id"]: k for k, category in enumerate(truth["categories"])}
    crowds, total = 0, torch.zeros(len(classes), 4, dtype=torch.float64)
    for annotation in truth["annotations"]:
        info = annotation["segments_info"]
        colours = read_image(sample / "panoptic_val" / annotation["file_name"]).long()
        ids = (colours * torch.tensor([1, 256, 256**2]).view(3, 1, 1)).sum(0)
        known, order = torch.tensor([0, *(segment["id"] for segment in info)]).sort()
        segments = order[torch.searchsorted(known, ids)]
        labels = torch.tensor([classes[segment["category_id"]] for segment in info])
        crowd = torch.tensor([bool(segment["iscrowd"]) for segment in info])
        crowds += int(crowd.sum())
        total += panoptic_counts(segments.roll((4, 7), (0, 1)), labels, segments, labels, crowd, len(classes))
    scores = score_panoptic(total, [bool(category["isthing"]) for category in truth["categories"]])
    expected = json.loads((data / "evaluator_fixtures" / "panoptic_rolled" / "expected.json").read_text())[
        "pq"
    ]
    assert crowds > 0
    for suffix, group in (("", "All"), ("_things", "Things"), ("_stuff", "Stuff")):
        for name in ("pq", "sq", "rq"):
            assert scores[name + suffix].item() == pytest.approx(expected[group][name], abs=1e-9)
    for category, k in classes.items():
        values = [scores[f"{name}_per_class"][k].item() for name in ("pq", "sq", "rq")]
        np.testing.assert_allclose(values, list(expected["per_class"][str(category)].values()), atol=1e-9)
