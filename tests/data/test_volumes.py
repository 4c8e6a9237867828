"""Synthetic volumes: reproducible, of any size, with thin vessels."""

import pytest
import torch
from torch.nn.functional import max_pool3d

from freqfusion.data import SyntheticVolumes


def test_sample_form() -> None:
    dataset = SyntheticVolumes("train", length=5, size=(7, 16, 21))
    sample = dataset[3]
    assert len(dataset) == 5
    assert sample["name"] == "train-000003"
    assert sample["image"].shape == (1, 7, 16, 21)
    assert sample["image"].dtype == torch.float32
    assert sample["mask"].shape == (7, 16, 21)
    assert sample["mask"].dtype == torch.uint8
    with pytest.raises(IndexError):
        dataset[5]
    assert torch.equal(dataset[-2]["image"], sample["image"])


def test_volume_depends_on_seed_split_and_index_alone() -> None:
    first = SyntheticVolumes("train", length=4, size=(8, 8, 8), seed=7)[2]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = SyntheticVolumes("train", length=9, size=(8, 8, 8), seed=7)
    _ = again[5]
    assert torch.equal(again[2]["image"], first["image"])
    assert torch.equal(again[2]["mask"], first["mask"])
    assert torch.equal(torch.get_rng_state(), state)
    others = [
        SyntheticVolumes(split, length=2, size=(8, 8, 8), seed=seed)[index]["image"]
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for index in range(2)
    ]
    assert len({tuple(image.flatten().tolist()) for image in others}) == 12


def test_contents() -> None:
    """All classes; vessels and blobs are brighter than the ground; vessels vanish in an erosion, blobs stay."""
    samples = [SyntheticVolumes("val", length=6)[index] for index in range(6)]
    image = torch.stack([sample["image"][0] for sample in samples])
    mask = torch.stack([sample["mask"] for sample in samples])
    ground, vessel, blob = (image[mask == label].mean() for label in range(3))
    assert ground < blob < vessel
    for label, most, least in ((1, 0.1, 0.0), (2, 1.0, 0.15)):
        outside = (mask != label).float()[:, None]
        left = (max_pool3d(outside, 3, stride=1, padding=1) == 0).float().sum() / (outside == 0).sum()
        assert least <= left <= most


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 9, 2)])
def test_smallest_sizes(size: tuple[int, int, int]) -> None:
    sample = SyntheticVolumes("test", size=size)[0]
    assert sample["mask"].shape == size
    assert bool(torch.isfinite(sample["image"]).all())


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="unknown split 'tset'; choose one of train, val, test"):
        SyntheticVolumes("tset")
    with pytest.raises(ValueError, match=r"size must be \(depth, height, width\), got \(8, 8\)"):
        SyntheticVolumes("val", size=(8, 8))
    with pytest.raises(ValueError, match=r"size\[1\] must be at least 1, got 0"):
        SyntheticVolumes("val", size=(8, 0, 8))
    with pytest.raises(ValueError, match="length is -1, expected"):
        SyntheticVolumes("val", length=-1)
