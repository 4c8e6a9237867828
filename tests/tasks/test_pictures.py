"""Image, truth and prediction side by side, of every task."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny_features
from freqfusion.features import catalog
from freqfusion.tasks import DetectionModule, ObjectData, SegmentationData, SegmentationModule
from freqfusion.tasks.pictures import GAP, draw_side_by_side, draw_truth, image_bytes, read_sample
from tiny_objects import SMALL_DETECTOR, tiny_detection, write_coco, write_panoptic
from tiny_training import tiny_data


def thirds(module: Any, data: Any, sample: dict[str, Any]) -> list[Any]:
    with torch.no_grad():
        picture = draw_side_by_side(module.eval(), data, sample)
    width = (picture.shape[1] - 2 * GAP) // 3
    first, gap, second, other, third = np.split(picture, np.cumsum([width, GAP, width, GAP]), axis=1)
    assert gap.min() == other.min() == 255
    assert third.shape[1] == width
    return [first, second, third]


def check(module: Any, data: Any, split: str = "train") -> None:
    """Of a landscape and a portrait image."""
    for index in (0, 1):
        sample = read_sample(data, split, index)
        image, truth, found = thirds(module, data, sample)
        assert (image == image_bytes(sample["image"])).all()
        assert (truth == draw_truth(data, sample)).all()
        assert found.shape == truth.shape


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_semantic(dtype: torch.dtype) -> None:
    data = tiny_data()
    module = SegmentationModule("plain", num_classes=data.num_classes).to(dtype)
    check(module, data, "val")
    sample = read_sample(data, "val", 3)
    labels = sample["mask"].as_subclass(torch.Tensor).long().clamp(max=data.num_classes - 1)
    module.predict = lambda image: F.one_hot(labels).permute(2, 0, 1)[None]
    _, truth, found = thirds(module, data, sample)
    judged = sample["mask"].numpy() != 255
    assert (found[judged] == truth[judged]).all()
    module.predict = lambda image: F.one_hot(labels).permute(2, 0, 1)[None].flip(1)
    assert (thirds(module, data, sample)[2] != truth).any()


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("size, shape", [((300, 1023), (150, 512)), ((1200, 5), (512, 2)), ((1, 1), (1, 1))])
def test_large_images_are_reduced(size: tuple[int, int], shape: tuple[int, int]) -> None:
    data = SegmentationData("synthetic", dataset_options={"length": 2, "size": size})
    module = SegmentationModule("plain", num_classes=data.num_classes)
    assert thirds(module, data, read_sample(data, "val", 1))[0].shape == (*shape, 3)


def test_instances(tmp_path: Path) -> None:
    module, data = tiny_detection(write_coco(tmp_path))
    check(module, data)
    sample = read_sample(data, "train", 0)
    found = {key: sample[key] for key in ("boxes", "labels")} | {"masks": sample["masks"][:, None].float()}
    scores = torch.ones(len(sample["labels"]))
    shown = {}
    for name, value in {"sure": 0.5, "unsure": 0.49, "lost": float("nan")}.items():
        module.forward = lambda images, value=value: [{**found, "scores": scores * value}]
        shown[name] = thirds(module, data, sample)[2]
    image = image_bytes(sample["image"])
    assert (shown["unsure"] == image).all()
    assert (shown["lost"] == image).all()
    assert (shown["sure"] != image).any()


def test_panoptic(tmp_path: Path) -> None:
    root = str(write_panoptic(tmp_path))
    data = ObjectData("coco_panoptic", root=root, val_split="train", workers=0)
    module = DetectionModule(
        "panoptic_fpn_r18",
        num_classes=data.num_classes,
        things=data.things,
        network_options=SMALL_DETECTOR,
    )
    check(module, data)
    sample = read_sample(data, "train", 1)
    found = {"segments": sample["segments"], "segment_labels": sample["labels"]}
    module.forward = lambda images: [found]  # type: ignore[method-assign,assignment]
    _, truth, drawn = thirds(module, data, sample)
    assert (truth == drawn).all()


@pytest.mark.parametrize("output", ["panoptic", "instance"])
def test_masks(tmp_path: Path, output: str) -> None:
    pytest.importorskip("transformers")
    from tiny_masks import mask_module, object_data

    data = object_data(write_panoptic(tmp_path))
    check(mask_module(data, output=output), data)


def test_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along the principal components of the target: colours are the same where the features are."""
    monkeypatch.setitem(catalog._METHODS, "plain", tiny_features.UPSAMPLERS["plain"])
    data = tiny_features.tiny_data()
    module = tiny_features.tiny_module(tiny_features.encoder_weights(tmp_path), "plain")
    sample = read_sample(data, "val", 0)
    image, target, found = thirds(module, data, sample)
    assert (image == image_bytes(sample["image"])).all()
    assert image.shape == (64, 96, 3)
    blocks = target.reshape(4, 16, 6, 16, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()  # a colour per patch
    assert [*target.min((0, 1)), *target.max((0, 1))] == [0, 0, 0, 255, 255, 255]
    assert (found != target).any()
    first, second = torch.rand(2, 1, 5, 4, 6)
    for pair in ((first, first), (first[:, :2], first[:, :2])):  # fewer channels than colours
        monkeypatch.setattr(module, "upsample_image", lambda x, pair=pair: pair)
        _, target, found = thirds(module, data, sample)
        assert (found == target).all()
    monkeypatch.setattr(module, "upsample_image", lambda x: (second, first))
    assert (thirds(module, data, sample)[2] != target).any()
