"""The readers, on files in the original layouts that the tests make."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from freqfusion.data import (
    ADE20K,
    DRIVE,
    BadSampleError,
    CamVid,
    Cityscapes,
    ForegroundFolder,
    ImageFolder,
    PascalVOC,
    create_dataset,
)

LABELS = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], np.uint8)


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def picture(seed: int = 0, shape: tuple[int, int] = LABELS.shape) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def make_camvid(root: Path, split: str = "train", count: int = 3) -> Path:
    names = [f"frame_{index}" for index in range(count)]
    for index, name in enumerate(names):
        write(root / split / "images" / f"{name}.png", picture(index))
        write(root / split / "labels" / f"{name}.png", LABELS)
    (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def check_sample(sample: dict[str, Any], labels: list[list[int]], name: str) -> None:
    assert isinstance(sample["image"], tv_tensors.Image)
    assert isinstance(sample["mask"], tv_tensors.Mask)
    assert sample["image"].dtype == sample["mask"].dtype == torch.uint8
    assert sample["image"].shape == (3, len(labels), len(labels[0]))
    assert sample["mask"].tolist() == labels
    assert sample["name"] == name


# ADE20K


@pytest.mark.parametrize("inner", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path: Path, inner: str) -> None:
    stored = np.array([[0, 1], [2, 150]], np.uint8)
    for folder in ("training", "validation"):
        for name in ("b", "a"):
            write(tmp_path / inner / "images" / folder / f"{folder}_{name}.jpg", picture(shape=(2, 2)))
            write(tmp_path / inner / "annotations" / folder / f"{folder}_{name}.png", stored)
    dataset = ADE20K(tmp_path, "val")
    assert len(dataset) == 2
    check_sample(dataset[0], [[255, 0], [1, 149]], "validation_a")
    check_sample(ADE20K(tmp_path, "train")[1], [[255, 0], [1, 149]], "training_b")


def test_ade20k_classes() -> None:
    assert len(ADE20K.classes) == len(ADE20K.palette) == len(set(ADE20K.palette)) == 150
    assert (ADE20K.classes[0], ADE20K.classes[12], ADE20K.classes[149]) == ("wall", "person", "flag")
    assert (0, 0, 0) not in ADE20K.palette


def test_ade20k_has_no_labelled_test_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ADE20K has no labelled split 'test'; choose one of train, val"):
        ADE20K(tmp_path, "test")


# Cityscapes


def test_cityscapes(tmp_path: Path) -> None:
    stored = np.arange(34, dtype=np.uint8).reshape(2, 17)
    for city in ("ulm", "aachen"):
        frame = f"{city}_000000_000019"
        write(tmp_path / "leftImg8bit/train" / city / f"{frame}_leftImg8bit.png", picture(shape=(2, 17)))
        write(tmp_path / "gtFine/train" / city / f"{frame}_gtFine_labelIds.png", stored)
        write(tmp_path / "gtFine/train" / city / f"{frame}_gtFine_color.png", picture(shape=(2, 17)))
    dataset = Cityscapes(tmp_path, "train")
    assert [dataset[index]["name"] for index in range(2)] == ["aachen_000000_000019", "ulm_000000_000019"]
    row_0 = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255]
    row_1 = [5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18]
    check_sample(dataset[0], [row_0, row_1], "aachen_000000_000019")
    assert len(dataset.classes) == len(set(dataset.palette)) == 19
    assert dataset.classes[13] == "car"
    assert dataset.palette[13] == (0, 0, 142)


def test_cityscapes_label_without_picture(tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit/val").mkdir(parents=True)
    write(tmp_path / "gtFine/val/ulm/ulm_0_0_gtFine_labelIds.png", LABELS)
    with pytest.raises(
        BadSampleError, match=r"ulm_0_0_leftImg8bit\.png: missing, the partner of .*labelIds\.png"
    ):
        Cityscapes(tmp_path, "val")


# DRIVE

VIEW = np.array([[0, 255, 255], [255, 255, 0]], np.uint8)
VESSELS = np.array([[255, 255, 0], [0, 255, 255]], np.uint8)
DRIVE_LABELS = [[255, 1, 0], [0, 1, 255]]


def write_drive(root: Path, original: bool) -> Path:
    for part, names in (("train", ("21", "22")), ("test", ("01",))):
        for name in names:
            if original:
                folder = root / {"train": "training"}.get(part, part)
                kind = "training" if part == "train" else "test"
                write(folder / "images" / f"{name}_{kind}.tif", picture(shape=VIEW.shape))
                write(folder / "1st_manual" / f"{name}_manual1.gif", VESSELS)
                write(folder / "mask" / f"{name}_{kind}_mask.gif", VIEW)
            else:
                write(root / part / "images" / f"{name}.jpg", picture(shape=VIEW.shape))
                write(root / part / "labels" / f"{name}.png", VESSELS // 255)
                write(root / part / "fov" / f"{name}.png", VIEW // 255)
    return root


@pytest.mark.parametrize("original", [True, False])
def test_drive(tmp_path: Path, original: bool) -> None:
    root = write_drive(tmp_path, original)
    train = DRIVE(root, "train")
    assert len(train) == 2
    check_sample(train[1], DRIVE_LABELS, "22")
    for split in ("val", "test"):
        check_sample(create_dataset("drive", root, split)[0], DRIVE_LABELS, "01")
    whole = DRIVE(root, "test", field_of_view=False)
    check_sample(whole[0], (VESSELS // 255).tolist(), "01")


def test_drive_goes_by_colours_of_palettes(tmp_path: Path) -> None:
    """Whether black or white is at index 0 is up to the program that wrote the file."""
    root = write_drive(tmp_path, original=True)
    for path, array in (
        ("training/1st_manual/21_manual1.gif", VESSELS),
        ("training/mask/21_training_mask.gif", VIEW),
    ):
        for first in (0, 1):
            indexed = Image.fromarray(((array > 0) ^ first).astype(np.uint8)).convert("P")
            indexed.putpalette([255 * first] * 3 + [255 - 255 * first] * 3)
            indexed.save(root / path, optimize=False)
            assert sorted(np.unique(np.asarray(Image.open(root / path)))) == [0, 1]
            check_sample(DRIVE(root, "train")[0], DRIVE_LABELS, "21")


def test_drive_with_broken_fields_of_view(tmp_path: Path) -> None:
    root = write_drive(tmp_path, original=False)
    write(root / "train" / "fov" / "21.png", VIEW[:1])
    with pytest.raises(BadSampleError, match=r"fov.21\.png: is 3x1 pixels, but the labels .*21\.png are 3x2"):
        DRIVE(root, "train")[0]
    (root / "test" / "fov" / "01.png").unlink()
    with pytest.raises(BadSampleError, match=r"fov/01\.png: missing"):
        DRIVE(root, "test")
    assert len(DRIVE(root, "test", field_of_view=False)) == 1


# Pascal VOC


@pytest.mark.parametrize("inner", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_pascal_voc(tmp_path: Path, inner: str) -> None:
    top = tmp_path / inner
    labels = Image.fromarray(np.array([[0, 20, 255]], np.uint8), "L")
    labels.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    for name in ("2007_000032", "2007_000039"):
        write(top / "JPEGImages" / f"{name}.jpg", picture(shape=(1, 3)))
        (top / "SegmentationClass").mkdir(exist_ok=True)
        labels.save(top / "SegmentationClass" / f"{name}.png")
    (top / "ImageSets/Segmentation").mkdir(parents=True)
    (top / "ImageSets/Segmentation/val.txt").write_text("2007_000039\n\n")
    dataset = PascalVOC(tmp_path, "val")
    assert len(dataset) == 1
    check_sample(dataset[0], [[0, 20, 255]], "2007_000039")
    assert len(dataset.classes) == len(set(dataset.palette)) == 21
    assert dataset.palette[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    with pytest.raises(
        FileNotFoundError, match=r"train\.txt: no such file\. Pascal VOC expects ROOT/ImageSets"
    ):
        PascalVOC(tmp_path, "train")
    write(tmp_path / "secret.jpg", picture(shape=(1, 3)))
    for name in ("../../secret", str(tmp_path.resolve() / "secret")):
        (top / "ImageSets/Segmentation/train.txt").write_text(name)
        with pytest.raises(
            ValueError, match="secret' is listed as a sample, expected the name of a file below"
        ):
            PascalVOC(tmp_path, "train")


# CamVid


def test_camvid(tmp_path: Path) -> None:
    dataset = CamVid(make_camvid(tmp_path), "train")
    assert len(dataset) == 3
    check_sample(dataset[1], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 255]], "frame_1")
    np.testing.assert_array_equal(dataset[1]["image"].permute(1, 2, 0), picture(1))
    assert torch.equal(dataset[-1]["image"], dataset[2]["image"])
    with pytest.raises(IndexError):
        dataset[3]
    assert len(list(dataset)) == 3  # iteration ends
    assert len(dataset.classes) == len(set(dataset.palette)) == 11


def test_camvid_takes_the_list_in_its_order_and_jpeg(tmp_path: Path) -> None:
    root = make_camvid(tmp_path, "val")
    (root / "val/images/frame_0.png").rename(root / "val/images/kept.bak")
    write(root / "val/images/frame_0.jpg", picture())
    (root / "val.txt").write_bytes(b"\xef\xbb\xbfframe_2\r\nframe_0\r\n")  # as Windows editors write it
    dataset = CamVid(root, "val")
    assert [sample["name"] for sample in dataset] == ["frame_2", "frame_0"]


def test_camvid_as_the_segnet_authors_publish_it(tmp_path: Path) -> None:
    write(tmp_path / "test/0001TP_1.png", picture())
    write(tmp_path / "testannot/0001TP_1.png", LABELS)
    (tmp_path / "test.txt").write_text(
        "/SegNet/CamVid/test/0001TP_1.png /SegNet/CamVid/testannot/0001TP_1.png\n"
    )
    check_sample(CamVid(tmp_path, "test")[0], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 255]], "0001TP_1")


# a folder of one's own


def make_folder(root: Path, split: str = "train") -> Path:
    for name in ("b", "a"):
        write(root / split / "images" / f"{name}.jpg", picture(shape=(2, 2)))
        write(root / split / "masks" / f"{name}.png", np.array([[0, 1], [2, 255]], np.uint8))
    (root / "classes.txt").write_text("sky\ntraffic light 250 170 30\n\nroad 2\n")
    return root


def test_image_folder(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "train/images/notes.txt").write_text("no picture")
    (root / "train/images/.DS_Store.png").write_text("no picture either")
    dataset = ImageFolder(root, "train")
    assert dataset.classes == ("sky", "traffic light", "road 2")
    assert dataset.palette == ((0, 0, 0), (250, 170, 30), (0, 128, 0))
    assert len(dataset) == 2
    check_sample(dataset[0], [[0, 1], [2, 255]], "a")


def test_image_folder_without_splits_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path, split=".")
    assert len(ImageFolder(root, "val")) == 2
    assert "the split 'val' is all of" in caplog.text


def test_image_folder_problems_are_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"test.images: no such folder\. A folder dataset expects"):
        ImageFolder(root, "test")
    write(root / "train/images/a.png", picture())
    with pytest.raises(ValueError, match=r"a\.png: has the name of .*a\.jpg too"):
        ImageFolder(root, "train")
    (root / "classes.txt").write_text("sky 1 2 300")
    with pytest.raises(ValueError, match=r"classes\.txt: the colour in 'sky 1 2 300'"):
        ImageFolder(root, "train")
    (root / "classes.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists 0 classes"):
        ImageFolder(root, "train")
    (root / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes\.txt: no such file\. A folder dataset expects"):
        ImageFolder(root, "train")


# objects as foreground


def test_foreground(tmp_path: Path) -> None:
    objects = np.array([[0, 1, 1, 0], [0, 0, 700, 700], [3, 0, 0, 65535]], np.uint16)
    write(tmp_path / "val" / "images" / "b.png", picture())
    write(tmp_path / "val" / "images" / "a.png", picture(1))
    (tmp_path / "val" / "images" / "notes.txt").write_text("not an image")
    for name in "ab":
        write(tmp_path / "val" / "instances" / f"{name}.png", objects)
    dataset = ForegroundFolder(tmp_path, "val", foreground="nucleus")
    assert (len(dataset), dataset.classes) == (2, ("background", "nucleus"))
    check_sample(dataset[0], (objects > 0).astype(int).tolist(), "a")
    (tmp_path / "val" / "instances" / "b.png").unlink()
    with pytest.raises(BadSampleError, match=r"b\.png: missing"):
        ForegroundFolder(tmp_path, "val")


# what is missing or bad


@pytest.mark.parametrize("name", ["ade20k", "camvid", "cityscapes", "folder", "foreground", "voc"])
def test_missing_root_and_split_name_the_layout(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder\. .*expects.*ROOT"):
        create_dataset(name, tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"expects.*ROOT"):
        create_dataset(name, tmp_path, "train")
    with pytest.raises(ValueError, match="no labelled split 'training'"):
        create_dataset(name, make_folder(tmp_path), "training")


def test_empty_split_is_named(tmp_path: Path) -> None:
    for folder in ("images", "annotations"):
        (tmp_path / folder / "training").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no sample of the split 'train' in it"):
        ADE20K(tmp_path, "train")


def remove_mask(root: Path, split: str) -> None:
    (root / split / "labels/frame_1.png").unlink()


def remove_image(root: Path, split: str) -> None:
    (root / split / "images/frame_1.png").unlink()


def truncate_image(root: Path, split: str) -> None:
    path = root / split / "images/frame_1.png"
    path.write_bytes(path.read_bytes()[:60])


def truncate_mask(root: Path, split: str) -> None:
    path = root / split / "labels/frame_1.png"
    path.write_bytes(path.read_bytes()[:50])


def shrink_mask(root: Path, split: str) -> None:
    write(root / split / "labels/frame_1.png", LABELS[:, :3])


def mislabel(root: Path, split: str) -> None:
    write(root / split / "labels/frame_1.png", np.where(LABELS == 11, 40, LABELS * 2))


def mislabel_deeply(root: Path, split: str) -> None:
    write(root / split / "labels/frame_1.png", LABELS.astype(np.uint16) + 256)


def colour_mask(root: Path, split: str) -> None:
    write(root / split / "labels/frame_1.png", picture())


DAMAGES = {
    remove_mask: r"labels.frame_1\.png: missing, the partner of .*images.*Restore it.*--skip-bad",
    remove_image: r"images.frame_1\.png: missing, the partner of .*labels.*Restore it.*--skip-bad",
    truncate_image: r"images.frame_1\.png: cannot be read as a picture.*replace it",
    truncate_mask: r"labels.frame_1\.png: cannot be read as a picture.*replace it",
    shrink_mask: r"labels.frame_1\.png: is 3x3 pixels, but its picture .*frame_1\.png is 4x3\. Give them one size",
    mislabel: r"labels.frame_1\.png: holds the label values 12, 14, 16, 18, 20, 40, but CamVid has only 0\.\.11",
    mislabel_deeply: r"labels.frame_1\.png: holds the label values 256\.\.267, but CamVid has only 0\.\.11",
    colour_mask: r"labels.frame_1\.png: is a picture of mode RGB, expected one class index per pixel",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_file_is_named_with_the_mend(tmp_path: Path, damage: Callable[[Path, str], None]) -> None:
    root = make_camvid(tmp_path)
    damage(root, "train")
    with pytest.raises(BadSampleError, match=DAMAGES[damage]):
        list(CamVid(root, "train"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_skip_bad_leaves_out_of_scored_splits(
    tmp_path: Path, damage: Callable[[Path, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_camvid(tmp_path, "val")
    damage(root, "val")
    dataset = CamVid(root, "val", skip_bad=True)
    assert [sample["name"] for sample in dataset] == ["frame_0", "frame_2"]
    assert caplog.text.count("left out the sample frame_1") == 1
    assert "frame_1.png" in caplog.text


@pytest.mark.parametrize("damage", [truncate_image, mislabel])
def test_skip_bad_replaces_in_training_and_says_so_once(
    tmp_path: Path, damage: Callable[[Path, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_camvid(tmp_path)
    damage(root, "train")
    dataset = CamVid(root, "train", skip_bad=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [sample["name"] for sample in dataset] == ["frame_0", "frame_2", "frame_2"]
    assert caplog.text.count("left out the sample frame_1") == 1


def test_skip_bad_with_nothing_good_fails(tmp_path: Path) -> None:
    root = make_camvid(tmp_path, count=1)
    write(root / "train/labels/frame_0.png", LABELS[:2])
    dataset = CamVid(root, "train", skip_bad=True)
    with pytest.raises(BadSampleError, match="none of the 1 samples can be read"):
        dataset[0]
    (root / "train/labels/frame_0.png").unlink()
    with pytest.raises(BadSampleError, match="none of the 1 samples of the split 'train' can be used"):
        CamVid(root, "train", skip_bad=True)
