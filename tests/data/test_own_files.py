"""Files as other programs write them: orientations, endings, encodings and forms of names, in every reader."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from freqfusion.data import BadSampleError, create_dataset

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def save(path: Path, pixels: np.ndarray, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif(orientation))
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def half(height: int, width: int) -> np.ndarray:
    """0 and 1, told apart by every turn and mirror image."""
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 4, : width // 2] = 1
    return mask


def photo(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask[..., None] * 200, 3, axis=2).astype(np.uint8)


# Each reader: writes one photo with its truth, opens it, and says where the truth of a sample is.


def folder_set(root: Path, picture: np.ndarray, truth: np.ndarray, orientations: tuple[int, int]) -> Any:
    write(root / "classes.txt", "dark\nbright\n")
    save(root / "train/images/a.png", picture, orientations[0])
    save(root / "train/masks/a.png", truth, orientations[1])
    return create_dataset("folder", root, "train")


def foreground_set(root: Path, picture: np.ndarray, truth: np.ndarray, orientations: tuple[int, int]) -> Any:
    save(root / "train/images/a.png", picture, orientations[0])
    save(root / "train/instances/a.png", truth * 7, orientations[1])
    return create_dataset("foreground", root, "train")


def panoptic_set(root: Path, picture: np.ndarray, truth: np.ndarray, orientations: tuple[int, int]) -> Any:
    stated = ImageOps.exif_transpose(Image.open(save(root / "panoptic_train/a.png", truth, orientations[1])))
    ids = np.stack([truth + 1, truth * 0, truth * 0], 2).astype(np.uint8)
    save(root / "panoptic_train/a.png", ids, orientations[1])
    save(root / "train/a.png", picture, orientations[0])
    image = {"id": 1, "file_name": "a.png", "height": stated.height, "width": stated.width}
    segments = [{"id": number, "category_id": number, "iscrowd": 0} for number in (1, 2)]
    content = {
        "images": [image],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}],
    }
    write(root / "panoptic_train.json", json.dumps(content))
    return create_dataset("coco_panoptic", root, "train")


def cityscapes_set(root: Path, picture: np.ndarray, truth: np.ndarray, orientations: tuple[int, int]) -> Any:
    save(root / "leftImg8bit/train/ulm/a_leftImg8bit.png", picture, orientations[0])
    ids = np.where(truth == 1, 26001, 7).astype(np.uint16)
    save(root / "gtFine/train/ulm/a_gtFine_instanceIds.png", ids, orientations[1])
    dataset = create_dataset("cityscapes_panoptic", root, "train")
    truth_size = dataset.ground_truth()["images"][0]
    assert dataset.size(0) == dataset[0]["image"].shape[1:] == (truth_size["height"], truth_size["width"])
    return dataset


MAPS = {
    folder_set: lambda sample: sample["mask"],
    foreground_set: lambda sample: sample["mask"],
    panoptic_set: lambda sample: sample["segments"] - 1,
    cityscapes_set: lambda sample: sample["segments"] - 1,
}


def fits(sample: dict[str, Any], truth: torch.Tensor) -> bool:
    return torch.equal(torch.as_tensor(sample["image"][0] > 100), torch.as_tensor(truth == 1))


@pytest.mark.parametrize("make", MAPS)
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_maps_of_the_stored_pixels_are_told_by_their_size(
    tmp_path: Path, make: Callable[..., Any], orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    truth = half(8, 12)
    dataset = make(tmp_path, photo(truth), truth, (orientation, 1))
    assert fits(dataset[0], MAPS[make](dataset[0]))
    assert caplog.text.count("its truth fits the pixels as stored, without the EXIF orientation") == 1


@pytest.mark.parametrize("make", MAPS)
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_maps_of_the_upright_picture_are_told_by_their_size(
    tmp_path: Path, make: Callable[..., Any], orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    stored = half(8, 12)
    path = save(tmp_path / "x.png", stored, orientation)
    upright = np.array(ImageOps.exif_transpose(Image.open(path)))
    dataset = make(tmp_path, photo(stored), upright, (orientation, 1))
    assert fits(dataset[0], MAPS[make](dataset[0]))
    assert not caplog.messages


@pytest.mark.parametrize("make", MAPS)
@pytest.mark.parametrize("orientation, height", [(2, 8), (3, 8), (4, 8), (5, 12), (6, 12), (7, 12), (8, 12)])
def test_where_the_size_does_not_tell_it_is_said_once(
    tmp_path: Path,
    make: Callable[..., Any],
    orientation: int,
    height: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    truth = half(height, 12)
    dataset = make(tmp_path, photo(truth), truth, (orientation, 1))
    for _ in range(2):
        assert not fits(dataset[0], MAPS[make](dataset[0]))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"a.png: its EXIF orientation is {orientation}, that of its truth 1" in caplog.text or (
        f"a_leftImg8bit.png: its EXIF orientation is {orientation}, that of its truth 1" in caplog.text
    )
    assert "remove the orientation" in caplog.text


@pytest.mark.parametrize("make", MAPS)
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_map_with_the_orientation_of_its_picture_turns_with_it(
    tmp_path: Path, make: Callable[..., Any], orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    truth = half(8, 12)
    dataset = make(tmp_path, photo(truth), truth, (orientation, orientation))
    assert fits(dataset[0], MAPS[make](dataset[0]))
    assert not caplog.messages


def test_the_orientation_of_a_map_alone_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truth = half(8, 12)
    folder_set(tmp_path, photo(truth), truth, (1, 3))[0]
    assert "its EXIF orientation is 1, that of its truth 3" in caplog.text
    with pytest.raises(BadSampleError, match=r"is 8x12 pixels.*upright; EXIF orientations \(1, 6\)"):
        folder_set(tmp_path, photo(truth), truth, (1, 6))[0]


def boxes_set(kind: str, root: Path, orientation: int, height: int, width: int) -> Any:
    """A photo whose upper left part is bright, and its box, of the stored pixels."""
    truth = half(height, width)
    box = [0, 0, width // 2, height // 4]
    if kind == "voc":
        save(root / "JPEGImages/a.png", photo(truth), orientation)
        write(root / "ImageSets/Main/train.txt", "a\n")
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (1, 1, *box[2:]), strict=True)
        bndbox = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        entry = f"<object><name>cat</name><bndbox>{bndbox}</bndbox></object>"
        write(root / "Annotations/a.xml", f"<annotation>{size}{entry}</annotation>")
        return create_dataset("voc_boxes", root, "train")
    save(root / "train/a.png", photo(truth), orientation)
    left, top, right, bottom = 0, 0, *box[2:]
    annotation: dict[str, Any] = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0}
    if kind == "polygons":
        annotation["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
    if kind == "rle":
        flat = truth.T.flatten()
        edges = np.flatnonzero(np.diff(flat)) + 1
        annotation["segmentation"] = {
            "size": [height, width],
            "counts": np.diff([0, *([0] if flat[0] else []), *edges, flat.size]).tolist(),
        }
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": height, "width": width}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "cat"}],
    }
    write(root / "instances_train.json", json.dumps(content))
    return create_dataset("coco", root, "train")


@pytest.mark.parametrize("kind", ["voc", "boxes", "polygons", "rle"])
@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_boxes_and_masks_of_the_stored_pixels(
    tmp_path: Path, kind: str, orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    sample = boxes_set(kind, tmp_path, orientation, 8, 12)[0]
    left, top, right, bottom = sample["boxes"][0].int().tolist()
    drawn = torch.zeros(sample["image"].shape[1:])
    drawn[top:bottom, left:right] = 1
    if orientation == 3:
        assert "a.png: its EXIF orientation is 3" in caplog.text
        return
    assert fits(sample, drawn)
    assert "as stored, without the EXIF orientation" in caplog.text
    if kind in ("polygons", "rle"):
        assert fits(sample, sample["masks"][0])


# endings, letters and forms of names


def semantic_files(name: str, root: Path, image: str, truth: str) -> None:
    """A sample of each reader of classes for every pixel, with these endings."""
    mask = half(8, 12)
    paths = {
        "ade20k": ("images/training/x", "annotations/training/x"),
        "camvid": ("train/images/x", "train/labels/x"),
        "cityscapes": ("leftImg8bit/train/ulm/x_leftImg8bit", "gtFine/train/ulm/x_gtFine_labelIds"),
        "drive": ("train/images/x", "train/labels/x"),
        "folder": ("train/images/x", "train/masks/x"),
        "foreground": ("train/images/x", "train/instances/x"),
        "voc": ("JPEGImages/x", "SegmentationClass/x"),
    }[name]
    save(root / f"{paths[0]}{image}", photo(mask))
    save(root / f"{paths[1]}{truth}", mask + 7 if name == "cityscapes" else mask)
    if name == "drive":
        save(root / f"train/fov/x{truth}", mask * 0 + 1)
    write(root / "classes.txt", "dark\nbright\n")
    write(root / ("ImageSets/Segmentation/train.txt" if name == "voc" else "train.txt"), "x\n")


SEMANTIC = ["ade20k", "camvid", "cityscapes", "drive", "folder", "foreground", "voc"]


@pytest.mark.parametrize("name", SEMANTIC)
@pytest.mark.parametrize(
    "image, truth", [(".PNG", ".gif"), (".bmp", ".tif"), (".webp", ".PNG"), (".Jpeg", ".bmp")]
)
def test_other_endings_are_read(tmp_path: Path, name: str, image: str, truth: str) -> None:
    semantic_files(name, tmp_path, ".png", ".png")
    expected = create_dataset(name, tmp_path, "train")[0]["mask"]
    assert len(expected.unique()) == 2
    for path in list(tmp_path.rglob("*.png")):
        path.unlink()
    semantic_files(name, tmp_path, image, truth)
    sample = create_dataset(name, tmp_path, "train")[0]
    assert torch.equal(sample["mask"], expected)
    assert sample["image"].shape == (3, 8, 12)


@pytest.mark.parametrize("name", SEMANTIC)
def test_two_files_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    semantic_files(name, tmp_path, ".png", ".png")
    semantic_files(name, tmp_path, ".PNG", ".png")
    with pytest.raises(ValueError, match=r"\.png: has the name of .*\.PNG too; keep one of them"):
        create_dataset(name, tmp_path, "train")


@pytest.mark.parametrize("name", SEMANTIC)
def test_a_truth_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    semantic_files(name, tmp_path, ".png", ".png")
    for path in tmp_path.rglob("x*.png"):
        if (
            "image" not in str(path.relative_to(tmp_path)).lower()
            and "left" not in path.name
            and "fov" not in str(path)
        ):
            path.rename(path.with_suffix(".npy"))
    with pytest.raises(
        BadSampleError, match=r"\.png: missing, the partner of .* \(there is .*\.npy\)\. Restore it"
    ):
        create_dataset(name, tmp_path, "train")


@pytest.mark.parametrize("kind", ["boxes", "voc"])
def test_other_endings_of_pictures_with_boxes(tmp_path: Path, kind: str) -> None:
    dataset = boxes_set(kind, tmp_path, 1, 8, 12)
    path = dataset.entries[0].path
    for ending in (".PNG", ".jpg", ".tiff", ".Webp"):
        path.rename(tmp_path / "kept")
        with Image.open(tmp_path / "kept") as picture:
            picture.load()
            picture.save(path.with_suffix(ending))
        name = "coco" if kind == "boxes" else "voc_boxes"
        found = create_dataset(name, tmp_path, "train")
        assert found[0]["image"].shape == (3, 8, 12)
        assert found.entries[0].path == path.with_suffix(ending)
        path.with_suffix(ending).unlink()
        (tmp_path / "kept").rename(path)
    for ending in (".PNG", ".bmp"):
        Image.open(path).save(path.with_suffix(ending))
    path.unlink()
    with pytest.raises(ValueError, match=r"has the name of .* too; keep one"):
        create_dataset(name, tmp_path, "train")


def test_file_names_in_json_may_differ_in_case_and_form(tmp_path: Path) -> None:
    boxes_set("boxes", tmp_path, 1, 8, 12)
    path = tmp_path / "instances_train.json"
    content = json.loads(path.read_text())
    (tmp_path / "train/a.png").rename(tmp_path / f"train/{NFD}.PNG")
    content["images"][0]["file_name"] = f"{NFC.upper()}.png"
    path.write_text(json.dumps(content))
    sample = create_dataset("coco", tmp_path, "train")[0]
    assert (sample["name"], sample["image"].shape) == (NFC.upper(), (3, 8, 12))


def test_label_maps_in_json_may_differ_in_case(tmp_path: Path) -> None:
    truth = half(8, 12)
    panoptic_set(tmp_path, photo(truth), truth, (1, 1))
    (tmp_path / "panoptic_train/a.png").rename(tmp_path / "panoptic_train/a.PNG")
    assert create_dataset("coco_panoptic", tmp_path, "train")[0]["segments"].max() == 2


@pytest.mark.parametrize("name", SEMANTIC)
def test_names_in_another_normal_form_are_one_name(tmp_path: Path, name: str) -> None:
    """As macOS writes an accent (after its letter) and as others do."""
    semantic_files(name, tmp_path, ".png", ".png")
    for path in sorted(tmp_path.rglob("x*.png")):
        form = NFC if "image" in str(path.relative_to(tmp_path)).lower() or "left" in path.name else NFD
        path.rename(path.with_name(form + path.name[1:]))
    for path in tmp_path.rglob("train.txt"):
        path.write_text(NFD + "\n", encoding="utf-8")
    dataset = create_dataset(name, tmp_path, "train")
    assert len(dataset) == 1
    assert unicodedata.normalize("NFC", dataset[0]["name"]) == NFC


def test_names_of_xml_files_in_another_form(tmp_path: Path) -> None:
    boxes_set("voc", tmp_path, 1, 8, 12)
    (tmp_path / "Annotations/a.xml").rename(tmp_path / f"Annotations/{NFD}.XML")
    (tmp_path / "JPEGImages/a.png").rename(tmp_path / f"JPEGImages/{NFD}.png")
    (tmp_path / "ImageSets/Main/train.txt").write_text(NFC, encoding="utf-8")
    assert len(create_dataset("voc_boxes", tmp_path, "train")[0]["boxes"]) == 1


# encodings

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-mark", "utf-16-be-mark", "utf-32"]


def encoded(text: str, encoding: str) -> bytes:
    if encoding.endswith("-mark"):
        return f"\ufeff{text}".encode(encoding.removesuffix("-mark"))
    return text.encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_classes_in_any_form_of_unicode(tmp_path: Path, encoding: str, newline: str) -> None:
    semantic_files("folder", tmp_path, ".png", ".png")
    names = ["fond", "voie ferrée", "道路"]
    (tmp_path / "classes.txt").write_bytes(encoded("".join(name + newline for name in names), encoding))
    assert list(create_dataset("folder", tmp_path, "train").classes) == names


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "shift_jis"])
def test_classes_in_another_encoding_are_named(tmp_path: Path, encoding: str) -> None:
    semantic_files("folder", tmp_path, ".png", ".png")
    text = "fond\n道路\n" if encoding == "shift_jis" else "fond\nvoie ferrée\n"
    (tmp_path / "classes.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"classes\.txt: is not UTF-8 text .*Save it as UTF-8"):
        create_dataset("folder", tmp_path, "train")


@pytest.mark.parametrize("name", ["camvid", "voc", "voc_boxes"])
def test_lists_in_other_encodings(tmp_path: Path, name: str) -> None:
    if name == "voc_boxes":
        boxes_set("voc", tmp_path, 1, 8, 12)
    else:
        semantic_files(name, tmp_path, ".png", ".png")
    (path,) = tmp_path.rglob("train.txt")
    names = path.read_text()
    for encoding in ENCODINGS:
        path.write_bytes(encoded(names, encoding))
        assert len(create_dataset(name, tmp_path, "train")) == 1
    path.write_bytes("é\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"train\.txt: is not UTF-8 text .*Save it as UTF-8"):
        create_dataset(name, tmp_path, "train")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_and_xml_in_any_form_of_unicode(tmp_path: Path, encoding: str) -> None:
    boxes_set("boxes", tmp_path, 1, 8, 12)
    path = tmp_path / "instances_train.json"
    content = path.read_text().replace('"cat"', '"Fußgänger"')
    path.write_bytes(encoded(content, encoding))
    assert create_dataset("coco", tmp_path, "train").classes == ("Fußgänger",)
    if encoding == "utf-32":  # which XML readers need not know
        return
    boxes_set("voc", tmp_path, 1, 8, 12)
    path = tmp_path / "Annotations/a.xml"
    path.write_bytes(encoded(path.read_text().replace("cat", "Fußgänger"), encoding))
    found = create_dataset("voc_boxes", tmp_path, "train", classes=["Fußgänger"])
    assert len(found[0]["labels"]) == 1


def test_json_and_xml_in_a_code_page_are_named_with_the_mend(tmp_path: Path) -> None:
    boxes_set("boxes", tmp_path, 1, 8, 12)
    path = tmp_path / "instances_train.json"
    path.write_bytes(path.read_text().replace('"cat"', '"Fußgänger"').encode("cp1252"))
    with pytest.raises(
        BadSampleError, match=r"instances_train\.json: cannot be read as JSON.*save it as UTF-8"
    ):
        create_dataset("coco", tmp_path, "train")
    boxes_set("voc", tmp_path, 1, 8, 12)
    path = tmp_path / "Annotations/a.xml"
    path.write_bytes(path.read_text().replace("cat", "Fußgänger").encode("cp1252"))
    with pytest.raises(BadSampleError, match=r"a\.xml: cannot be read as XML.*save it as UTF-8"):
        create_dataset("voc_boxes", tmp_path, "train")
    declared = '<?xml version="1.0" encoding="windows-1252"?>' + path.read_bytes().decode("cp1252")
    path.write_bytes(declared.encode("cp1252"))
    assert len(create_dataset("voc_boxes", tmp_path, "train", classes=["Fußgänger"])[0]["labels"]) == 1


# lists of classes


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "lists 0 classes, expected 2 to 255"),
        ("\n \n", "lists 0 classes"),
        ("lesion\n", "lists 1 classes, expected 2 to 255, .*the background is a class too"),
        ("a\nb\na\n", "lists the class 'a' twice"),
    ],
)
def test_lists_of_classes_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    semantic_files("folder", tmp_path, ".png", ".png")
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.txt: {words}"):
        create_dataset("folder", tmp_path, "train")


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    semantic_files("folder", tmp_path, ".png", ".png")
    (tmp_path / "classes.txt").write_text("a\x0bb\x1b[31m 1 2 3\nc\u2028d\n", encoding="utf-8")
    dataset = create_dataset("folder", tmp_path, "train")
    assert dataset.classes == ("a\\x0bb\\x1b[31m", "c\\u2028d")
    assert dataset.palette[0] == (1, 2, 3)
    boxes_set("boxes", tmp_path, 1, 8, 12)
    path = tmp_path / "instances_train.json"
    path.write_text(path.read_text().replace('"cat"', '"c\\u0000\\nt"'))
    assert create_dataset("coco", tmp_path, "train").classes == ("c\\x00\\nt",)


def test_categories_of_one_name_are_told_apart(tmp_path: Path) -> None:
    boxes_set("boxes", tmp_path, 1, 8, 12)
    path = tmp_path / "instances_train.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 0, "name": "cat"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    path.write_text(json.dumps(content))
    assert create_dataset("coco", tmp_path, "train").classes == ("cat (id 0)", "cat (id 1)", "dog")
