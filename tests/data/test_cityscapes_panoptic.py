"""Cityscapes' instance ids as panoptic segments."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freqfusion.data import BadSampleError, Cityscapes, CityscapesPanoptic

# road, sky, two cars, a group of persons, a bicycle; void: a caravan, the ego vehicle, an unlabelled pixel
IDS = np.array(
    [
        [23, 23, 23, 23, 23, 23],
        [26002, 26002, 24, 24, 26000, 29001],
        [26002, 7, 7, 24, 26000, 29001],
        [1, 1, 7, 7, 0, 33123],
    ],
    np.uint16,
)


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_frame(root: Path, name: str, ids: np.ndarray = IDS, split: str = "train") -> None:
    city = name.partition("_")[0]
    picture = np.full((*ids.shape, 3), 70, np.uint8)
    write(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", picture)
    write(root / f"gtFine/{split}/{city}/{name}_gtFine_instanceIds.png", ids)


def test_sample(tmp_path: Path) -> None:
    for name in ("ulm_000000_000019", "aachen_000000_000019"):
        write_frame(tmp_path, name)
    dataset = CityscapesPanoptic(tmp_path, "train")
    assert dataset.classes == Cityscapes.classes
    assert dataset.palette == Cityscapes.palette
    assert dataset.things == tuple(range(11, 19))
    assert [dataset.categories[label].id for label in (0, 10, 11, 18)] == [7, 23, 24, 33]
    assert (dataset.has_masks, dataset.is_panoptic) == (False, True)
    assert [dataset.name(index) for index in (0, 1)] == ["aachen_000000_000019", "ulm_000000_000019"]
    assert dataset.image_id(0) == "aachen_000000_000019"
    assert dataset.size(0) == (4, 6)
    sample = dataset[0]
    assert set(sample) == {"image", "name", "image_id", "segments", "labels", "iscrowd"}
    assert sample["segments"].dtype == torch.int32
    assert sample["segments"].tolist() == [
        [2, 2, 2, 2, 2, 2],
        [5, 5, 3, 3, 4, 0],
        [5, 1, 1, 3, 4, 0],
        [0, 0, 1, 1, 0, 6],
    ]
    assert [dataset.classes[label] for label in sample["labels"]] == [
        "road",
        "sky",
        "person",
        "car",
        "car",
        "bicycle",
    ]
    assert sample["iscrowd"].tolist() == [False, False, True, False, False, False]


def test_ground_truth(tmp_path: Path) -> None:
    write_frame(tmp_path, "ulm_0_0")
    truth = CityscapesPanoptic(tmp_path, "train").ground_truth()
    assert truth["images"] == [
        {"id": "ulm_0_0", "file_name": "ulm_0_0_leftImg8bit.png", "height": 4, "width": 6}
    ]
    assert [entry["name"] for entry in truth["categories"]] == list(Cityscapes.classes[11:])
    found = [
        (entry["category_id"], entry["bbox"], entry["area"], entry["iscrowd"])
        for entry in truth["annotations"]
    ]
    assert found == [
        (24, [2, 1, 2, 2], 3, 1),
        (26, [4, 1, 1, 2], 2, 0),
        (26, [0, 1, 2, 2], 3, 0),
        (33, [5, 3, 1, 1], 1, 0),
    ]


@pytest.mark.parametrize("value", [34, 999, 34000, 65535])
def test_strange_values_are_named(tmp_path: Path, value: int) -> None:
    ids = IDS.copy()
    ids[0, 0] = value
    write_frame(tmp_path, "ulm_0_0", ids)
    with pytest.raises(
        BadSampleError, match=rf"instanceIds\.png: holds the values {value}, expected label ids from 0"
    ):
        CityscapesPanoptic(tmp_path, "train")[0]


def test_bad_files_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        write_frame(tmp_path, f"ulm_0_{number}", split="val")
    maps, pictures = tmp_path / "gtFine/val/ulm", tmp_path / "leftImg8bit/val/ulm"
    write(maps / "ulm_0_0_gtFine_instanceIds.png", IDS[:, :5])
    dataset = CityscapesPanoptic(tmp_path, "val")
    with pytest.raises(
        BadSampleError, match=r"0_gtFine_instanceIds\.png: is 5x4 pixels, but its picture .* is 6x4"
    ):
        dataset[0]
    broken = pictures / "ulm_0_1_leftImg8bit.png"
    broken.write_bytes(broken.read_bytes()[:20])
    with pytest.raises(BadSampleError, match=r"ulm_0_1_leftImg8bit\.png: cannot be read as a picture"):
        dataset[1]
    broken = maps / "ulm_0_4_gtFine_instanceIds.png"
    kept = broken.read_bytes()
    broken.write_bytes(kept[:20])
    with pytest.raises(BadSampleError, match=r"ulm_0_4_gtFine_instanceIds\.png: cannot be read as a picture"):
        dataset.size(4)
    broken.write_bytes(kept)
    (maps / "ulm_0_2_gtFine_instanceIds.png").unlink()
    with pytest.raises(
        BadSampleError,
        match=r"ulm_0_2_gtFine_instanceIds\.png: missing, the partner of .*ulm_0_2_leftImg8bit",
    ):
        CityscapesPanoptic(tmp_path, "val")
    (pictures / "ulm_0_3_leftImg8bit.png").unlink()
    kept = CityscapesPanoptic(tmp_path, "val", skip_bad=True)
    assert [sample["name"] for sample in kept] == ["ulm_0_4"]
    assert len(caplog.messages) == 4


def test_size_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    write_frame(tmp_path, "ulm_0_0", IDS.T.copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    picture.save(tmp_path / "leftImg8bit/train/ulm/ulm_0_0_leftImg8bit.png", exif=exif)
    dataset = CityscapesPanoptic(tmp_path, "train")
    assert dataset.size(0) == dataset[0]["image"].shape[1:] == (6, 4)


def test_other_splits_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="CityscapesPanoptic has no labelled split 'test'; choose one of train, val"
    ):
        CityscapesPanoptic(tmp_path, "test")
    write_frame(tmp_path, "ulm_0_0")
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit.val: no such folder\. Cityscapes expects ROOT"):
        CityscapesPanoptic(tmp_path, "val")
