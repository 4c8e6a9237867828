"""The readers of objects on real files of the user's.

Set FREQFUSION_TEST_DATA to a folder with ``bccd``, ``cityscapes_sample``, ``coco_mini``, ``evaluator_fixtures``,
``nuclei_dsb2018``, ``panoptic_coco_sample`` and ``voc_sample`` (their README files hold the counts), and run with
``-m slow``.
"""

import contextlib
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from freqfusion.data import ObjectDataset, create_dataset, segments_to_objects
from freqfusion.data.object_transforms import train_object_transform

pytestmark = pytest.mark.slow


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("FREQFUSION_TEST_DATA")
    if not folder:
        pytest.skip("FREQFUSION_TEST_DATA is not set")
    return Path(folder)


def count_classes(dataset: ObjectDataset) -> Counter[str]:
    """How many objects each class has, with every sample read and checked."""
    counts: Counter[str] = Counter()
    for index, sample in enumerate(dataset):
        size = tuple(sample["image"].shape[1:])
        assert dataset.size(index) == size
        assert (dataset.image_id(index), dataset.name(index)) == (sample["image_id"], sample["name"])
        if dataset.is_panoptic:
            assert sample["segments"].shape == size
            assert set(sample["segments"].unique().tolist()) - {0} == set(range(1, len(sample["labels"]) + 1))
        else:
            boxes = sample["boxes"].as_subclass(Tensor)
            assert (boxes >= 0).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes <= torch.tensor([size[1], size[0]] * 2)).all()
        counts.update(dataset.classes[label] for label in sample["labels"].tolist())
    return counts


def test_coco_mini(data: Path) -> None:
    dataset = create_dataset("coco", data / "coco_mini", "val")
    counts = count_classes(dataset)
    assert (len(dataset), len(dataset.classes), counts.total(), len(counts)) == (79, 80, 624, 78)
    assert counts.most_common(4) == [("person", 118), ("book", 45), ("bottle", 31), ("donut", 28)]
    assert sum(int(sample["iscrowd"].sum()) for sample in dataset) == 5
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(data / "coco_mini/annotations/instances_val2017.json")
    for sample in dataset:
        stored = api.loadAnns(api.getAnnIds(sample["image_id"]))
        assert [entry["category_id"] for entry in stored] == [
            dataset.categories[label].id for label in sample["labels"].tolist()
        ]
        for entry, mask in zip(stored, sample["masks"], strict=True):
            np.testing.assert_array_equal(mask, api.annToMask(entry))


