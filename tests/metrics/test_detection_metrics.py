"""Average precision against pycocotools, hand-computed numbers, and what must be refused."""

import contextlib
import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from freqfusion.metrics import CocoMetric

CATEGORY_IDS = [7, 90, 3, 12]  # not sorted; 12 never occurs


def ellipse(box: np.ndarray, height: int, width: int) -> np.ndarray:
    x, y, w, h = box
    rows, columns = np.mgrid[:height, :width] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def scenes(seed: int, images: int = 6) -> tuple[dict[str, Any], dict[int, dict[str, torch.Tensor]]]:
    """A ground truth with objects of all sizes and crowds, and detections of most and of some more."""
    rng = np.random.default_rng(seed)
    truth: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k, "name": f"class {k}"} for k in CATEGORY_IDS],
    }
    detections = {}
    classes = sorted(CATEGORY_IDS)
    for number in range(images):
        height, width = rng.integers(90, 200, 2).tolist()
        image_id = 1000 - 17 * number
        truth["images"].append({"id": image_id, "height": height, "width": width})
        boxes, labels, scores, masks = [], [], [], []
        for _ in range(0 if number == 2 else rng.integers(1, 40)):
            size = rng.choice([6, 20, 45, 110]) * rng.uniform(0.7, 1.3, 2)
            w, h = np.minimum(size, [width - 2, height - 2])
            box = np.array([rng.uniform(0, width - w), rng.uniform(0, height - h), w, h])
            mask = ellipse(box, height, width)
            category, crowd = int(rng.choice([3, 7, 90])), bool(rng.random() < 0.15)
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            kind = "crowd" if crowd else rng.choice(["rle", "polygon"])
            angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
            corners = box[:2] + box[2:] / 2 * (1 + np.stack([np.cos(angles), np.sin(angles)], 1))
            columns = mask.flatten("F")
            runs = np.diff(np.flatnonzero(np.diff(columns, prepend=False, append=~columns[-1:])), prepend=0)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "iscrowd": int(crowd),
                    "area": float(mask.sum()),
                    "bbox": box.tolist(),
                    "segmentation": {
                        "crowd": {"size": [height, width], "counts": runs.tolist()},
                        "rle": {"size": [height, width], "counts": rle["counts"].decode()},
                        "polygon": [corners.flatten().tolist()],
                    }[kind],
                }
            )
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                moved = box + rng.normal(0, 0.06, 4) * np.array([w, h, w, h])
                boxes.append(moved)
                masks.append(ellipse(moved, height, width))
                labels.append(classes.index(category if rng.random() < 0.9 else int(rng.choice(classes))))
                scores.append(round(rng.random(), 1))  # many are equal
        corners = torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32)
        corners[:, 2:] += corners[:, :2]
        detections[image_id] = {
            "boxes": corners,
            "scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.tensor(np.array(masks, dtype=bool).reshape(-1, height, width)),
        }
    return truth, detections


