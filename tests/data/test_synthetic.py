"""Synthetic scenes: reproducible, of any size, and hard in the ways they promise."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from freqfusion.data import SyntheticScenes


def test_sample_form() -> None:
    dataset = SyntheticScenes("train", length=5)
    sample = dataset[3]
    assert len(dataset) == 5
    assert len(dataset.classes) == len(set(dataset.palette)) == 8
    assert sample["name"] == "train-000003"
    assert sample["image"].shape == (3, 96, 96)
    assert sample["mask"].shape == (96, 96)
    assert sample["image"].dtype == sample["mask"].dtype == torch.uint8
    assert sample["mask"].max() < 8
    assert sample["image"].float().std() > 20
    with pytest.raises(IndexError):
        dataset[5]
    assert torch.equal(dataset[-2]["image"], sample["image"])


def test_scene_depends_on_seed_split_and_index_alone() -> None:
    first = SyntheticScenes("train", length=4, seed=7)[2]
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    random.seed(123)
    again = SyntheticScenes("train", length=100, seed=7)
    _ = again[50]
    assert torch.equal(again[2]["image"], first["image"])
    assert torch.equal(again[2]["mask"], first["mask"])
    state = torch.get_rng_state()
    _ = again[3]
    assert torch.equal(torch.get_rng_state(), state), "drawing must not use torch's generator"


def test_other_index_seed_or_split_gives_another_scene() -> None:
    images = [
        SyntheticScenes(split, length=3, seed=seed)[index]["image"].flatten().tolist()
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for index in range(3)
    ]
    assert len({tuple(image) for image in images}) == 18


def test_workers_give_the_same_scenes() -> None:
    dataset = SyntheticScenes("val", length=4, size=(16, 20))
    loaded = [
        batch[0] for batch in DataLoader(dataset, num_workers=2, batch_size=None, collate_fn=lambda x: [x])
    ]
    for index, sample in enumerate(loaded):
        assert torch.equal(sample["image"], dataset[index]["image"])


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (33, 2), (50, 131), (200, 120)])
def test_any_size(size: tuple[int, int]) -> None:
    for sample in SyntheticScenes("train", length=5, size=size):
        assert sample["image"].shape == (3, *size)
        assert sample["mask"].shape == size


def test_every_class_is_common() -> None:
    scenes = [scene["mask"] for scene in SyntheticScenes("train", length=40)]
    present = torch.stack([torch.bincount(mask.flatten().long(), minlength=8) > 0 for mask in scenes])
    assert (present.float().mean(0) > 0.8).all()
    shares = torch.bincount(torch.stack(scenes).flatten().long(), minlength=8) / (40 * 96 * 96)
    assert 0.3 < shares[0] < 0.6
    assert (shares[6:] > 0.01).all()
    assert (shares[6:] < 0.08).all()


def test_poles_and_wires_are_thin() -> None:
    runs = {6: 1, 7: 0}  # the axis along which each is crossed: poles by rows, wires by columns
    for label, axis in runs.items():
        lengths = []
        for scene in SyntheticScenes("train", length=20):
            inside = (scene["mask"].numpy() == label).astype(int)
            inside = inside if axis == 1 else inside.T
            edges = np.diff(np.pad(inside, ((0, 0), (1, 1))), axis=1)
            lengths += (np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]).tolist()
        assert 1 <= np.median(lengths) <= 3
        assert np.mean(np.array(lengths) <= 4) > 0.9


def test_texture_is_strong_inside_classes_and_some_boundaries_are_weak() -> None:
    spreads, contrasts = [], []
    for scene in SyntheticScenes("train", length=40):
        image, mask = scene["image"].float().mean(0), scene["mask"]
        spreads += [image[mask == label].std().item() for label in range(6) if (mask == label).sum() > 50]
        border = mask[:, 1:] != mask[:, :-1]
        contrasts.append((image[:, 1:] - image[:, :-1])[border].abs())
    assert np.mean(spreads) > 12
    assert (torch.cat(contrasts) < 8).float().mean() > 0.1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"split": "validation"}, "unknown split 'validation'; choose one of train, val, test"),
        ({"length": -1}, "length is -1, expected a whole number of at least 0"),
        ({"seed": -2}, "seed is -2, expected"),
        (
            {"size": (0, 5)},
            r"size is \(0, 5\), expected two whole numbers of at least 1",
        ),
    ],
)
def test_wrong_arguments_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SyntheticScenes(**{"split": "train", **options})