@pytest.mark.parametrize(
    "split, images, expected",
    [
        ("train", 205, {"RBC": 2381, "WBC": 214, "Platelets": 209}),
        ("val", 87, {"RBC": 967, "WBC": 87, "Platelets": 83}),
    ],
)
def test_bccd_in_both_forms(
    data: Path, split: str, images: int, expected: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    coco = create_dataset("coco", data / "bccd", split)
    voc = create_dataset("voc_boxes", data / "bccd", split, classes=coco.classes)
    assert len(coco) == len(voc) == images
    assert count_classes(coco) == count_classes(voc) == expected
    assert "left out 1 box(es) of no width or height" in caplog.text  # in the XML alone
    by_name = {sample["name"]: sample for sample in voc}
    for sample in coco:
        other = by_name[sample["name"]]
        assert torch.equal(sample["boxes"], other["boxes"])
        assert torch.equal(sample["labels"], other["labels"])
    truths = [dataset.ground_truth()["annotations"] for dataset in (coco, voc)]
    assert sorted(entry["area"] for entry in truths[0]) == sorted(entry["area"] for entry in truths[1])


def test_bccd_names_its_cells(data: Path) -> None:
    with pytest.raises(ValueError, match=r"classes=\['Platelets', 'RBC', 'WBC'\]"):
        create_dataset("voc_boxes", data / "bccd", "val")


@pytest.mark.parametrize("split, images, nuclei", [("train", 413, 18627), ("val", 99, 3401)])
def test_nuclei_equal_their_instance_maps(data: Path, split: str, images: int, nuclei: int) -> None:
    dataset = create_dataset("coco", data / "nuclei_dsb2018", split)
    assert len(dataset) == images
    assert count_classes(dataset) == {"nucleus": nuclei}
    for sample in dataset:
        with Image.open(data / "nuclei_dsb2018" / split / "instances" / f"{sample['name']}.png") as stored:
            instances = torch.from_numpy(np.asarray(stored).astype(np.int32))
        numbers = torch.arange(1, len(sample["masks"]) + 1, dtype=torch.int32)
        assert torch.equal((sample["masks"].int() * numbers[:, None, None]).sum(0), instances.long())


def test_voc_sample(data: Path) -> None:
    options = {"annotations": "coco/instances.json"}
    coco = create_dataset("coco", data / "voc_sample", "train", **options)
    assert (len(coco), coco.has_masks, count_classes(coco).total()) == (3, True, 12)
    assert coco.classes[0] == "_background_"  # the file's own first category, without objects
    assert coco.name(0) == "JPEGImages/2011_000003"


def test_coco_panoptic_sample(data: Path) -> None:
    root = data / "panoptic_coco_sample"
    dataset = create_dataset("coco_panoptic", root, "val")
    assert (len(dataset), len(dataset.categories), len(dataset.things)) == (3, 133, 80)
    count_classes(dataset)
    assert [len(sample["labels"]) for sample in dataset] == [18, 32, 6]
    stored = json.loads((root / "panoptic_val.json").read_text())
    assert dataset.palette[0] == tuple(stored["categories"][0]["color"])
    for sample, annotation in zip(dataset, stored["annotations"], strict=True):
        areas = torch.bincount(sample["segments"].flatten())[1:].tolist()
        assert areas == [segment["area"] for segment in annotation["segments_info"]]
        check_boxes_and_areas(dataset, sample, annotation)


def check_boxes_and_areas(dataset: ObjectDataset, sample: dict[str, Any], annotation: dict[str, Any]) -> None:
    objects = segments_to_objects(sample["segments"], sample["labels"], sample["iscrowd"], dataset.things)
    things = {dataset.categories[label].id for label in dataset.things}
    stored = [segment for segment in annotation["segments_info"] if segment["category_id"] in things]
    boxes = torch.cat([objects["boxes"][:, :2], objects["boxes"][:, 2:] - objects["boxes"][:, :2]], dim=1)
    assert boxes.tolist() == [segment["bbox"] for segment in stored]
    assert objects["masks"].flatten(1).sum(1).tolist() == [segment["area"] for segment in stored]
    assert objects["iscrowd"].int().tolist() == [segment["iscrowd"] for segment in stored]


def test_panoptic_sample_as_detection(data: Path) -> None:
    """The things of two pictures, as the benchmark's own conversion writes them."""
    root = data / "panoptic_coco_sample"
    dataset = create_dataset("coco_panoptic", root, "val")
    converted = json.loads((root / "panoptic_as_detection.json").read_text())
    things = {dataset.categories[label].id for label in dataset.things}
    expected = [
        (
            entry["image_id"],
            entry["category_id"],
            entry["bbox"],
            entry["area"],
            entry["segmentation"]["counts"],
        )
        for entry in converted["annotations"]
        if entry["category_id"] in things
    ]
    found = [
        (
            entry["image_id"],
            entry["category_id"],
            entry["bbox"],
            entry["area"],
            entry["segmentation"]["counts"],
        )
        for entry in dataset.ground_truth()["annotations"]
        if entry["image_id"] != 39769
    ]
    assert found == expected


def test_cityscapes_from_both_forms(data: Path) -> None:
    root = data / "cityscapes_sample"
    original = create_dataset("cityscapes_panoptic", root, "train")
    converted = create_dataset("coco_panoptic", root, "train")
    assert original.classes == converted.classes
    assert original.things == converted.things
    assert count_classes(original) == count_classes(converted)
    stored = json.loads((root / "panoptic_train.json").read_text())["annotations"]
    for one, other, annotation in zip(original, converted, stored, strict=True):
        for key in ("segments", "labels", "iscrowd"):
            assert torch.equal(one[key], other[key])
        check_boxes_and_areas(original, one, annotation)


def test_cityscapes_with_crowds(data: Path, tmp_path: Path) -> None:
    """The val scenes come without pictures: grey ones stand for them."""
    root = data / "cityscapes_sample"
    for path in (root / "gtFine/val").glob("*/*_instanceIds.png"):
        picture = tmp_path / "leftImg8bit/val" / path.parent.name / path.name
        picture = picture.with_name(path.name.replace("gtFine_instanceIds", "leftImg8bit"))
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2048, 1024)).save(picture)
    (tmp_path / "gtFine").symlink_to(root / "gtFine")
    original = create_dataset("cityscapes_panoptic", tmp_path, "val")
    converted = create_dataset(
        "coco_panoptic",
        tmp_path,
        "val",
        annotations=str(root / "panoptic_val.json"),
        segments=str(root / "panoptic_val"),
    )
    assert len(original) == len(converted) == 15
    crowds = 0
    stored = json.loads((root / "panoptic_val.json").read_text())["annotations"]
    for one, other, annotation in zip(original, converted, stored, strict=True):
        assert one["image_id"] == other["image_id"]
        for key in ("segments", "labels", "iscrowd"):
            assert torch.equal(one[key], other[key])
        check_boxes_and_areas(original, one, annotation)
        crowds += int(one["iscrowd"].sum())
    assert crowds == sum(segment["iscrowd"] for entry in stored for segment in entry["segments_info"]) > 0


