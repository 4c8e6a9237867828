"""The synthetic scenes with segments: the same scenes, each thing told apart."""

import json

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from freqfusion.data import SyntheticPanoptic, SyntheticScenes, create_dataset, segments_to_objects
from freqfusion.data.synthetic import _Canvas


def test_form() -> None:
    dataset = create_dataset("synthetic_panoptic", None, "val", length=5, size=(48, 70), seed=3)
    assert len(dataset) == 5
    assert dataset.classes == SyntheticScenes.classes
    assert dataset.palette == SyntheticScenes.palette
    assert [dataset.classes[label] for label in dataset.things] == ["pond", "shard", "ring", "bush", "pole"]
    assert [category.id for category in dataset.categories] == list(range(1, 9))
    assert (dataset.has_masks, dataset.is_panoptic) == (False, True)
    assert (dataset.size(4), dataset.image_id(4), dataset.name(4)) == ((48, 70), 4, "val-000004")
    sample = dataset[-1]
    assert set(sample) == {"image", "name", "image_id", "segments", "labels", "iscrowd"}
    assert (sample["name"], sample["image_id"]) == ("val-000004", 4)
    assert isinstance(sample["segments"], tv_tensors.Mask)
    assert sample["segments"].dtype == torch.int32
    assert sample["labels"].dtype == torch.int64
    assert sample["iscrowd"].dtype == torch.bool
    with pytest.raises(IndexError, match="scene 5 of 5"):
        dataset[5]


@pytest.mark.parametrize("size", [(96, 96), (1, 1), (1, 17), (33, 2), (50, 131)])
@pytest.mark.parametrize("split, seed", [("train", 0), ("val", 5)])
def test_image_and_classes_are_those_of_the_scenes(size: tuple[int, int], split: str, seed: int) -> None:
    scenes = SyntheticScenes(split, length=6, size=size, seed=seed)
    panoptic = SyntheticPanoptic(split, length=6, size=size, seed=seed)
    for scene, sample in zip(scenes, panoptic, strict=True):
        assert torch.equal(sample["image"], scene["image"])
        classes = sample["labels"][sample["segments"].long() - 1]  # no void
        assert torch.equal(classes, scene["mask"].long())
        assert sample["name"] == scene["name"]
        present = sample["segments"].unique().tolist()
        assert present == list(range(1, len(sample["labels"]) + 1))
        assert not sample["iscrowd"].any()


def test_scenes_are_what_they_were_before_they_had_segments() -> None:
    scene = SyntheticScenes("train", length=3, size=(40, 56), seed=11)[2]
    counts = torch.bincount(scene["mask"].flatten().long(), minlength=8)
    before = torch.tensor([1309, 221, 117, 150, 114, 173, 57, 99])
    assert (counts - before).abs().max() <= 2  # rare pixels may differ between processors
    assert scene["image"].long().sum().item() == pytest.approx(706151, rel=1e-3)


def test_stuff_is_one_segment_and_things_are_told_apart() -> None:
    dataset = SyntheticPanoptic("train", length=40)
    several = 0
    for sample in dataset:
        labels = sample["labels"].tolist()
        stuff = [label for label in labels if label not in dataset.things]
        assert stuff == sorted(set(stuff)) == labels[: len(stuff)]  # once each, before the things
        things = labels[len(stuff) :]
        several += len(things) > len(set(things))
        for label in set(things):  # solids come once or twice, poles up to three times
            assert things.count(label) <= (3 if dataset.classes[label] == "pole" else 2)
    assert several > 20


def test_segments_are_what_is_visible_of_each_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[tuple[int, np.ndarray]] = []
    paint = _Canvas._paint

    def record(canvas: _Canvas, label: int, distance: np.ndarray, *axes: np.ndarray) -> None:
        painted.append((label, np.broadcast_to(distance < 0, canvas.size)))
        paint(canvas, label, distance, *axes)

    monkeypatch.setattr(_Canvas, "_paint", record)
    hidden = 0
    dataset = SyntheticPanoptic("val", length=40, size=(40, 50))
    for index in range(len(dataset)):
        painted.clear()
        sample = dataset[index]
        expected = []
        for place, (label, inside) in enumerate(painted):
            covered = np.any([later for _, later in painted[place + 1 :]] or [~inside], axis=0)
            if label in dataset.things and (inside & ~covered).any():
                expected.append((label, inside & ~covered))
            hidden += bool(inside.any() and not (inside & ~covered).any())
        things = [
            (label, sample["segments"].numpy() == number)
            for number, label in enumerate(sample["labels"].tolist(), 1)
            if label in dataset.things
        ]
        assert [label for label, _ in things] == [label for label, _ in expected]
        for (_, found), (_, visible) in zip(things, expected, strict=True):
            np.testing.assert_array_equal(found, visible)
    assert hidden > 0


def test_objects_and_ground_truth() -> None:
    dataset = SyntheticPanoptic("test", length=3, size=(64, 64))
    truth = dataset.ground_truth()
    assert json.loads(json.dumps(truth)) == truth
    assert [image["id"] for image in truth["images"]] == [0, 1, 2]
    assert [entry["id"] for entry in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))
    for index, sample in enumerate(dataset):
        objects = segments_to_objects(sample["segments"], sample["labels"], sample["iscrowd"], dataset.things)
        found = [entry for entry in truth["annotations"] if entry["image_id"] == index]
        assert [entry["category_id"] - 1 for entry in found] == objects["labels"].tolist()
        assert [entry["area"] for entry in found] == objects["masks"].sum((1, 2)).tolist()


def test_wrong_arguments_are_refused_as_by_the_scenes() -> None:
    with pytest.raises(ValueError, match="unknown split 'validation'"):
        SyntheticPanoptic("validation")
    with pytest.raises(ValueError, match="expected two whole numbers of at least 1"):
        SyntheticPanoptic("val", size=(0, 3))
