"""COCO's annotations: layouts, samples, ground truth, and what is said of every kind of malformed file."""

import copy
import json
import logging
from collections.abc import Callable
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
from torchvision import tv_tensors

from freqfusion.data import BadSampleError, CocoInstances, CocoPanoptic

HEIGHT, WIDTH = 12, 20


def write_picture(path: Path, seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def rectangle(left: int, top: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.T.flatten()
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *edges, flat.size]).tolist()}


def annotations() -> dict[str, Any]:
    """Three pictures: with a polygon and a crowd, with nothing, and with a compressed RLE."""
    return {
        "images": [
            {"id": 30, "file_name": "c.png", "height": HEIGHT, "width": WIDTH, "license": 1},
            {"id": 10, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
            {"id": 20, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {
                "id": 0,
                "image_id": 30,
                "category_id": 90,
                "bbox": [2, 3, 5.5, 4],
                "area": 21.5,
                "iscrowd": 0,
                "segmentation": [[2, 3, 7.5, 3, 7.5, 7, 2, 7], [10, 1, 13, 1, 13, 4, 10, 4]],
            },
            {
                "id": 7,
                "image_id": 30,
                "category_id": 3,
                "bbox": [-2, -1, 6, 5],
                "area": 16,
                "iscrowd": 1,
                "segmentation": uncompressed(rectangle(0, 0, 4, 4)),
            },
            {
                "id": 5,
                "image_id": 20,
                "category_id": 3,
                "bbox": [15, 2, 5, 10],
                "area": 50,
                "iscrowd": 0,
                "segmentation": compressed(rectangle(15, 2, 5, 10)),
            },
        ],
        "categories": [
            {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
            {"id": 3, "name": "car", "color": [1, 2, 3]},
            {"id": 40, "name": "sky", "isthing": 0, "color": "#ff0000"},
        ],
    }


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def make_coco(root: Path, content: dict[str, Any] | None = None, split: str = "train") -> Path:
    for seed, name in enumerate("abc"):
        write_picture(root / f"{split}2017" / f"{name}.png", seed)
    write_json(root / "annotations" / f"instances_{split}2017.json", content or annotations())
    return root


def test_samples(tmp_path: Path) -> None:
    dataset = CocoInstances(make_coco(tmp_path), "train")
    assert len(dataset) == 3
    assert dataset.classes == ("car", "sky", "toothbrush")
    assert [category.id for category in dataset.categories] == [3, 40, 90]
    assert dataset.things == (0, 2)
    assert dataset.palette[0] == (1, 2, 3)
    assert len(set(dataset.palette)) == 3
    assert (dataset.has_masks, dataset.is_panoptic) == (True, False)
    assert [dataset.image_id(index) for index in range(3)] == [30, 10, 20]
    assert [dataset.name(index) for index in range(3)] == ["c", "a", "b"]
    assert dataset.size(1) == (HEIGHT, WIDTH)

    sample = dataset[0]
    assert set(sample) == {"image", "name", "image_id", "boxes", "labels", "iscrowd", "masks"}
    assert isinstance(sample["image"], tv_tensors.Image)
    assert sample["image"].dtype == torch.uint8
    with Image.open(tmp_path / "train2017/c.png") as stored:
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), np.asarray(stored))
    assert (sample["name"], sample["image_id"]) == ("c", 30)
    assert isinstance(sample["boxes"], tv_tensors.BoundingBoxes)
    assert sample["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert sample["boxes"].dtype == torch.float32
    assert sample["boxes"].tolist() == [[2, 3, 7.5, 7], [0, 0, 4, 4]]  # the second one clipped
    assert sample["labels"].dtype == torch.int64
    assert sample["labels"].tolist() == [2, 0]
    assert sample["iscrowd"].tolist() == [False, True]
    assert isinstance(sample["masks"], tv_tensors.Mask)
    assert sample["masks"].dtype == torch.uint8
    np.testing.assert_array_equal(sample["masks"][1], rectangle(0, 0, 4, 4))
    both = sample["masks"][0]
    assert both.max() == 1
    assert both[3:7, 2:7].all()  # the first polygon
    assert both[1:4, 10:13].all()  # the second, of the same object

    np.testing.assert_array_equal(dataset[2]["masks"][0], rectangle(15, 2, 5, 10))
    assert torch.equal(dataset[-1]["image"], dataset[2]["image"])
    with pytest.raises(IndexError, match="sample 3 of 3"):
        dataset[3]
    assert len(list(dataset)) == 3


def test_a_picture_without_objects_is_kept(tmp_path: Path) -> None:
    sample = CocoInstances(make_coco(tmp_path), "train")[1]
    assert sample["boxes"].shape == (0, 4)
    assert sample["masks"].shape == (0, HEIGHT, WIDTH)
    assert sample["labels"].shape == sample["iscrowd"].shape == (0,)
    assert sample["labels"].dtype == torch.int64
    assert sample["iscrowd"].dtype == torch.bool


def test_skip_empty_goes_by_objects_that_are_no_crowd(tmp_path: Path) -> None:
    content = annotations()
    content["annotations"][0]["iscrowd"] = 1  # now picture c has crowds alone
    root = make_coco(tmp_path, content)
    (root / "train2017/a.png").unlink()  # empty and absent: not looked for
    dataset = CocoInstances(root, "train", skip_empty=True)
    assert [dataset.name(index) for index in range(len(dataset))] == ["b"]
    assert [image["id"] for image in dataset.ground_truth()["images"]] == [20]
    content["annotations"] = []
    with pytest.raises(BadSampleError, match="none of its 3 pictures has an object that is no crowd"):
        CocoInstances(make_coco(tmp_path, content), "train", skip_empty=True)


def test_masks_are_read_where_there_are_segmentations_or_as_asked(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    boxes = CocoInstances(root, "train", with_masks=False)
    assert not boxes.has_masks
    assert "masks" not in boxes[0]
    assert "segmentation" not in boxes.ground_truth()["annotations"][0]
    content = annotations()
    for entry in content["annotations"]:
        entry["segmentation"] = []
    root = make_coco(tmp_path, content)
    assert not CocoInstances(root, "train").has_masks
    with pytest.raises(
        BadSampleError, match=r"\(id 0, image_id 30\) has no segmentation.*set with_masks to false"
    ):
        CocoInstances(root, "train", with_masks=True)
    content["annotations"] = []
    assert CocoInstances(make_coco(tmp_path, content), "train", with_masks=True)[0]["masks"].shape[0] == 0


def test_ids_may_be_text(tmp_path: Path) -> None:
    content = annotations()
    for entry in content["images"]:
        entry["id"] = f"image-{entry['id']}"
    for entry in content["annotations"]:
        entry["image_id"], entry["id"] = f"image-{entry['image_id']}", str(entry["id"])
    dataset = CocoInstances(make_coco(tmp_path, content), "train")
    assert dataset[0]["image_id"] == dataset.image_id(0) == "image-30"
    assert len(dataset[0]["labels"]) == 2


def test_optional_keys(tmp_path: Path) -> None:
    content = annotations()
    for entry in content["annotations"]:
        del entry["area"], entry["iscrowd"]
    root = make_coco(tmp_path, content)
    dataset = CocoInstances(root, "train")
    assert not dataset[0]["iscrowd"].any()
    areas = [entry["area"] for entry in dataset.ground_truth()["annotations"]]
    assert areas[1:] == [16, 50]  # of the masks
    assert areas[0] == dataset[0]["masks"][0].sum()
    boxes = CocoInstances(root, "train", with_masks=False)
    assert [entry["area"] for entry in boxes.ground_truth()["annotations"]] == [22, 30, 50]


def test_many_categories_get_distinct_colours(tmp_path: Path) -> None:
    content = annotations()
    content["categories"] = [{"id": 3 * number, "name": str(number)} for number in range(1, 1231)]
    assert len(set(CocoInstances(make_coco(tmp_path, content), "train").palette)) == 1230


# layouts


@pytest.mark.parametrize(
    "file",
    [
        "annotations/instances_val2017.json",
        "annotations/instances_val.json",
        "instances_val.json",
        "val/instances.json",
        "val/_annotations.coco.json",
    ],
)
def test_the_annotations_are_found(tmp_path: Path, file: str) -> None:
    write_json(tmp_path / file, annotations())
    for name in "abc":
        write_picture(tmp_path / "val" / f"{name}.png")
    assert len(CocoInstances(tmp_path, "val")) == 3


@pytest.mark.parametrize(
    "folder",
    [
        "val2017",
        "images/val2017",
        "val/images",
        "val",
        "images/val",
        "images",
        "JPEGImages",
        ".",
    ],
)
def test_the_pictures_are_found(tmp_path: Path, folder: str) -> None:
    write_json(tmp_path / "instances_val.json", annotations())
    for name in "abc":
        write_picture(tmp_path / folder / f"{name}.png")
    for other in ("val2017", "images", "JPEGImages"):  # folders without the pictures
        (tmp_path / other).mkdir(exist_ok=True)
    assert [sample["name"] for sample in CocoInstances(tmp_path, "val")] == ["c", "a", "b"]


def test_file_names_may_carry_folders(tmp_path: Path) -> None:
    content = annotations()
    for entry in content["images"]:
        entry["file_name"] = f"deep/er/{entry['file_name']}"
        write_picture(tmp_path / entry["file_name"])
    write_json(tmp_path / "instances_val.json", content)
    dataset = CocoInstances(tmp_path, "val")
    assert dataset[0]["name"] == dataset.name(0) == "deep/er/c"
    assert dataset.ground_truth()["images"][0]["file_name"] == "deep/er/c.png"


def test_options_name_the_files(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "elsewhere", split="valid")
    options = {"annotations": "annotations/instances_{split}2017.json", "images": "{split}2017"}
    assert len(CocoInstances(root, "valid", **options)) == 3
    options = {
        "annotations": str(root / "annotations/instances_valid2017.json"),
        "images": str(root / "{split}2017"),
    }
    assert len(CocoInstances(tmp_path, "valid", **options)) == 3
    with pytest.raises(
        FileNotFoundError, match=r"no annotation file: there is no .*none\.json\. COCO expects"
    ):
        CocoInstances(root, "valid", annotations="none.json")
    with pytest.raises(
        FileNotFoundError, match=r"no annotation file: there is no .*annotations\. COCO expects"
    ):
        CocoInstances(root, "valid", annotations="annotations")
    with pytest.raises(FileNotFoundError, match=r"no folder of pictures: there is no .*none\. COCO expects"):
        CocoInstances(root, "valid", images="none")


def test_files_that_are_not_found_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no .*instances_val2017\.json and no .*_annotations\.coco\.json\. COCO"
    ):
        CocoInstances(tmp_path, "val")
    write_json(tmp_path / "instances_val.json", annotations())
    with pytest.raises(
        FileNotFoundError, match=r"no pictures: c\.png and the other .*val2017.*option images"
    ):
        CocoInstances(tmp_path, "val")
    write_json(tmp_path / "instances_val.json", {**annotations(), "images": [], "annotations": []})
    with pytest.raises(FileNotFoundError, match="no sample of the split 'val' in it"):
        CocoInstances(tmp_path, "val")


# ground truth


def detections(dataset: CocoInstances | CocoPanoptic) -> list[dict[str, Any]]:
    """Each true object found, moved by a pixel."""
    return [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": [entry["bbox"][0] + 1, *entry["bbox"][1:]],
            "segmentation": compressed(np.roll(sample_mask(entry), 1, axis=1)),
            "score": 0.9 - 0.1 * number,
        }
        for number, entry in enumerate(dataset.ground_truth()["annotations"])
        if not entry["iscrowd"]
    ]


def sample_mask(entry: dict[str, Any]) -> np.ndarray:
    segmentation = entry["segmentation"]
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, HEIGHT, WIDTH))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_utils.frPyObjects(segmentation, HEIGHT, WIDTH)
    return mask_utils.decode(segmentation)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ground_truth_is_taken_by_both_evaluators(tmp_path: Path, kind: str) -> None:
    dataset = CocoInstances(make_coco(tmp_path), "train")
    truth = dataset.ground_truth()
    original = annotations()
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2, 3]  # an id 0 would never be matched
    for entry, stored in zip(truth["annotations"], original["annotations"], strict=True):
        assert {**entry, "id": stored["id"]} == stored
    assert [entry["id"] for entry in truth["images"]] == [30, 10, 20]
    assert truth["images"][0] == {"id": 30, "file_name": "c.png", "height": HEIGHT, "width": WIDTH}
    assert truth["categories"][2] == {"id": 90, "name": "toothbrush"}

    slow = COCO()
    slow.dataset = copy.deepcopy(truth)
    slow.createIndex()
    fast = FasterCOCO(copy.deepcopy(truth))
    stats = []
    for api, evaluator in ((slow, COCOeval), (fast, COCOeval_faster)):
        evaluation = evaluator(api, api.loadRes(detections(dataset)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats.append(evaluation.stats[:12])
    np.testing.assert_allclose(stats[0], stats[1], atol=1e-12)
    assert stats[0][1] == pytest.approx(1.0)  # AP at an IoU of 0.5


# malformed annotations


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A function that sets (or, for ``...``, deletes) an entry such as ``annotations.0.bbox``."""

    def apply(content: dict[str, Any]) -> None:
        *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
        place: Any = content
        for part in way:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return apply


FIRST = r"instances_val2017\.json: annotations\[0\] \(id 0, image_id 30\) "
BAD_ANNOTATIONS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no object": (change("annotations.0", 5), r"json: annotations\[0\] is 5, expected an object"),
    "no image id": (change("annotations.0.image_id", ...), r"\[0\] \(id 0\) has the image_id None"),
    "list as image id": (change("annotations.0.image_id", [1]), r"has the image_id \[1\], expected"),
    "unknown image": (
        change("annotations.0.image_id", 11),
        r"\(id 0, image_id 11\) belongs to no image of the file",
    ),
    "image id as text": (change("annotations.0.image_id", "30"), r"image_id '30'\) belongs to no image"),
    "no category": (
        change("annotations.0.category_id", ...),
        FIRST + r"has the category_id None, which is none",
    ),
    "unknown category": (
        change("annotations.0.category_id", 4),
        FIRST + r"has the category_id 4, which is none",
    ),
    "no bbox": (
        change("annotations.0.bbox", ...),
        FIRST + r"has the bbox None, expected four finite numbers",
    ),
    "three numbers": (
        change("annotations.0.bbox", [1, 2, 3]),
        FIRST + r"has the bbox \[1, 2, 3\], expected four",
    ),
    "text in bbox": (change("annotations.0.bbox", [1, 2, "3", 4]), FIRST + r"has the bbox .*expected four"),
    "NaN": (
        change("annotations.0.bbox", [1, 2, float("nan"), 4]),
        FIRST + r"has the bbox .*nan.*four finite",
    ),
    "infinity": (
        change("annotations.0.bbox", [1, 2, float("inf"), 4]),
        FIRST + r"has the bbox .*four finite",
    ),
    "huge number": (change("annotations.0.bbox", [10**400, 2, 3, 4]), FIRST + r"has the bbox .*four finite"),
    "negative width": (change("annotations.0.bbox", [5, 2, -3, 4]), FIRST + r"has the bbox .* is negative"),
    "negative height": (change("annotations.0.bbox", [5, 2, 3, -4]), FIRST + r"has the bbox .* is negative"),
    "right of it": (
        change("annotations.0.bbox", [20, 2, 3, 4]),
        FIRST + r".*outside its image of 20x12 pixels",
    ),
    "left of it": (change("annotations.0.bbox", [-3, 2, 3, 4]), FIRST + r".*outside its image"),
    "above it": (change("annotations.0.bbox", [3, -9, 3, 4]), FIRST + r".*outside its image"),
    "below it": (change("annotations.0.bbox", [3, 12, 3, 4]), FIRST + r".*outside its image"),
    "area": (change("annotations.0.area", "big"), FIRST + r"has the area 'big', expected"),
    "endless area": (change("annotations.0.area", 10**400), FIRST + r"has the area 1000.*, expected"),
    "negative area": (change("annotations.0.area", -1), FIRST + r"has the area -1, expected"),
    "iscrowd": (change("annotations.0.iscrowd", 2), FIRST + r"has iscrowd 2, expected 0 or 1"),
    "no segmentation": (
        change("annotations.0.segmentation", ...),
        FIRST + r"has no segmentation, though others",
    ),
    "segmentation": (
        change("annotations.0.segmentation", "x"),
        FIRST + r"has the segmentation 'x', expected poly",
    ),
    "two points": (
        change("annotations.0.segmentation.1", [1, 2, 3, 4]),
        FIRST + r"has a polygon of 4 numbers",
    ),
    "odd polygon": (
        change("annotations.0.segmentation.0", [1, 2, 3, 4, 5, 6, 7]),
        FIRST + r".*polygon of 7 numbers",
    ),
    "flat polygon": (
        change("annotations.0.segmentation", [1, 2, 3, 4, 5, 6]),
        FIRST
        + r"has the segmentation \[1, 2, 3, 4, 5, 6\], a polygon .* put it into a list of its own: \[\[x, y",
    ),
    "text in polygon": (
        change("annotations.0.segmentation.0", [1, "2", 3, 4, 5, 6]),
        FIRST + r"has the polygon \[",
    ),
    "huge polygon": (change("annotations.0.segmentation.0.3", 10**400), FIRST + r"has the polygon \["),
    "polygon of NaN": (
        change("annotations.0.segmentation.0.3", float("nan")),
        FIRST + r"has a polygon .*not finite",
    ),
    "distant polygon": (
        change("annotations.0.segmentation.0.3", 1e7),
        FIRST + r"has a polygon .*reaches far out",
    ),
    "RLE size": (
        change("annotations.0.segmentation", {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}),
        FIRST + r"has an RLE of size \[20, 12\], but its image is \[12, 20\] \(height, width\)",
    ),
    "RLE without size": (
        change("annotations.0.segmentation", {"counts": [240]}),
        FIRST + r"has an RLE of size None",
    ),
    "RLE without counts": (
        change("annotations.0.segmentation", {"size": [HEIGHT, WIDTH]}),
        FIRST + r"has an RLE whose counts are neither",
    ),
    "RLE too long": (
        change("annotations.0.segmentation", {"size": [HEIGHT, WIDTH], "counts": [100, 141]}),
        FIRST + r"has an RLE whose runs do not cover the 240 pixels",
    ),
    "negative run": (
        change("annotations.0.segmentation", {"size": [HEIGHT, WIDTH], "counts": [250, -10]}),
        FIRST + r"has an RLE whose runs do not cover",
    ),
    "text cut off": (
        change(
            "annotations.0.segmentation",
            {"size": [HEIGHT, WIDTH], "counts": compressed(rectangle(1, 1, 9, 9))["counts"][:-1]},
        ),
        FIRST + r"has an RLE whose runs do not cover",
    ),
    "text that asks for more": (
        change("annotations.0.segmentation", {"size": [HEIGHT, WIDTH], "counts": "ooooooooo"}),
        FIRST + r"has an RLE whose runs do not cover",
    ),
    "other characters": (
        change("annotations.0.segmentation", {"size": [HEIGHT, WIDTH], "counts": "`7\u00e9"}),
        FIRST + r"has an RLE whose runs do not cover",
    ),
    "empty text": (
        change("annotations.0.segmentation", {"size": [HEIGHT, WIDTH], "counts": ""}),
        FIRST + r"has an RLE whose runs do not cover",
    ),
}


@pytest.mark.parametrize("damage", BAD_ANNOTATIONS)
def test_a_malformed_annotation_is_named(tmp_path: Path, damage: str) -> None:
    apply, words = BAD_ANNOTATIONS[damage]
    content = annotations()
    apply(content)
    with pytest.raises(BadSampleError, match=words + r".*Correct it, or leave it out with skip_bad"):
        CocoInstances(make_coco(tmp_path, content, "val"), "val")


@pytest.mark.parametrize("damage", BAD_ANNOTATIONS)
def test_skip_bad_leaves_out_the_annotation_alone(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = annotations()
    BAD_ANNOTATIONS[damage][0](content)
    dataset = CocoInstances(make_coco(tmp_path, content, "val"), "val", skip_bad=True)
    assert [sample["name"] for sample in dataset] == ["c", "a", "b"]
    assert [len(sample["labels"]) for sample in dataset] == [1, 0, 1]
    assert [entry["image_id"] for entry in dataset.ground_truth()["annotations"]] == [30, 20]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("left out: ")


BAD_IMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no object": (change("images.1", "a.png"), r"images\[1\] is 'a\.png', expected an object"),
    "no id": (change("images.1.id", ...), r"images\[1\] has the id None, expected a whole number or text"),
    "id twice": (change("images.1.id", 30), r"images\[1\] \(id 30\) has an id that an image before it has"),
    "no file": (
        change("images.1.file_name", ...),
        r"images\[1\] \(id 10\) has the file_name None, expected the name",
    ),
    "empty file": (change("images.1.file_name", "/"), r"\(id 10\) has the file_name '/', expected the name"),
    "file elsewhere": (
        change("images.1.file_name", "../a.png"),
        r"'\.\./a\.png', expected a path below the folder",
    ),
    "absolute file": (
        change("images.1.file_name", "/etc/a.png"),
        r"'/etc/a\.png', expected a path below the folder",
    ),
    "long file": (
        change("images.1.file_name", "a" * 300),
        r"\(id 10\) has the file_name 'aaa.*longer than a file's name can be",
    ),
    "no height": (
        change("images.1.height", ...),
        r"\(id 10\) has height None and width 20, expected whole numbers of pix",
    ),
    "no width": (change("images.1.width", 0), r"\(id 10\) has height 12 and width 0, expected"),
}


@pytest.mark.parametrize("damage", BAD_IMAGES)
def test_a_malformed_image_is_named_and_can_be_left_out(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    apply, words = BAD_IMAGES[damage]
    content = annotations()
    apply(content)
    root = make_coco(tmp_path, content)
    with pytest.raises(BadSampleError, match=words):
        CocoInstances(root, "train")
    dataset = CocoInstances(root, "train", skip_bad=True)
    assert [dataset.name(index) for index in range(len(dataset))] == ["c", "b"]
    assert len(caplog.messages) == 1


def test_annotations_of_an_image_left_out_go_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = annotations()
    content["images"][0]["height"] = None
    dataset = CocoInstances(make_coco(tmp_path, content), "train", skip_bad=True)
    assert [len(sample["labels"]) for sample in dataset] == [0, 1]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cannot be read as JSON"),
        (b'{"images": [', "cannot be read as JSON.*truncated"),
        (b"[" * 200_000, "cannot be read as JSON"),
        (b"\xff\xfe\xfa", "cannot be read as JSON"),
        (b"[]", "holds no object, expected an object with the lists images, annotations, categories"),
        (b'{"images": [], "annotations": {}}', r"holds an object with \['annotations', 'images'\], expected"),
        (b'{"images": [], "annotations": [], "categories": []}', "lists no category"),
    ],
)
def test_a_file_of_another_kind_is_refused_even_with_skip_bad(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "instances_val.json"
    path.write_bytes(content)
    for skip_bad in (False, True):
        with pytest.raises(BadSampleError, match=rf"instances_val\.json: {words}"):
            CocoInstances(tmp_path, "val", skip_bad=skip_bad)


@pytest.mark.parametrize(
    "apply, words",
    [
        (change("categories.1", []), r"categories\[1\] is \[\], expected an object"),
        (change("categories.1.id", "3"), r"categories\[1\] \(id '3'\) must have an id \(a whole number\)"),
        (change("categories.1.name", ...), r"categories\[1\] \(id 3\) must have .* a name"),
        (change("categories.1.id", 90), r"categories\[1\] \(id 90\) has an id that a category before it has"),
        (
            change("categories.1.isthing", "yes"),
            r"categories\[1\] \(id 3\) has isthing 'yes', expected 0 or 1",
        ),
    ],
)
def test_malformed_categories_are_refused_even_with_skip_bad(
    tmp_path: Path, apply: Callable[[dict[str, Any]], None], words: str
) -> None:
    content = annotations()
    apply(content)
    for skip_bad in (False, True):
        with pytest.raises(BadSampleError, match=words):
            CocoInstances(make_coco(tmp_path, content), "train", skip_bad=skip_bad)


def test_nothing_left_is_an_error_that_points_to_the_warnings(tmp_path: Path) -> None:
    content = annotations()
    for entry in content["images"]:
        entry["height"] = 0
    root = make_coco(tmp_path, content)
    with pytest.raises(
        BadSampleError, match=r"train2017\.json: none of its 3 images can be used; see the warnings"
    ):
        CocoInstances(root, "train", skip_bad=True)
    bad = panoptic_annotations()
    bad["annotations"][0]["segments_info"] = None
    with pytest.raises(
        BadSampleError, match=r"train2017\.json: none of its 1 images can be used; see the warnings"
    ):
        CocoPanoptic(make_panoptic(tmp_path, bad), "train", skip_bad=True)


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    path = root / "annotations/instances_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(CocoInstances(root, "train")) == 3


def test_boxes_of_no_size_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = annotations()
    for number, side in enumerate(([0, 5], [5, 0], [0, 0], [1e-5, 3])):
        content["annotations"].append(
            {**content["annotations"][0], "id": 100 + number, "bbox": [19.99999, 4, *side]}
        )
    dataset = CocoInstances(make_coco(tmp_path, content), "train")
    assert [len(sample["labels"]) for sample in dataset] == [2, 0, 1]
    assert len(dataset.ground_truth()["annotations"]) == 3
    assert len(caplog.messages) == 1
    assert (
        "instances_train2017.json: left out 4 box(es) of no width or height, the first in the annotation 100"
        in (caplog.text)
    )


def test_boxes_keep_a_size_in_single_precision(tmp_path: Path) -> None:
    content = annotations()
    content["annotations"][0]["bbox"] = [19.985, 11.985, 3, 0.0101]
    left, top, right, bottom = CocoInstances(make_coco(tmp_path, content), "train")[0]["boxes"][0].tolist()
    assert left < right <= WIDTH
    assert top < bottom <= HEIGHT


NO_MASK: list[Any] = [
    *([], [[]], [[], []], [None], [[None]], None, {}, "", "null", "[]", ...),
    *({"size": [HEIGHT, WIDTH], "counts": []}, {"size": None, "counts": None}),
]


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("segmentation", NO_MASK)
def test_every_way_to_say_that_there_is_no_mask(
    tmp_path: Path, segmentation: Any, skip_bad: bool, caplog: pytest.LogCaptureFixture
) -> None:
    content = annotations()
    for number in range(3):
        change(f"annotations.{number}.segmentation", segmentation)(content)
    dataset = CocoInstances(make_coco(tmp_path, content), "train", skip_bad=skip_bad)
    assert not dataset.has_masks
    assert [len(sample["boxes"]) for sample in dataset] == [2, 0, 1]
    assert not caplog.messages


def test_empty_parts_of_a_mask_are_no_harm(tmp_path: Path) -> None:
    content = annotations()
    root = make_coco(tmp_path, content)
    expected = CocoInstances(root, "train")[0]["masks"]
    content["annotations"][0]["segmentation"].insert(1, [])
    make_coco(tmp_path, content)
    assert torch.equal(CocoInstances(root, "train")[0]["masks"], expected)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_ids_of_annotations_do_not_matter(tmp_path: Path, skip_bad: bool) -> None:
    content = annotations()
    for entry, number in zip(content["annotations"], (7, 7, ...), strict=True):
        entry["id"] = number
    del content["annotations"][2]["id"]
    dataset = CocoInstances(make_coco(tmp_path, content), "train", skip_bad=skip_bad)
    assert [len(sample["boxes"]) for sample in dataset] == [2, 0, 1]
    assert [entry["id"] for entry in dataset.ground_truth()["annotations"]] == [1, 2, 3]


@pytest.mark.parametrize(
    "segmentation",
    [
        [[2, 3, 9, 3, 5, 3]],  # on a line
        [[2, 2, 9, 9, 5, 5, 7, 7]],  # on a slanting line
        [[2, 3, 2, 3, 2, 3]],
        [[2.1, 3.1, 2.2, 3.1, 2.2, 3.2]],  # within a pixel
        [[30, 3, 40, 3, 40, 9, 30, 9]],  # outside the picture
        {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": compressed(rectangle(0, 0, 0, 0))["counts"]},
    ],
)
def test_objects_whose_mask_has_no_pixel_are_left_out_with_one_warning(
    tmp_path: Path, segmentation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    content = annotations()
    for number in (100, 101):
        content["annotations"].append(
            {**content["annotations"][0], "id": number, "segmentation": segmentation}
        )
    root = make_coco(tmp_path, content)
    dataset = CocoInstances(root, "train")
    assert all(sample["masks"].flatten(1).any(1).all() for sample in dataset)
    assert len(dataset[0]["masks"]) == 2
    assert len(caplog.messages) == 1
    assert "left out 2 object(s) whose mask has no pixel, the first in the annotation 100" in caplog.text
    assert len(CocoInstances(root, "train", with_masks=False)[0]["boxes"]) == 4


def test_boxes_in_shares_of_the_sides_are_refused(tmp_path: Path) -> None:
    content = annotations()
    for entry in content["annotations"]:
        entry["bbox"] = [0.1, 0.2, 0.5, 0.75]
    for skip_bad in (False, True):
        with pytest.raises(
            BadSampleError, match=r"train2017\.json: all of its boxes lie .* from 0 to 1.* shares .*pixels"
        ):
            CocoInstances(make_coco(tmp_path, content), "train", skip_bad=skip_bad)
    content["annotations"][1]["bbox"] = [0.1, 0.2, 3, 0.75]
    assert len(CocoInstances(make_coco(tmp_path, content), "train")[0]["boxes"]) == 2
    for entry in content["annotations"]:
        entry["bbox"] = [0, 0, 1, 1]
    assert len(CocoInstances(make_coco(tmp_path, content), "train")[0]["boxes"]) == 2


def test_sizes_may_be_whole_floats(tmp_path: Path) -> None:
    content = annotations()
    content["images"][0] |= {"height": float(HEIGHT), "width": float(WIDTH)}
    dataset = CocoInstances(make_coco(tmp_path, content), "train")
    assert dataset.size(0) == (HEIGHT, WIDTH)
    assert all(type(side) is int for side in dataset.size(0))
    for wrong in (12.5, float("inf"), float("nan"), True):
        content["images"][0]["height"] = wrong
        with pytest.raises(
            BadSampleError, match=rf"has height {wrong} and width 20\.0, expected whole numbers"
        ):
            CocoInstances(make_coco(tmp_path, content), "train")


# pictures


def remove(root: Path) -> None:
    (root / "a.png").unlink()


def truncate(root: Path) -> None:
    path = root / "a.png"
    path.write_bytes(path.read_bytes()[:60])


def shrink(root: Path) -> None:
    write_picture(root / "a.png", height=11)


def turn(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_picture(root / "a.png", height=11)
    with Image.open(root / "a.png") as picture:
        picture.load()
        picture.save(root / "a.png", exif=exif)


DAMAGES = {
    remove: r"a\.png: missing, the file of the sample a\. Restore it.*--skip-bad",
    truncate: r"a\.png: cannot be read as a picture.*replace it",
    shrink: r"a\.png: is 20x11 pixels .*annotations are for 20x12.*Restore the picture.*--skip-bad",
    turn: r"a\.png: is 11x20 pixels \(width x height, upright by its EXIF orientation\), but its annotations are for "
    r"20x12\. Restore",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_picture_is_named_with_the_mend(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    root = make_coco(tmp_path)
    damage(root / "train2017")
    with pytest.raises(BadSampleError, match=DAMAGES[damage]):
        list(CocoInstances(root, "train"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_skip_bad_leaves_a_bad_picture_out_of_scored_splits(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_coco(tmp_path, split="val")
    damage(root / "val2017")
    dataset = CocoInstances(root, "val", skip_bad=True)
    assert [sample["name"] for sample in dataset] == ["c", "b"]
    assert [image["id"] for image in dataset.ground_truth()["images"]] == [30, 20]
    assert caplog.text.count("left out the sample a: ") == len(caplog.messages) == 1


@pytest.mark.parametrize("damage", [truncate, shrink, turn])
def test_skip_bad_replaces_in_training_and_says_so_once(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_coco(tmp_path)
    damage(root / "train2017")
    dataset = CocoInstances(root, "train", skip_bad=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [sample["image_id"] for sample in dataset] == [30, 20, 20]
    assert len(caplog.messages) == 1


def test_skip_bad_with_nothing_good_fails(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    for name in "abc":
        write_picture(root / f"train2017/{name}.png", height=3)
    with pytest.raises(BadSampleError, match="none of the 3 samples can be read"):
        CocoInstances(root, "train", skip_bad=True)[1]
    for name in "ab":
        (root / f"train2017/{name}.png").unlink()
    dataset = CocoInstances(root, "train", skip_bad=True)
    assert len(dataset) == 1
    make_coco(tmp_path, split="val")
    for name in "abc":
        write_picture(root / f"val2017/{name}.png", height=3)
    with pytest.raises(BadSampleError, match="none of the 3 samples of the split 'val' can be used"):
        CocoInstances(root, "val", skip_bad=True)


# panoptic

SEGMENTS = np.full((HEIGHT, WIDTH), 70000)
SEGMENTS[:4] = 5
SEGMENTS[6:9, 3:8] = 256
SEGMENTS[6:9, 12:15] = 2**24 - 1
SEGMENTS[10] = 0


def panoptic_annotations() -> dict[str, Any]:
    """One picture with sky, two things, one of them a crowd, stuff of a large id, and void."""
    return {
        "images": [{"id": 30, "file_name": "c.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {
                "image_id": 30,
                "file_name": "c.png",
                "segments_info": [
                    {"id": 256, "category_id": 90, "iscrowd": 0, "area": 15, "bbox": [3, 6, 5, 3]},
                    {"id": 5, "category_id": 4},
                    {"id": 2**24 - 1, "category_id": 90, "iscrowd": 1},
                    {"id": 70000, "category_id": 2, "iscrowd": 0},
                ],
            }
        ],
        "categories": [
            {"id": 90, "name": "car", "isthing": 1, "color": [0, 0, 142]},
            {"id": 2, "name": "road", "isthing": 0},
            {"id": 4, "name": "sky", "isthing": 0},
        ],
    }


def write_segments(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(path)


def make_panoptic(
    root: Path, content: dict[str, Any] | None = None, split: str = "train", ids: np.ndarray = SEGMENTS
) -> Path:
    write_picture(root / f"{split}2017/c.jpg")
    write_segments(root / f"annotations/panoptic_{split}2017/c.png", ids)
    write_json(root / f"annotations/panoptic_{split}2017.json", content or panoptic_annotations())
    return root


def test_panoptic_sample(tmp_path: Path) -> None:
    dataset = CocoPanoptic(make_panoptic(tmp_path), "train")
    assert dataset.classes == ("road", "sky", "car")
    assert dataset.things == (2,)
    assert dataset.palette[2] == (0, 0, 142)
    assert (dataset.has_masks, dataset.is_panoptic) == (False, True)
    assert (dataset.size(0), dataset.image_id(0), dataset.name(0)) == ((HEIGHT, WIDTH), 30, "c")
    sample = dataset[0]
    assert set(sample) == {"image", "name", "image_id", "segments", "labels", "iscrowd"}
    assert isinstance(sample["segments"], tv_tensors.Mask)
    assert sample["segments"].dtype == torch.int32
    expected = np.select(
        [SEGMENTS == 256, SEGMENTS == 5, SEGMENTS == 2**24 - 1, SEGMENTS == 70000], [1, 2, 3, 4]
    )
    np.testing.assert_array_equal(sample["segments"], expected)
    assert sample["labels"].dtype == torch.int64
    assert sample["labels"].tolist() == [2, 1, 2, 0]
    assert sample["iscrowd"].tolist() == [False, False, True, False]


def test_panoptic_ground_truth_holds_the_things(tmp_path: Path) -> None:
    truth = CocoPanoptic(make_panoptic(tmp_path), "train").ground_truth()
    assert truth["images"] == [{"id": 30, "file_name": "c.jpg", "height": HEIGHT, "width": WIDTH}]
    assert truth["categories"] == [{"id": 90, "name": "car"}]
    car, crowd = truth["annotations"]
    assert {key: car[key] for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")} == {
        "id": 1,
        "image_id": 30,
        "category_id": 90,
        "bbox": [3, 6, 5, 3],
        "area": 15,
        "iscrowd": 0,
    }
    assert (crowd["bbox"], crowd["area"], crowd["iscrowd"]) == ([12, 6, 3, 3], 9, 1)
    np.testing.assert_array_equal(mask_utils.decode(crowd["segmentation"]), SEGMENTS == 2**24 - 1)
    assert json.loads(json.dumps(truth)) == truth
    fast = FasterCOCO(truth)
    evaluation = COCOeval_faster(
        fast, fast.loadRes([{**car, "score": 0.5}]), "segm", print_function=lambda *_: None
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


@pytest.mark.parametrize("below", ["annotations", "."])
@pytest.mark.parametrize("form", ["panoptic_val", "panoptic_val2017"])
def test_panoptic_files_are_found(tmp_path: Path, below: str, form: str) -> None:
    write_picture(tmp_path / "val/c.jpg")
    json_folder = tmp_path / ("annotations" if form.endswith("2017") else below)
    write_json(json_folder / f"{form}.json", panoptic_annotations())
    write_segments(tmp_path / below / form / "c.png", SEGMENTS)
    assert len(CocoPanoptic(tmp_path, "val")[0]["labels"]) == 4


@pytest.mark.parametrize("infix", ["", "_gtFine"])
def test_panoptic_cityscapes_as_its_conversion_writes_it(tmp_path: Path, infix: str) -> None:
    content = panoptic_annotations()
    content["images"][0] |= {"id": "ulm_0_1", "file_name": f"ulm_0_1{infix}_leftImg8bit.png"}
    content["annotations"][0] |= {"image_id": "ulm_0_1", "file_name": "ulm_0_1_gtFine_panoptic.png"}
    write_json(tmp_path / "gtFine/cityscapes_panoptic_val.json", content)
    write_segments(tmp_path / "gtFine/cityscapes_panoptic_val/ulm_0_1_gtFine_panoptic.png", SEGMENTS)
    write_picture(tmp_path / "leftImg8bit/val/ulm/ulm_0_1_leftImg8bit.png")
    dataset = CocoPanoptic(tmp_path, "val")
    assert dataset[0]["image_id"] == "ulm_0_1"
    assert dataset[0]["segments"].max() == 4


def test_panoptic_options_name_the_files(tmp_path: Path) -> None:
    make_panoptic(tmp_path, split="mine")
    (tmp_path / "annotations/panoptic_mine2017").rename(tmp_path / "maps_mine")
    with pytest.raises(
        FileNotFoundError, match=r"no folder of label maps: there is no .*panoptic_mine2017 and no"
    ):
        CocoPanoptic(tmp_path, "mine")
    (tmp_path / "mine2017").rename(tmp_path / "pictures_mine")
    options = {"segments": "maps_{split}", "images": "pictures_{split}"}
    assert len(CocoPanoptic(tmp_path, "mine", **options)[0]["labels"]) == 4
    (tmp_path / "annotations/panoptic_mine2017.json").rename(tmp_path / "other.json")
    assert len(CocoPanoptic(tmp_path, "mine", annotations="other.json", **options)[0]["labels"]) == 4


PLACE = r"panoptic_val2017\.json: annotations\[0\] \(image_id 30\) "
BAD_PANOPTIC: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no image id": (change("annotations.0.image_id", ...), r"annotations\[0\] has the image_id None"),
    "unknown image": (
        change("annotations.0.image_id", 31),
        r"\(image_id 31\) belongs to no image of the file",
    ),
    "no file": (change("annotations.0.file_name", ...), PLACE + r"has the file_name None"),
    "file elsewhere": (
        change("annotations.0.file_name", "../c.png"),
        PLACE + r"has the file_name '\.\./c\.png'",
    ),
    "no segments": (
        change("annotations.0.segments_info", ...),
        PLACE + r"has the segments_info None, expected a li",
    ),
    "no object": (
        change("annotations.0.segments_info.1", 5),
        PLACE + r"has the segment 5, expected an object",
    ),
    "no id": (
        change("annotations.0.segments_info.1.id", ...),
        PLACE + r"has a segment with the id None, expected 1",
    ),
    "void id": (
        change("annotations.0.segments_info.1.id", 0),
        PLACE + r"has a segment with the id 0, expected 1 to",
    ),
    "large id": (
        change("annotations.0.segments_info.1.id", 2**24),
        PLACE + r"has a segment with the id 16777216",
    ),
    "id twice": (
        change("annotations.0.segments_info.1.id", 256),
        PLACE + r"has two segments with the id 256",
    ),
    "category": (
        change("annotations.0.segments_info.1.category_id", 7),
        PLACE + r"has a segment \(id 5\) that has the category_id 7, which is none",
    ),
    "iscrowd": (
        change("annotations.0.segments_info.1.iscrowd", "no"),
        PLACE + r"has a segment \(id 5\) that has iscrowd 'no', expected 0 or 1",
    ),
}


def with_a_good_one(content: dict[str, Any], root: Path) -> dict[str, Any]:
    """The content with a second picture behind the first."""
    good = panoptic_annotations()
    content["images"].append({**good["images"][0], "id": 99, "file_name": "good.jpg"})
    content["annotations"].append({**good["annotations"][0], "image_id": 99, "file_name": "good.png"})
    write_picture(root / "val2017/good.jpg")
    write_segments(root / "annotations/panoptic_val2017/good.png", SEGMENTS)
    return content


@pytest.mark.parametrize("damage", BAD_PANOPTIC)
def test_a_malformed_panoptic_annotation_is_named_and_its_picture_left_out(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    apply, words = BAD_PANOPTIC[damage]
    content = panoptic_annotations()
    apply(content)
    root = make_panoptic(tmp_path, with_a_good_one(content, tmp_path), "val")
    with pytest.raises(BadSampleError, match=words):
        CocoPanoptic(root, "val")
    dataset = CocoPanoptic(root, "val", skip_bad=True)
    assert [sample["image_id"] for sample in dataset] == [99]
    assert len(caplog.messages) == 2  # the annotation, and the image that is left without one
    assert "the image 30 (c.jpg) has no annotation that can be used" in caplog.text


def test_panoptic_images_need_one_annotation(tmp_path: Path) -> None:
    content = panoptic_annotations()
    content["annotations"] *= 2
    with pytest.raises(
        BadSampleError, match=r"annotations\[1\] .*belongs to an image that an annotation before it"
    ):
        CocoPanoptic(make_panoptic(tmp_path, content), "train")
    content["annotations"] = []
    with pytest.raises(
        BadSampleError, match=r"the image 30 \(c\.jpg\) has no annotation that can be used\. Add it"
    ):
        CocoPanoptic(make_panoptic(tmp_path, content), "train")


def lose_a_segment(ids: np.ndarray) -> np.ndarray:
    return np.where(ids == 256, 0, ids)


def add_a_segment(ids: np.ndarray) -> np.ndarray:
    ids = ids.copy()
    ids[0, :3] = [7, 8, 300]
    return ids


def resize(ids: np.ndarray) -> np.ndarray:
    return ids[:, :-1]


BAD_MAPS = {
    lose_a_segment: r"c\.png: does not fit the annotation of the image 30 in .*panoptic_val2017\.json; listed "
    r"segments have no pixel in it: 256\. Was it resized",
    add_a_segment: r"c\.png: does not fit .*json; it holds segments that are not listed: 7, 8, 300\. Was it",
    resize: r"c\.png: is 19x12 pixels, but its picture .*c\.jpg is 20x12\. Give them one size",
}


@pytest.mark.parametrize("damage", BAD_MAPS)
def test_a_label_map_that_does_not_fit_is_named_and_left_out(
    tmp_path: Path, damage: Callable[[np.ndarray], np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    content = with_a_good_one(panoptic_annotations(), tmp_path)
    root = make_panoptic(tmp_path, content, "val", damage(SEGMENTS))
    dataset = CocoPanoptic(root, "val")
    with pytest.raises(BadSampleError, match=BAD_MAPS[damage]):
        dataset[0]
    with pytest.raises(BadSampleError, match=BAD_MAPS[damage]):
        dataset.ground_truth()
    kept = CocoPanoptic(root, "val", skip_bad=True)
    assert [sample["image_id"] for sample in kept] == [99]
    assert [image["id"] for image in kept.ground_truth()["images"]] == [99]
    assert caplog.text.count("left out the sample c: ") == len(caplog.messages) == 1


def test_a_missing_or_broken_label_map_is_named(tmp_path: Path) -> None:
    root = make_panoptic(tmp_path)
    path = root / "annotations/panoptic_train2017/c.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(BadSampleError, match=r"panoptic_train2017.c\.png: cannot be read as a picture"):
        CocoPanoptic(root, "train")[0]
    path.unlink()
    with pytest.raises(BadSampleError, match=r"panoptic_train2017.c\.png: missing, the partner of .*c\.jpg"):
        CocoPanoptic(root, "train")


def test_a_picture_of_void_alone(tmp_path: Path) -> None:
    content = panoptic_annotations()
    content["annotations"][0]["segments_info"] = []
    dataset = CocoPanoptic(make_panoptic(tmp_path, content, ids=SEGMENTS * 0), "train")
    sample = dataset[0]
    assert not sample["segments"].any()
    assert sample["labels"].shape == sample["iscrowd"].shape == (0,)
    assert dataset.ground_truth()["annotations"] == []


def test_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    content = annotations()
    change("images.0.file_name", "\ud800.png")(content)
    with pytest.raises(BadSampleError, match=r"has the file_name .*, which is not text"):
        CocoInstances(make_coco(tmp_path, content), "train")
