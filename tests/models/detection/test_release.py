"""The detectors beside numbers made with the released code."""

import json
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from freqfusion import create_model
from freqfusion.decoders import FPN
from freqfusion.models.detection import RCNN
from freqfusion.zoo.official import read_official
from freqfusion.zoo.official.detectors import own_keys
from support import GOLDEN, assert_close, fill_by_rule, load_golden, value_by_rule

COCO_THINGS = [True] * 80 + [False] * 53


def create_released(name: str) -> RCNN:
    """A network with the options of the release."""
    panoptic = name.startswith("panoptic")
    return create_model(
        name,
        133 if panoptic else 80,
        top_level="fused",
        things=COCO_THINGS if panoptic else None,
        fusion_options={"feature_resample_norm": False} if panoptic else None,
    )


def released_keys(name: str) -> dict[str, list[int]]:
    keys: dict[str, list[int]] = json.loads((GOLDEN / f"keys_{name}.json").read_text())
    return keys


def own_names(keys: Any) -> dict[str, str]:
    """Ours to the released name; the offset generator's constant start positions are no entry of ours."""
    return {name: key for key in keys if not key.endswith("init_pos") for name in own_keys(key)}


@pytest.mark.parametrize(
    "name, parameters",
    [("faster_rcnn_r50", 47480744), ("mask_rcnn_r101", 69116152), ("panoptic_fpn_r50", 51753774)],
)
def test_every_released_entry_has_its_place(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = create_released(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert json.loads((GOLDEN / "param_counts.json").read_text())[name]["params"] == parameters
    released = released_keys(name)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == {ours: released[theirs] for ours, theirs in own_names(released).items()}
    assert len(own_names(released)) == len(released) - 4


@pytest.mark.parametrize(
    "name, classes, parameters",
    [
        ("faster_rcnn_r50", 80, 41753056),
        ("mask_rcnn_r101", 80, 63388464),
        ("panoptic_fpn_r50", 133, 46027110),
    ],
)
def test_parameters_of_the_paper(name: str, classes: int, parameters: int) -> None:
    """The plain models have the published counts, and three FreqFusion modules add 0.3 M, as the paper says."""
    things = COCO_THINGS if classes == 133 else None
    counts = {}
    for fusion in ("nearest", "freqfusion"):
        options = {"feature_resample_norm": False} if fusion == "freqfusion" else None
        with torch.device("meta"):
            model = create_model(name, classes, fusion, things=things, fusion_options=options)
        counts[fusion] = sum(p.numel() for p in model.parameters())
    assert counts["nearest"] == parameters
    assert json.loads((GOLDEN / "param_counts.json").read_text())[name]["plain_params"] == parameters
    assert counts["freqfusion"] - counts["nearest"] == 3 * 104434


@pytest.mark.parametrize("case", ["small_r50style", "small_panopticstyle", "real_r50"])
def test_pyramid(case: str) -> None:
    meta, arrays = load_golden(f"fpn_a_{case}")
    options = meta["kwargs"]
    fpn = FPN(
        options["in_channels"],
        options["out_channels"],
        "freqfusion",
        {
            "compressed_channels": options["out_channels"] // 4,
            "feature_resample_norm": options.get("feature_resample_norm", True),
        },
        top_level="fused",
    ).double()
    assert sum(p.numel() for p in fpn.parameters()) == meta["n_params"]
    names = {key: _released_neck_name(key).removeprefix("neck.") for key in fpn.state_dict()}
    fill_by_rule(fpn, names)
    maps = [arrays[f"in/{i}"].requires_grad_() for i in range(4)]
    outputs = fpn(maps)
    assert len(outputs) == 5
    for i, output in enumerate(outputs):
        assert_close(f"level {i}", output, arrays[f"out/{i}"], 1e-9)
    if "cot/0" not in arrays:
        return
    sum((x * arrays[f"cot/{i}"]).sum() for i, x in enumerate(outputs)).backward()
    for i, x in enumerate(maps):
        assert x.grad is not None
        assert_close(f"gradient of map {i}", x.grad, arrays[f"grad/in/{i}"], 1e-9)
    for key, parameter in fpn.named_parameters():
        norm, total = arrays[f"gradnorm/{names[key]}"]
        assert parameter.grad is not None
        assert abs(parameter.grad.norm() - norm) <= 1e-9 * norm, key
        assert abs(parameter.grad.sum() - total) <= 1e-8 * norm, key


def _released_neck_name(key: str) -> str:
    return _neck_names()[f"backbone.fpn.{key}"]


@cache
def _neck_names() -> dict[str, str]:
    return own_names(key for key in released_keys("faster_rcnn_r50") if key.startswith("neck."))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> RCNN:
    """Faster R-CNN out of an official file with the golden weights, in float64."""
    meta, _ = load_golden("det_a_faster_rcnn_r50")
    constants = create_released("faster_rcnn_r50").state_dict()
    state: dict[str, Tensor] = {}
    for key, shape in released_keys("faster_rcnn_r50").items():
        value = value_by_rule(key, shape)
        if value is None:  # windows and counters stay as constructed; positions have no place in ours
            (name,) = own_keys(key)
            value = constants.get(name, torch.zeros(shape))
        state[key] = value * meta["gains"].get(key, 1)
    path = tmp_path_factory.mktemp("official") / "faster_rcnn_r50_freqfusion.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, path)
    model = read_official(path)[0].model
    path.unlink()
    assert isinstance(model, RCNN)
    return model


def test_whole_detector(converted: RCNN) -> None:
    """Pyramid, proposal maps, proposals, box head and detections of a Faster R-CNN with ResNet-50."""
    model: Any = converted
    _, arrays = load_golden("det_a_faster_rcnn_r50")
    image = arrays["in/img"]
    size = (image.shape[-2], image.shape[-1])
    with torch.no_grad():
        stages = model.backbone.body(image)
        for i, stage in enumerate(stages):
            assert_close(f"stage {i}", stage.mean((0, 2, 3)), arrays[f"out/backbone_channel_mean/{i}"], 1e-9)
            std = stage.std((0, 2, 3))
            assert_close(f"stage {i}", std, arrays[f"out/backbone_channel_std/{i}"], 1e-9)
        pyramid = model.backbone(image)
        for i, level in enumerate(pyramid.values()):
            assert_close(f"level {i}", level, arrays[f"out/pyramid/{i}"], 1e-6)
        scores, changes = model.rpn.head(list(pyramid.values()))
        for i in range(5):
            assert_close(f"scores {i}", scores[i], arrays[f"out/rpn_cls/{i}"], 1e-8)
            assert_close(f"box changes {i}", changes[i], arrays[f"out/rpn_bbox/{i}"], 1e-8)

        batch = model.transform.batch_images([image[0]], 64)
        assert torch.equal(batch, image)
        proposals, _ = model.rpn(ImageList(batch, [size]), pyramid)
        expected = arrays["out/proposals"]
        assert proposals[0].shape == (1000, 4)
        assert float((proposals[0] - expected[:, :4]).abs().max()) <= 1e-5  # pixels; both best first

        class_scores, box_changes = model.roi_heads.classify(pyramid, [expected[:200, :4]])
        assert_close("class scores", class_scores.roll(-1, 1), arrays["out/roi_cls_score"], 1e-5)
        assert_close("box changes", box_changes[:100, 4:44], arrays["out/roi_bbox_pred"], 1e-5)

        detections, _ = model.roi_heads(pyramid, proposals, [size])
        found, expected = detections[0], arrays["out/det_bboxes"]
        assert found["boxes"].shape == (100, 4)
        order, truth = found["scores"].argsort(descending=True), expected[:, 4].argsort(descending=True)
        assert_close("scores", found["scores"][order], expected[truth, 4], 1e-7)
        assert torch.equal(found["labels"][order] - 1, arrays["out/det_labels"][truth])
        assert float((found["boxes"][order] - expected[truth, :4]).abs().max()) <= 1e-5


def test_single_precision_finds_the_same(converted: RCNN) -> None:
    """Float32 moves boxes by less than a thousandth of a pixel and changes no label."""
    _, arrays = load_golden("det_a_faster_rcnn_r50")
    image = arrays["in/img"].float()
    size = (image.shape[-2], image.shape[-1])
    model: Any = deepcopy(converted).float()
    with torch.no_grad():
        pyramid = model.backbone(image)
        proposals, _ = model.rpn(ImageList(image, [size]), pyramid)
        detections, _ = model.roi_heads(pyramid, proposals, [size])
    expected, labels = arrays["out/det_bboxes"], arrays["out/det_labels"]
    order, truth = detections[0]["scores"].argsort(descending=True), expected[:, 4].argsort(descending=True)
    assert torch.equal(detections[0]["labels"][order] - 1, labels[truth])
    assert float((detections[0]["boxes"][order] - expected[truth, :4]).abs().max()) < 1e-3
