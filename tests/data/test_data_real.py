"""The readers on real files of the user's.

Set FREQFUSION_TEST_DATA to a folder with ``ade20k_sample``, ``camvid``, ``cityscapes_sample``,
``reader_samples`` and ``voc_sample`` (the data sets' original layouts), and run with ``-m slow``.
"""

import os
from pathlib import Path

import pytest
import torch

from freqfusion.data import create_dataset, read_image, read_mask

pytestmark = pytest.mark.slow


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("FREQFUSION_TEST_DATA")
    if not folder:
        pytest.skip("FREQFUSION_TEST_DATA is not set")
    return Path(folder)


def test_ade20k(data: Path) -> None:
    dataset = create_dataset("ade20k", data / "ade20k_sample", "val")
    labels = [set(sample["mask"].unique().tolist()) for sample in dataset]
    assert labels == [
        {0, 1, 2, 4, 6, 9, 17, 255},
        {0, 1, 2, 4, 13, 17, 255},
        {0, 1, 2, 4, 6, 11, 20, 43, 80, 87, 96, 102, 255},
    ]
    assert dataset[0]["image"].shape == (3, 512, 683)


def test_camvid_shares(data: Path) -> None:
    train, val = (create_dataset("camvid", data / "camvid", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    counts = sum(torch.bincount(sample["mask"].flatten().long(), minlength=256) for sample in val)
    assert isinstance(counts, torch.Tensor)
    percent = (100 * counts / counts.sum())[[*range(11), 255]]
    expected = torch.tensor(
        [9.177, 25.962, 0.564, 28.953, 8.719, 16.336, 0.892, 3.078, 1.746, 0.651, 2.217, 1.703]
    )
    torch.testing.assert_close(percent, expected, atol=6e-4, rtol=0)


def test_cityscapes(data: Path) -> None:
    dataset = create_dataset("cityscapes", data / "cityscapes_sample", "train")
    counts = sum(torch.bincount(sample["mask"].flatten().long(), minlength=256) for sample in dataset)
    assert isinstance(counts, torch.Tensor)
    percent = 100 * counts / counts.sum()
    assert percent[0].item() == pytest.approx(39.919, abs=6e-4)
    assert percent[13].item() == pytest.approx(1.801, abs=6e-4)
    assert percent[18].item() == pytest.approx(0.055, abs=6e-4)


def test_shrunk_cityscapes_agrees_with_its_train_ids(data: Path) -> None:
    root = data / "reader_samples" / "cityscapes"
    sample = create_dataset("cityscapes", root, "val")[0]
    train_ids = root / "gtFine" / "val" / "frankfurt" / f"{sample['name']}_gtFine_labelTrainIds.png"
    # the two label files of this sample were shrunk apart: they differ in 77 scattered pixels of 32768
    assert (sample["mask"].long() == read_mask(train_ids)).float().mean() > 0.997


def test_pascal_voc(data: Path) -> None:
    dataset = create_dataset("voc", data / "voc_sample", "train")
    assert [sample["name"] for sample in dataset] == ["2011_000003", "2011_000006"]
    assert set(dataset[1]["mask"].unique().tolist()) == {0, 9, 15, 18, 255}


def test_greyscale_picture_and_deep_label(data: Path) -> None:
    samples = data / "reader_samples"
    assert read_image(samples / "lip" / "val_images" / "86_185913.jpg").shape == (3, 377, 130)
    assert read_mask(samples / "nyu" / "annotations" / "bookstore_0001d_00001.png").max() > 255
