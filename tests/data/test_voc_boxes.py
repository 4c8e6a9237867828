"""Boxes in Pascal VOC's XML."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from freqfusion.data import BadSampleError, PascalVOC, VOCBoxes

WIDTH, HEIGHT = 40, 30

Box = tuple[Any, Any, Any, Any]


def an_object(name: str, box: Box, difficult: str = "0") -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return (
        f"<object><name>{name}</name><pose>Left</pose><truncated>1</truncated><difficult>{difficult}</difficult>"
        f"<bndbox>{corners}</bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        "</object>"
    )


def xml_of(*objects: str, width: Any = WIDTH, height: Any = HEIGHT) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>x.jpg</filename>{size}{''.join(objects)}</annotation>"


CAT = an_object("cat", (1, 1, 10, 20))
DOG = an_object("dog", (5.5, 7, 40, 30), difficult="1")


def make_voc(root: Path, xmls: dict[str, str], split: str = "train", ending: str = ".jpg") -> Path:
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(xmls) + "\n\n")
    for name, text in xmls.items():
        (root / f"Annotations/{name}.xml").write_text(text)
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(root / f"JPEGImages/{name}{ending}")
    return root


@pytest.mark.parametrize("inner", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_samples(tmp_path: Path, inner: str) -> None:
    make_voc(tmp_path / inner, {"b": xml_of(CAT, DOG), "a": xml_of()})
    dataset = VOCBoxes(tmp_path, "train")
    assert dataset.classes == PascalVOC.classes[1:]
    assert dataset.palette == PascalVOC.palette[1:]
    assert dataset.things == tuple(range(20))
    assert [category.id for category in dataset.categories] == list(range(1, 21))
    assert (dataset.has_masks, dataset.is_panoptic) == (False, False)
    assert [(dataset.image_id(index), dataset.name(index)) for index in (0, 1)] == [("b", "b"), ("a", "a")]
    assert dataset.size(0) == (HEIGHT, WIDTH)
    sample = dataset[0]
    assert set(sample) == {"image", "name", "image_id", "boxes", "labels", "iscrowd"}
    assert sample["image"].shape == (3, HEIGHT, WIDTH)
    assert (sample["name"], sample["image_id"]) == ("b", "b")
    assert sample["boxes"].tolist() == [[0, 0, 10, 20], [4.5, 6, 40, 30]]  # corners are 1-based and inclusive
    assert [dataset.classes[label] for label in sample["labels"]] == ["cat", "dog"]
    assert sample["iscrowd"].tolist() == [False, True]
    empty = dataset[1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].dtype == torch.int64


def test_ground_truth(tmp_path: Path) -> None:
    truth = VOCBoxes(
        make_voc(tmp_path, {"b": xml_of(CAT, DOG)}), "train", classes=["dog", "cat"]
    ).ground_truth()
    assert truth["images"] == [{"id": "b", "file_name": "b.jpg", "height": HEIGHT, "width": WIDTH}]
    assert truth["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert truth["annotations"] == [
        {"id": 1, "image_id": "b", "category_id": 2, "bbox": [0, 0, 10, 20], "area": 200, "iscrowd": 0},
        {"id": 2, "image_id": "b", "category_id": 1, "bbox": [4.5, 6, 35.5, 24], "area": 852, "iscrowd": 1},
    ]


@pytest.mark.parametrize("ending", [".jpeg", ".png"])
def test_other_picture_files(tmp_path: Path, ending: str) -> None:
    dataset = VOCBoxes(make_voc(tmp_path, {"a": xml_of(CAT)}, ending=ending), "train")
    assert len(dataset[0]["labels"]) == 1
    assert dataset.ground_truth()["images"][0]["file_name"] == f"a{ending}"


def test_empty_difficult_and_fractions(tmp_path: Path) -> None:
    text = xml_of(
        an_object("cat", ("2.25", " 3 ", "9.0", "1e1")).replace("<difficult>0</difficult>", "<difficult/>")
    )
    sample = VOCBoxes(make_voc(tmp_path, {"a": text}), "train")[0]
    assert sample["boxes"].tolist() == [[1.25, 2, 9, 10]]
    assert sample["iscrowd"].tolist() == [False]


def test_boxes_are_clipped(tmp_path: Path) -> None:
    text = xml_of(an_object("cat", (-3, 0, 41, 35)))
    assert VOCBoxes(make_voc(tmp_path, {"a": text}), "train")[0]["boxes"].tolist() == [[0, 0, 40, 30]]


def test_boxes_of_no_size_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = [an_object("cat", (7, 8, 7, 20)), an_object("cat", (7, 8, 9, 8)), an_object("cat", (7, 8, 7, 8))]
    xmls = {"a": xml_of(CAT), "b": xml_of(points[0], CAT), "c": xml_of(*points[1:])}
    dataset = VOCBoxes(make_voc(tmp_path, xmls), "train")
    assert [len(sample["labels"]) for sample in dataset] == [1, 1, 0]
    assert len(dataset.ground_truth()["annotations"]) == 2
    assert len(caplog.messages) == 1
    assert "train.txt: left out 3 box(es) of no width or height, the first of" in caplog.text
    assert caplog.messages[0].endswith("b.xml")


def test_other_names_are_listed_with_the_mend(tmp_path: Path) -> None:
    root = make_voc(
        tmp_path,
        {"a": xml_of(CAT, an_object("RBC", (1, 2, 3, 4))), "b": xml_of(an_object("WBC", (1, 2, 3, 4)))},
    )
    for skip_bad in (False, True):
        with pytest.raises(
            ValueError,
            match=r"have the names RBC, WBC, cat, but RBC, WBC are not among the classes aeroplane, .*"
            r"option classes, for instance classes=\['RBC', 'WBC', 'cat'\]",
        ):
            VOCBoxes(root, "train", skip_bad=skip_bad)
    dataset = VOCBoxes(root, "train", classes=["WBC", "RBC", "cat"])
    assert [sample["labels"].tolist() for sample in dataset] == [[2, 1], [0]]
    assert len(set(dataset.palette)) == 3
    for classes in ([], ["a", "b", "a"]):
        with pytest.raises(ValueError, match="classes must be at least one name, each once"):
            VOCBoxes(root, "train", classes=classes)


def bomb(encoding: str) -> bytes:
    entities = '<!ENTITY a0 "ha">' + "".join(
        f'<!ENTITY a{level} "{f"&a{level - 1};" * 10}">' for level in range(1, 30)
    )
    text = (
        f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE x [{entities}]><annotation>&a29;</annotation>'
    )
    return text.encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_document_type_is_refused_at_once(tmp_path: Path, encoding: str) -> None:
    root = make_voc(tmp_path, {"a": xml_of(CAT)})
    (root / "Annotations/a.xml").write_bytes(bomb(encoding))
    start = time.perf_counter()
    with pytest.raises(
        BadSampleError, match=r"a\.xml: cannot be read as XML \(it has a document type declaration"
    ):
        VOCBoxes(root, "train")
    assert time.perf_counter() - start < 5


def test_outside_files_are_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("cat")
    text = f'<!DOCTYPE x [<!ENTITY name SYSTEM "{(tmp_path / "secret.txt").as_uri()}">]>' + xml_of(
        an_object("&name;", (1, 2, 3, 4))
    )
    with pytest.raises(BadSampleError, match="document type declaration"):
        VOCBoxes(make_voc(tmp_path, {"a": text}), "train")
    with pytest.raises(BadSampleError, match="undefined entity"):
        VOCBoxes(make_voc(tmp_path, {"a": xml_of(an_object("&name;", (1, 2, 3, 4)))}), "train")


BAD_FILES = {
    "empty": ("", r"b\.xml: cannot be read as XML"),
    "cut off": (xml_of(CAT)[:-20], r"b\.xml: cannot be read as XML.*truncated"),
    "unknown encoding": ('<?xml version="1.0" encoding="klingon"?><a/>', r"b\.xml: cannot be read as XML"),
    "no size": ("<annotation></annotation>", r"b\.xml: has size/height None, expected a number"),
    "size 0": (
        xml_of(CAT, width=0),
        r"b\.xml: has the height and width \[30\.0, 0\.0\], expected numbers of pixels",
    ),
    "part of a pixel": (xml_of(CAT, height=2.5), r"b\.xml: has the height and width \[2\.5, 40\.0\]"),
    "size in words": (xml_of(CAT, height="ten"), r"b\.xml: has size/height 'ten', expected a number"),
    "another size": (xml_of(CAT, height=31), r"b\.jpg: is 40x30 pixels .*annotations are for 40x31"),
}


@pytest.mark.parametrize("damage", BAD_FILES)
def test_a_bad_file_is_named_and_its_picture_left_out(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    text, words = BAD_FILES[damage]
    root = make_voc(tmp_path, {"a": xml_of(CAT), "b": text, "c": xml_of(CAT, DOG)}, "val")
    with pytest.raises(BadSampleError, match=words):
        list(VOCBoxes(root, "val"))
    dataset = VOCBoxes(root, "val", skip_bad=True)
    assert [(sample["image_id"], sample["name"]) for sample in dataset] == [("a", "a"), ("c", "c")]
    assert len(caplog.messages) == 1


BAD_OBJECTS = {
    "no name": (an_object(" ", (1, 2, 3, 4)), r"b\.xml: object 2 has no name"),
    "difficult": (
        an_object("cat", (1, 2, 3, 4), "maybe"),
        r"object 2 has difficult 'maybe', expected 0 or 1",
    ),
    "no box": ("<object><name>cat</name></object>", r"object 2 has bndbox/xmin None, expected a number"),
    "words": (an_object("cat", (1, "two", 3, 4)), r"object 2 has bndbox/ymin 'two', expected a number"),
    "NaN": (an_object("cat", (1, 2, "nan", 4)), r"object 2 has bndbox/xmax 'nan', expected a number"),
    "infinity": (an_object("cat", (1, 2, "inf", 4)), r"object 2 has bndbox/xmax 'inf', expected a number"),
    "negative": (
        an_object("cat", (5, 2, 3, 4)),
        r"object 2 has a box from \(5, 2\) to \(3, 4\), whose .* negative",
    ),
    "outside": (an_object("cat", (41, 2, 50, 4)), r"object 2 has a box .* outside its image of 40x30 pixels"),
}


@pytest.mark.parametrize("damage", BAD_OBJECTS)
def test_a_bad_object_is_named_and_left_out_alone(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    text, words = BAD_OBJECTS[damage]
    root = make_voc(tmp_path, {"a": xml_of(CAT), "b": xml_of(CAT, text, DOG)}, "val")
    with pytest.raises(BadSampleError, match=words):
        VOCBoxes(root, "val")
    dataset = VOCBoxes(root, "val", skip_bad=True)
    assert [len(sample["labels"]) for sample in dataset] == [1, 2]
    assert len(caplog.messages) == 1


def remove_picture(root: Path) -> None:
    (root / "JPEGImages/b.jpg").unlink()


def remove_xml(root: Path) -> None:
    (root / "Annotations/b.xml").unlink()


MISSING = {
    remove_picture: r"JPEGImages.b\.jpg: missing, the file of the sample b\. Restore it.*--skip-bad",
    remove_xml: r"Annotations.b\.xml: missing\. Restore it.*--skip-bad",
}


@pytest.mark.parametrize("damage", MISSING)
def test_missing_files(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_voc(tmp_path, {"a": xml_of(CAT), "b": xml_of(CAT)})
    damage(root)
    with pytest.raises(BadSampleError, match=MISSING[damage]):
        VOCBoxes(root, "train")
    assert [sample["name"] for sample in VOCBoxes(root, "train", skip_bad=True)] == ["a"]
    assert len(caplog.messages) == 1


def test_nothing_left_is_an_error_that_points_to_the_warnings(tmp_path: Path) -> None:
    root = make_voc(tmp_path, {"a": ""})
    with pytest.raises(
        BadSampleError, match=r"train\.txt: none of its samples can be used; see the warnings"
    ):
        VOCBoxes(root, "train", skip_bad=True)


def test_unknown_list(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"ImageSets.Main.val\.txt: no such file\. A VOC folder .*expects"
    ):
        VOCBoxes(make_voc(tmp_path, {"a": xml_of(CAT)}), "val")


def test_boxes_in_shares_of_the_sides_are_refused(tmp_path: Path) -> None:
    shares = an_object("cat", (0.1, 0.2, 0.5, 0.75))
    with pytest.raises(
        BadSampleError, match=r"train\.txt: all of its boxes lie within the first pixel.*in pixels"
    ):
        VOCBoxes(make_voc(tmp_path, {"a": xml_of(shares)}), "train")
    assert len(VOCBoxes(make_voc(tmp_path, {"a": xml_of(shares), "b": xml_of(CAT)}), "train")) == 2