def by_pycocotools(truth: dict, results: list, kind: str, limit: int) -> dict[str, Any]:
    """The same numbers, from COCO's own evaluator and with its -1 as NaN."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), kind)
        evaluator.params.maxDets = [1, 10, limit]
        evaluator.evaluate()
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(values.mean()) if values.size else float("nan")

    expected: dict[str, Any] = {
        "AP": mean(precision[:, :, :, 0, 2]),
        "AP50": mean(precision[0, :, :, 0, 2]),
        "AP75": mean(precision[5, :, :, 0, 2]),
    }
    for area, letter in enumerate("sml", 1):
        expected[f"AP{letter}"] = mean(precision[:, :, :, area, 2])
        expected[f"AR{letter}"] = mean(recall[:, :, area, 2])
    for place, count in enumerate((1, 10, limit)):
        expected[f"AR{count}"] = mean(recall[:, :, 0, place])
    classes = range(precision.shape[2])
    expected["AP_per_class"] = [mean(precision[:, :, k, 0, 2]) for k in classes]
    expected["AP50_per_class"] = [mean(precision[0, :, k, 0, 2]) for k in classes]
    recalls = range(101)
    expected["precision50"] = [mean(precision[0, r, :, 0, 2]) for r in recalls]
    expected["precision75"] = [mean(precision[5, r, :, 0, 2]) for r in recalls]
    expected["precision"] = [mean(precision[:, r, :, 0, 2]) for r in recalls]
    return expected


def check_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("limit", [100, 12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_pycocotools(seed: int, limit: int, capfd: pytest.CaptureFixture[str]) -> None:
    truth, detections = scenes(seed)
    saved = copy.deepcopy(truth)
    metric = CocoMetric(truth, iou_types=("bbox", "segm"), max_detections=limit)
    assert metric.classes == ("class 3", "class 7", "class 12", "class 90")
    for image_id, found in detections.items():
        metric.update(image_id, **found)
    scores = metric.compute()
    assert capfd.readouterr() == ("", "")
    assert scores.keys() == {"bbox", "segm"}
    for kind in ("bbox", "segm"):
        check_equal(scores[kind], by_pycocotools(truth, metric.results(kind), kind, limit))
        assert 0.05 < scores[kind]["AP"] < 0.95
        assert scores[kind]["AP_per_class"].isnan().tolist() == [False, False, True, False]
        for curve, area in (("precision50", "AP50"), ("precision75", "AP75"), ("precision", "AP")):
            assert scores[kind][curve].mean().item() == pytest.approx(scores[kind][area], rel=1e-12)
    assert truth == saved
    check_equal(metric.compute()["segm"], scores["segm"])


def test_many_objects_need_more_detections() -> None:
    """150 objects of one class in an image, all found: 100 detections recall two thirds of them."""
    grid = [[12 * (n % 15), 12 * (n // 15), 9, 9] for n in range(150)]
    annotations = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 81, "iscrowd": 0}
        for n, box in enumerate(grid)
    ]
    truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "cell"}], "annotations": annotations}
    boxes = torch.tensor(grid, dtype=torch.float64)
    boxes[:, 2:] += boxes[:, :2]
    results = {}
    for limit in (1, 5, 10, 100, 369):
        metric = CocoMetric(truth, max_detections=limit)
        metric.update(1, boxes, torch.linspace(1, 0, 150), torch.zeros(150, dtype=torch.int64))
        results[limit] = metric.compute()["bbox"]
        assert results[limit][f"AR{limit}"] == pytest.approx(min(limit, 150) / 150)
        recalls = [name for name in results[limit] if name.startswith("AR")]
        assert recalls[:-3] == [f"AR{n}" for n in sorted({1, min(10, limit), limit})]
        assert recalls[-3:] == ["ARs", "ARm", "ARl"]
    assert results[369]["AP"] == 1
    assert results[100]["AP"] == pytest.approx(67 / 101)


def one_object(**annotation: Any) -> dict[str, Any]:
    box = {"id": 1, "image_id": 5, "category_id": 2, "bbox": [10, 10, 20, 40], "area": 800, "iscrowd": 0}
    square = {
        "size": [60, 70],
        "counts": coco_mask.encode(np.ones((60, 70), "uint8", order="F"))["counts"].decode(),
    }
    return {
        "images": [{"id": 5, "height": 60, "width": 70}, {"id": 6, "height": 1, "width": 1}],
        "categories": [{"id": 2, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [box | {"segmentation": square} | annotation],
    }


def boxes(*corners: list[float]) -> torch.Tensor:
    return torch.tensor(corners).reshape(-1, 4)


def test_precision_by_hand() -> None:
    """Of two cats one is found by the second of three detections (one is doubled, one false), a dog by none."""
    truth = one_object()
    truth["annotations"].append({**truth["annotations"][0], "id": 2, "bbox": [40, 10, 20, 40]})
    truth["annotations"].append({**truth["annotations"][0], "id": 3, "category_id": 4})
    metric = CocoMetric(truth)
    found = boxes([0, 0, 5, 5], [10, 10, 30, 50], [10, 10, 30, 50])
    metric.update(5, found, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64))
    scores = metric.compute()["bbox"]
    # precision 1/2 up to the recall 1/2, nothing beyond: 51 of 101 recalls
    assert scores["AP_per_class"].tolist() == pytest.approx([0.5 * 51 / 101, 0])
    assert scores["AP"] == scores["AP50"] == pytest.approx(0.25 * 51 / 101)
    assert scores["precision50"].tolist() == pytest.approx([0.25] * 51 + [0] * 50)
    assert scores["AR1"] == 0
    assert scores["AR10"] == scores["AR100"] == pytest.approx(0.25)


def test_torchmetrics_example() -> None:
    box = {
        "id": 1,
        "image_id": 1,
        "category_id": 0,
        "iscrowd": 0,
        "bbox": [214, 41, 348, 244],
        "area": 348 * 244,
    }
    truth = {"images": [{"id": 1}], "categories": [{"id": 0, "name": "a"}], "annotations": [box]}
    metric = CocoMetric(truth)
    metric.update(1, boxes([258.0, 41.0, 606.0, 285.0]), torch.tensor([0.536]), torch.tensor([0]))
    scores = metric.compute()["bbox"]
    assert scores["AP"] == scores["APl"] == scores["AR1"] == pytest.approx(0.6)
    assert scores["AP50"] == scores["AP75"] == 1


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("told", [True, False])
def test_no_detections_give_zeros(kind: str, told: bool) -> None:
    metric = CocoMetric(one_object(), iou_types=(kind,))
    if told:
        metric.update(5, boxes(), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert metric.results(kind) == []
    scores = metric.compute()[kind]
    for name in ("AP", "AP50", "AP75", "APs", "AR1", "AR10", "AR100", "ARs"):
        assert scores[name] == 0, name
    for name in ("APm", "APl", "ARm", "ARl"):
        assert np.isnan(scores[name]), name
    np.testing.assert_array_equal(scores["AP_per_class"], [0, np.nan])
    assert scores["precision50"].tolist() == [0.0] * 101


def test_nothing_to_find_is_nan() -> None:
    for truth in (one_object(iscrowd=1), one_object() | {"annotations": []}):
        metric = CocoMetric(truth)
        metric.update(6, boxes([0, 0, 1, 1]), torch.tensor([0.4]), torch.tensor([1]))
        scores = metric.compute()["bbox"]
        assert all(torch.as_tensor(value).isnan().all() for value in scores.values())


def test_results_are_in_the_form_of_the_servers() -> None:
    metric = CocoMetric(one_object(), iou_types=("segm", "bbox"))
    mask = torch.zeros(1, 60, 70, dtype=torch.uint8)
    mask[0, 10:50, 10:30] = 255
    metric.update(5, boxes([10, 10.5, 30, 50]), torch.tensor([0.25]), torch.tensor([0]), mask)
    common = {"image_id": 5, "category_id": 2, "score": 0.25}
    assert metric.results("bbox") == [common | {"bbox": [10, 10.5, 20, 39.5]}]
    (found,) = metric.results("segm")
    assert json.loads(json.dumps(found)) == found
    assert {key: found[key] for key in common} == common
    assert found.keys() - common.keys() == {"segmentation"}
    np.testing.assert_array_equal(coco_mask.decode(found["segmentation"]), mask[0].numpy() > 0)


def test_extend_equals_update() -> None:
    truth, detections = scenes(4)
    whole, part, rest = (CocoMetric(truth, iou_types=("bbox", "segm")) for _ in range(3))
    for number, (image_id, found) in enumerate(detections.items()):
        whole.update(image_id, **found)
        (part if number % 2 else rest).update(image_id, **found)
    both = [
        box | {"segmentation": mask["segmentation"], "unused": 1}
        for box, mask in zip(rest.results("bbox"), rest.results("segm"), strict=True)
    ]
    part.extend(json.loads(json.dumps(both)))
    expected = whole.compute()
    for kind in ("bbox", "segm"):
        check_equal(part.compute()[kind], expected[kind])
        assert part.results(kind) != whole.results(kind)  # in another order
    from_lists = CocoMetric(truth, iou_types=("bbox", "segm"))
    for kind in ("bbox", "segm"):
        from_lists.extend(whole.results(kind))
        check_equal(from_lists.compute()[kind], expected[kind])


def test_reset_starts_anew() -> None:
    metric = CocoMetric(one_object())
    metric.update(5, boxes([0, 0, 1, 1]), torch.tensor([0.4]), torch.tensor([1]))
    metric.reset()
    metric.update(5, boxes([10, 10, 30, 50]), torch.tensor([0.4]), torch.tensor([0]))
    assert metric.compute()["bbox"]["AP"] == 1


def test_an_image_is_given_once() -> None:
    metric = CocoMetric(one_object(), iou_types=("bbox", "segm"))
    nothing = (boxes(), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    metric.update(torch.tensor(5), *nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"image 5 has its bbox detections already.*reset\(\)"):
        metric.update(5, *nothing)
    with pytest.raises(ValueError, match="image 5 has its bbox detections already"):
        metric.extend([{"image_id": 5, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 1}])
    with pytest.raises(ValueError, match="the image 7 is not in the ground truth, which has 2 images"):
        metric.update(7, *nothing)


LABEL = torch.tensor([0])
SCORE = torch.tensor([0.5])
BOX = boxes([1, 2, 3, 4])
MASK = torch.ones(1, 60, 70, dtype=torch.bool)


@pytest.mark.parametrize(
    "found, error, words",
    [
        ((torch.zeros(4), SCORE, LABEL, MASK), ValueError, r"boxes must have the shape \(4, 4\), got \(4,\)"),
        ((BOX, torch.zeros(2), LABEL, MASK), ValueError, r"scores must have the shape \(1,\), got \(2,\)"),
        ((BOX, SCORE, LABEL[:, None], MASK), ValueError, r"labels must have the shape \(1,\), got \(1, 1\)"),
        ((BOX, SCORE, LABEL.float(), MASK), TypeError, "labels must have an integer dtype"),
        ((BOX * torch.nan, SCORE, LABEL, MASK), ValueError, "must be finite, those of image 5 are not"),
        ((BOX, SCORE / 0, LABEL, MASK), ValueError, "must be finite"),
        (
            (BOX.flip(1), SCORE, LABEL, MASK),
            ValueError,
            r"x1 <= x2 .* got \[4.0, 3.0, 2.0, 1.0\] .*box_convert",
        ),
        ((BOX, SCORE, LABEL + 2, MASK), ValueError, r"labels must be 0\.\.1, .* got 2 to 2"),
        ((BOX, SCORE, LABEL - 1, MASK), ValueError, "got -1 to -1"),
        ((BOX, SCORE, LABEL, None), ValueError, "masks are needed"),
        ((BOX, SCORE, LABEL, MASK.float()), TypeError, "masks must be bool or uint8, got torch.float32"),
        ((BOX, SCORE, LABEL, MASK[:, :-1]), ValueError, r"shape \(1, 60, 70\), got \(1, 59, 70\)"),
        ((BOX, SCORE, LABEL, MASK[0]), ValueError, r"shape \(1, 60, 70\), got \(60, 70\)"),
    ],
)
def test_wrong_detections_are_refused(found: Any, error: type[Exception], words: str) -> None:
    metric = CocoMetric(one_object(), iou_types=("bbox", "segm"))
    with pytest.raises(error, match=words):
        metric.update(5, *found)
    assert metric.results("bbox") == metric.results("segm") == []
    metric.update(5, BOX, SCORE, LABEL, MASK)


RESULT = {"image_id": 5, "category_id": 2, "score": 0.5}
SMALL_RLE = {"size": [5, 7], "counts": ";230009"}


@pytest.mark.parametrize(
    "entry, words",
    [
        (RESULT, "entry 1 has neither bbox nor segmentation"),
        (RESULT | {"bbox": [1, 2, 3]}, "entry 1: bbox must be"),
        (RESULT | {"segmentation": SMALL_RLE}, r"5 x 7 pixels .* but its image of 60 x 70"),
        (RESULT | {"image_id": 9, "bbox": [1, 2, 3, 4]}, "the image 9 is not in the ground truth"),
        (
            RESULT | {"category_id": 3, "bbox": [1, 2, 3, 4]},
            "entry 1: the category 3 is not in the ground truth",
        ),
    ],
)
def test_wrong_results_are_refused_and_nothing_is_added(entry: dict, words: str) -> None:
    metric = CocoMetric(one_object(), iou_types=("bbox", "segm"))
    with pytest.raises(ValueError, match=words):
        metric.extend([RESULT | {"bbox": [1, 2, 3, 4]}, entry])
    assert metric.results("bbox") == []


def test_results_of_another_kind_are_refused() -> None:
    metric = CocoMetric(one_object())
    with pytest.raises(ValueError, match=r"entry 0 must have bbox for iou_types \('bbox',\)"):
        metric.extend([RESULT | {"segmentation": SMALL_RLE}])
    with pytest.raises(ValueError, match=r"must be one of \('bbox',\), got 'segm'"):
        metric.results("segm")


@pytest.mark.parametrize(
    "truth, words",
    [
        ({"images": []}, "a list of annotations, got NoneType"),
        (one_object() | {"categories": {}}, "a list of categories, got dict"),
        (one_object() | {"images": [], "annotations": []}, "at least one image and one category"),
        (one_object() | {"images": [{"id": "5"}]}, "images: entry 0 .* got '5'"),
        (
            one_object() | {"categories": [{"id": 2}, {"id": 2}]},
            "categories: entry 1 .* of its own as id, got 2",
        ),
        (
            one_object() | {"annotations": [3]},
            "annotations: entry 0 of the ground truth must be a dict, got 3",
        ),
        (one_object(image_id=7), r"entry 0 of the ground truth \(id 1\): there is no such image_id: 7"),
        (one_object(category_id=[2]), r"there is no such category_id: \[2\]"),
        (one_object(area=None), "needs its area in pixels, got None"),
        (one_object(area=-1), "needs its area in pixels, got -1"),
        (one_object(iscrowd="yes"), "iscrowd must be 0 or 1, got 'yes'"),
        (one_object(bbox=[1, 2, 3]), r"bbox must be \[x, y, width, height\]"),
        (
            one_object() | {"images": [{"id": 5, "width": 3}]},
            "image 5 of the ground truth needs height and width",
        ),
        (one_object(segmentation=[]), "has no mask.*for boxes alone"),
        (one_object(segmentation=None), "has no mask"),
        (one_object(segmentation=[[1, 2, 3, 4]]), "has no mask"),
        (one_object(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "has no mask"),
        (one_object(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "has no mask"),
        (one_object(segmentation={"size": [60, 70], "counts": [4199]}), "RLE is damaged .* 60 x 70"),
        (one_object(segmentation={"size": [70, 60], "counts": [4200]}), "RLE is damaged"),
        (one_object(segmentation=SMALL_RLE), "5 x 7 pixels"),
    ],
)
def test_wrong_ground_truth_is_refused(truth: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CocoMetric(truth, iou_types=("bbox", "segm"))


def test_boxes_alone_need_neither_masks_nor_sizes() -> None:
    truth = one_object(segmentation=[])
    truth["images"] = [{"id": 5}]
    del truth["annotations"][0]["iscrowd"]
    metric = CocoMetric(truth)
    metric.update(5, boxes([10, 10, 30, 50]), SCORE, LABEL)
    assert metric.compute()["bbox"]["AP"] == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"iou_types": ()}, "iou_types must be"),
        ({"iou_types": ("box",)}, r"iou_types must be .* got \('box',\)"),
        ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CocoMetric(one_object(), **options)


def test_absent_evaluator_is_named_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = CocoMetric(one_object())
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(
        ImportError, match=r'faster_coco_eval is not installed.*pip install "freqfusion\[train\]"'
    ):
        metric.compute()


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from freqfusion.metrics import CocoMetric
from test_detection_metrics import check_equal, scenes

def work(rank, store):
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    truth, detections = scenes(5)
    metric, whole = CocoMetric(truth, iou_types=("bbox", "segm")), CocoMetric(truth, iou_types=("bbox", "segm"))
    for number, (image_id, found) in enumerate(detections.items()):
        whole.update(image_id, **found)
        if number % 2 == rank:
            metric.update(image_id, **found)
    shared = [None, None]
    dist.all_gather_object(shared, {kind: metric.results(kind) for kind in metric.iou_types})
    for kind, results in shared[1 - rank].items():
        assert results
        metric.extend(results)
    for kind, scores in metric.compute().items():
        check_equal(scores, whole.compute()[kind])
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, so that they start fast")
def test_two_processes_exchange_their_results(tmp_path: Path) -> None:
    script = tmp_path / "two_processes.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{TWO_PROCESSES}")
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
