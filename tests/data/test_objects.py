"""Objects from segments, the form of every object data set, and the front of their registry."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

import freqfusion.data
from freqfusion.data import (
    Category,
    Kind,
    ObjectDataset,
    SegmentationDataset,
    create_dataset,
    list_datasets,
    segments_to_objects,
)
from freqfusion.data.objects import Segment, number_segments

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


def test_names() -> None:
    assert list_datasets("objects") == [
        "cityscapes_panoptic",
        "coco",
        "coco_panoptic",
        "synthetic_panoptic",
        "voc_boxes",
    ]


@pytest.mark.parametrize("name", ["cityscapes_panoptic", "coco", "coco_panoptic", "voc_boxes"])
def test_missing_root_and_split_name_the_layout(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=f"'{name}' is read from files: give its folder as root.*expects ROOT"
    ):
        create_dataset(name, None, "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder\. .*expects.*ROOT"):
        create_dataset(name, tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"expects ROOT"):
        create_dataset(name, tmp_path, "train")


def test_the_kinds_make_up_all() -> None:
    kinds = [name for kind in get_args(Kind) for name in list_datasets(kind)]
    assert sorted(kinds) == list_datasets()
    for kind, base in (("semantic", SegmentationDataset), ("objects", ObjectDataset)):
        for name in list_datasets(kind):
            assert issubclass(getattr(freqfusion.data, freqfusion.data._DATASETS[name][1]), base)


def test_registry_imports_torch_alone() -> None:
    code = (
        "import sys\n"
        "from freqfusion.data import list_datasets\n"
        "assert list_datasets()\n"
        "late = {'torchvision', 'PIL', 'pycocotools'} & set(sys.modules)\n"
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_boxes_alone_need_no_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    scenes = create_dataset("synthetic_panoptic", None, "train", length=1)
    assert scenes[0]["segments"].max() > 1
    with pytest.raises(ImportError, match=r'pycocotools is not installed.*pip install "freqfusion\[train\]"'):
        scenes.ground_truth()


class TwoKinds(ObjectDataset):
    categories = (Category(4, "sky", False, (1, 2, 3)), Category(9, "cat", True, (4, 5, 6)))


def test_categories_give_names_colours_and_things() -> None:
    dataset = TwoKinds()
    assert dataset.classes == ("sky", "cat")
    assert dataset.palette == ((1, 2, 3), (4, 5, 6))
    assert dataset.things == (1,)
    assert (dataset.has_masks, dataset.is_panoptic) == (False, False)


# objects from segments

SEGMENTS = torch.tensor(
    [
        [1, 1, 0, 2, 2, 2],
        [1, 1, 1, 2, 5, 2],
        [3, 3, 3, 3, 3, 3],
    ],
    dtype=torch.int32,
)
LABELS = torch.tensor([7, 4, 0, 7, 7])
CROWD = torch.tensor([False, True, False, False, False])


def test_objects_are_the_visible_segments_of_things() -> None:
    objects = segments_to_objects(tv_tensors.Mask(SEGMENTS), LABELS, CROWD, things=(4, 7))
    assert {type(value) for value in objects.values()} == {torch.Tensor}
    assert objects["boxes"].dtype == torch.float32
    # segment 3 is stuff and segment 4 has no pixel
    assert objects["boxes"].tolist() == [[0, 0, 3, 2], [3, 0, 6, 2], [4, 1, 5, 2]]
    assert objects["labels"].tolist() == [7, 4, 7]
    assert objects["iscrowd"].tolist() == [False, True, False]
    assert objects["masks"].dtype == torch.uint8
    for mask, number in zip(objects["masks"], (1, 2, 5), strict=True):
        assert torch.equal(mask, SEGMENTS.eq(number).to(torch.uint8))


@pytest.mark.parametrize("things", [(), (3,)])
def test_no_object(things: tuple[int, ...]) -> None:
    objects = segments_to_objects(SEGMENTS.long(), LABELS, CROWD, things)
    assert objects["boxes"].shape == (0, 4)
    assert objects["masks"].shape == (0, 3, 6)
    assert objects["labels"].shape == objects["iscrowd"].shape == (0,)
    assert objects["labels"].dtype == torch.int64
    nothing = segments_to_objects(torch.zeros(1, 1, dtype=torch.int32), LABELS[:0], CROWD[:0], (7,))
    assert nothing["masks"].shape == (0, 1, 1)


def test_one_pixel_is_a_box_of_one_pixel() -> None:
    objects = segments_to_objects(torch.ones(1, 1, dtype=torch.int32), LABELS[:1], CROWD[:1], (7,))
    assert objects["boxes"].tolist() == [[0, 0, 1, 1]]
    assert objects["masks"].tolist() == [[[1]]]


@pytest.mark.parametrize("value", [-1, 6])
def test_a_number_without_a_label_is_refused(value: int) -> None:
    segments = SEGMENTS.clone()
    segments[0, 0] = value
    with pytest.raises(ValueError, match=rf"numbers from .*{value}.*of one of the 5 labels"):
        segments_to_objects(segments, LABELS, CROWD, (7,))


def test_segments_are_numbered_by_their_place() -> None:
    segments = [Segment(900, 0, False), Segment(5, 1, False), Segment(2**24 - 1, 0, True)]
    stored = torch.tensor([[0, 5, 900], [2**24 - 1, 6, 4], [901, 5, 2**24]])
    assert number_segments(stored, segments).tolist() == [[0, 2, 1], [3, 0, 0], [0, 2, 0]]
    assert number_segments(stored, []).tolist() == [[0] * 3] * 3


# the page


def test_page_lists_every_dataset() -> None:
    page = PAGE.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == list_datasets()


def test_page_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 2, "width": 3}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    for pictures, file in (("train", "instances_train.json"), ("pictures/train", "train_labels.json")):
        (tmp_path / "FOLDER" / pictures).mkdir(parents=True)
        Image.new("RGB", (3, 2)).save(tmp_path / "FOLDER" / pictures / "a.png")
        (tmp_path / "FOLDER" / file).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["train"].json_path == Path("FOLDER/train_labels.json")
    assert len(names["train"]) == 1
