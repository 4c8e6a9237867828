"""Result files: what is written, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from freqfusion._rle import run_lengths
from freqfusion.metrics import write_detections, write_panoptic, write_panoptic_image
from freqfusion.metrics.results import check_rle

BOX = {"image_id": 4, "category_id": 18, "bbox": [1.5, 2, 0, 7.25], "score": 0.5}
MASK = {"image_id": 4, "category_id": 1, "segmentation": {"size": [5, 7], "counts": ";230009"}, "score": 1}


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noisy = [
        rng.random(size) < share for size in ((1, 1), (1, 9), (13, 6), (40, 61)) for share in (0.03, 0.5, 0.9)
    ]
    smooth = np.hypot(*np.mgrid[-300:340, -200:300]) < 180
    return [*noisy, np.zeros((3, 4), bool), np.ones((70, 90), bool), smooth]


def test_run_lengths_are_those_of_the_mask() -> None:
    for mask in masks():
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        columns = mask.flatten(order="F")
        starts = np.flatnonzero(np.diff(columns, prepend=False, append=~columns[-1:]))
        runs = np.diff(starts, prepend=0).tolist()
        assert run_lengths(rle["counts"].decode()) == runs
        check_rle({"size": list(mask.shape), "counts": rle["counts"].decode()}, "mask", mask.shape)


def test_detections_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    both = {**BOX, "segmentation": MASK["segmentation"]}
    write_detections(path, iter([BOX, MASK, both]))
    assert json.loads(path.read_text()) == [BOX, MASK, both]
    write_detections(path, [])
    assert json.loads(path.read_text()) == []
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


DAMAGED_RLE = {
    "cut off": ";23000P",
    "does not occur": ";23000\u00e9",
    "add up to 34 pixels, not to 5 x 7": ";230008",
    "add up to 0": "",
}


def changed(entry: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {key: value for key, value in {**entry, **values}.items() if value is not None}


BAD_DETECTIONS = [
    ([3], "must be an object"),
    (changed(BOX, image_id=4.0), "image_id must be a whole number or text, got 4.0"),
    (changed(BOX, image_id=True), "image_id must be a whole number or text, got True"),
    (changed(BOX, category_id=None), "category_id must be a whole number, got None"),
    (changed(BOX, score=None), "score must be a finite number, got None"),
    (changed(BOX, score=10**400), "score must be a finite number, got 1000"),
    (changed(BOX, score=float("nan")), "score must be a finite number, got nan"),
    (changed(BOX, bbox=None), r"neither bbox nor segmentation, got \['category_id', 'image_id', 'score'\]"),
    (changed(BOX, bbox=[1, 2, 3]), r"bbox must be \[x, y, width, height\]"),
    (changed(BOX, bbox=[1, 2, -3, 4]), r"bbox must be .* got \[1, 2, -3, 4\]"),
    (changed(BOX, bbox=[1, 2, 3, float("inf")]), "bbox must be"),
    (changed(MASK, segmentation=[[1, 2, 3, 4, 5, 6]]), "compressed RLE .* polygons"),
    (changed(MASK, segmentation={"size": [5, 7], "counts": [35]}), "compressed RLE .* lists of counts"),
    (changed(MASK, segmentation={"size": [5, 0], "counts": ";230009"}), "needs a size"),
    (changed(MASK, segmentation={"size": 35, "counts": ";230009"}), "needs a size"),
    *(
        (
            changed(MASK, segmentation={"size": [5, 7], "counts": counts}),
            f"segmentation is damaged: .*{words}",
        )
        for words, counts in DAMAGED_RLE.items()
    ),
]


@pytest.mark.parametrize("entry, words", BAD_DETECTIONS)
def test_bad_entries_are_refused_with_file_and_place(tmp_path: Path, entry: Any, words: str) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=rf"results\.json: entry 1.*{words}"):
        write_detections(path, [BOX, entry])
    assert not path.exists()


def test_panoptic_result(tmp_path: Path) -> None:
    folder, path = tmp_path / "pred", tmp_path / "pred.json"
    segments = torch.tensor([[0, 1, 1], [700, 700, 2]])
    categories = [5, 9, *[1] * 697, 200]
    entries = [
        write_panoptic_image(folder, 42, "a.png", segments, categories),
        write_panoptic_image(folder, "frankfurt_0", "b.png", torch.zeros(1, 1, dtype=torch.uint8), []),
    ]
    write_panoptic(path, folder, iter(entries))
    info = [{"id": 1, "category_id": 5}, {"id": 2, "category_id": 9}, {"id": 700, "category_id": 200}]
    assert json.loads(path.read_text()) == {
        "annotations": [
            {"image_id": 42, "file_name": "a.png", "segments_info": info},
            {"image_id": "frankfurt_0", "file_name": "b.png", "segments_info": []},
        ]
    }
    with Image.open(folder / "a.png") as picture:
        assert picture.mode == "RGB"
        colours = np.asarray(picture).astype(int)
    assert (colours @ [1, 256, 65536]).tolist() == segments.tolist()
    assert colours[1, 0].tolist() == [188, 2, 0]
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["a.png", "b.png", "pred.json"]


def test_panoptic_ids_use_all_three_colours(tmp_path: Path) -> None:
    write_panoptic_image(tmp_path, 1, "a.png", torch.tensor([[0, 70_000]]), [1] * 70_000)
    with Image.open(tmp_path / "a.png") as picture:
        assert np.asarray(picture).tolist() == [[[0, 0, 0], [112, 17, 1]]]


@pytest.mark.parametrize(
    "segments, categories, name, error, words",
    [
        (torch.zeros(2, 2), [], "a.png", TypeError, "integer dtype, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.bool), [], "a.png", TypeError, "integer dtype, got torch.bool"),
        (torch.zeros(1, 2, 2).int(), [], "a.png", ValueError, r"shape \(H, W\), got \(1, 2, 2\)"),
        (torch.zeros(0, 2).int(), [], "a.png", ValueError, r"shape \(H, W\), got \(0, 2\)"),
        (torch.tensor([[0, 2]]), [7], "a.png", ValueError, "one of the 1 category_ids .* from 0 to 2"),
        (torch.tensor([[-1, 1]]), [7], "a.png", ValueError, "values from -1 to 1"),
        (torch.tensor([[0, 1]]), [np.int64(7)], "a.png", TypeError, "category_ids must be whole numbers"),
        (torch.tensor([[0, 1]]), [7], "b/a.png", ValueError, "without a folder, got 'b/a.png'"),
        (torch.tensor([[0, 1]]), [7], "a.jpg", ValueError, "name of a PNG"),
    ],
)
def test_bad_panoptic_images_are_refused(
    tmp_path: Path, segments: torch.Tensor, categories: list, name: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        write_panoptic_image(tmp_path, 1, name, segments, categories)
    assert not list(tmp_path.iterdir())


GOOD = {"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 3, "category_id": 1}]}


@pytest.mark.parametrize(
    "entries, words",
    [
        ([[]], "entry 0 must have image_id, file_name and segments_info alone"),
        ([changed(GOOD, image_id=1.5)], "entry 0: image_id must be a whole number or text, got 1.5"),
        ([changed(GOOD, segments_info={})], "entry 0: segments_info must be a list"),
        ([changed(GOOD, segments_info=[{"id": 3}])], "a segment must have id and category_id alone"),
        ([changed(GOOD, segments_info=[{"id": 0, "category_id": 1}])], "from 1 to 16777215, got 0"),
        ([changed(GOOD, segments_info=[{"id": 2**24, "category_id": 1}])], "got 16777216"),
        ([changed(GOOD, segments_info=GOOD["segments_info"] * 2)], "must differ .* got 3"),
        (
            [changed(GOOD, segments_info=[{"id": 3, "category_id": "cat"}])],
            "category_id must be .* got 'cat'",
        ),
        (
            [GOOD, changed(GOOD, file_name="c.png")],
            "entry 1: the image 1 or the file c.png has an entry already",
        ),
        ([GOOD, changed(GOOD, image_id=2)], "entry 1: the image 2 or the file a.png has an entry already"),
    ],
)
def test_bad_panoptic_entries_are_refused(tmp_path: Path, entries: list, words: str) -> None:
    for name in ("a.png", "c.png"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=words):
        write_panoptic(tmp_path / "result.json", tmp_path, entries)
    assert not (tmp_path / "result.json").exists()


def test_panoptic_entry_without_its_png_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"a\.png: no such file, but .*result\.json: entry 0 names it"
    ):
        write_panoptic(tmp_path / "result.json", tmp_path, [GOOD])