def test_lvis_annotations(data: Path, tmp_path: Path) -> None:
    """Pictures without pixels of their own: the file is read as any other in the format."""
    path = data / "evaluator_fixtures/lvis_val_100/lvis_val_100.json"
    stored = json.loads(path.read_text())
    for entry in stored["images"]:
        Image.new("RGB", (entry["width"], entry["height"])).save(tmp_path / entry["file_name"])
    dataset = create_dataset("coco", tmp_path, "val", annotations=str(path))
    assert (len(dataset), len(dataset.categories), count_classes(dataset).total()) == (100, 1230, 977)
    assert len(set(dataset.palette)) == 1230
    assert [entry["area"] for entry in dataset.ground_truth()["annotations"][:3]] == [
        entry["area"]
        for image in stored["images"]
        for entry in stored["annotations"]
        if entry["image_id"] == image["id"]
    ][:3]


def scores(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> list[Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        slow = COCO()
        slow.dataset = json.loads(json.dumps(truth))
        slow.createIndex()
        fast = FasterCOCO(json.loads(json.dumps(truth)))
        evaluations = [
            COCOeval(slow, slow.loadRes(json.loads(json.dumps(results))), kind),
            COCOeval_faster(fast, fast.loadRes(json.loads(json.dumps(results))), kind),
        ]
        for evaluation in evaluations:
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
    return [evaluation.stats[:12] for evaluation in evaluations]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ground_truth_gives_the_published_scores(data: Path, tmp_path: Path, kind: str) -> None:
    fixtures = data / "evaluator_fixtures"
    mini = create_dataset("coco", data / "coco_mini", "val").ground_truth()
    path = fixtures / "coco_val2014_100/instances_val2014_100.json"
    for entry in json.loads(path.read_text())["images"]:
        Image.new("RGB", (1, 1)).save(tmp_path / entry["file_name"])  # their size is only looked at when read
    published = create_dataset("coco", tmp_path, "val", annotations=str(path)).ground_truth()
    assert (len(published["images"]), len(published["annotations"])) == (100, 839)
    cases = (
        (mini, fixtures / "coco_mini_perturbed", f"{kind}_results.json"),
        (published, fixtures / "coco_val2014_100", f"instances_val2014_fake{kind}100_results.json"),
    )
    for truth, folder, results in cases:
        expected = list(json.loads((folder / "expected.json").read_text())["stats"][kind].values())
        for stats in scores(truth, json.loads((folder / results).read_text()), kind):
            np.testing.assert_allclose(stats, expected, atol=1e-9)


def test_augmented_masks_and_boxes_agree(data: Path) -> None:
    """After resizing, cropping and flipping, boxes still surround their masks to about a pixel."""
    dataset = create_dataset("coco", data / "coco_mini", "val")
    transform = train_object_transform(
        short_sides=(800,), max_size=1333, flip=0.5, jitter=(0.5, 1.5), crop_size=(512, 512), photometric=True
    )
    torch.manual_seed(0)
    differences = []
    for sample in dataset:
        before = sample["boxes"].as_subclass(Tensor)
        if not len(before) or sample["iscrowd"].any():
            continue
        result = transform(sample)
        for box, mask in zip(result["boxes"], result["masks"], strict=True):
            if mask.sum() < 200:
                continue
            rle = mask_utils.encode(np.asfortranarray(mask.numpy()))
            left, top, width, height = mask_utils.toBbox(rle)
            drawn = torch.tensor([left, top, left + width, top + height], dtype=torch.float32)
            differences.append((drawn - box).abs().max())
    assert len(differences) > 200
    assert torch.stack(differences).median() < 1.5
