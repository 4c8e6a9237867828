"""Detectors of the FreqFusion release and of mmdetection, converted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import freqfusion
from freqfusion import create_model
from freqfusion.models import PanopticFPN
from freqfusion.weights.fill import fill_
from freqfusion.zoo.official import convert_official, read_official
from freqfusion.zoo.official.base import Shapes
from freqfusion.zoo.official.detectors import FAMILY, own_keys
from official_files import key_list

PANOPTIC = {"things": [True] * 80 + [False] * 53}


def empty_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Tensors of these shapes that take no memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    "name, title",
    [
        ("faster_rcnn_r50", "Faster R-CNN, ResNet-50, FreqFusion pyramid, 80 classes"),
        ("mask_rcnn_r101", "Mask R-CNN, ResNet-101, FreqFusion pyramid, 80 classes"),
        ("panoptic_fpn_r50", "Panoptic FPN, ResNet-50, FreqFusion pyramid, 133 classes"),
    ],
)
def test_every_tensor_of_the_release_finds_its_place(name: str, title: str) -> None:
    shapes = key_list(name)
    plan = FAMILY.plan(Shapes({key: tuple(shape) for key, shape in shapes.items()}))
    assert plan.title == title
    for parameter in plan.model.parameters():
        torch.nn.init.ones_(parameter)
    unneeded = fill_(plan.model, empty_state(shapes), plan.title, plan.own_keys, plan.unneeded, plan.kept)
    assert unneeded.total() == 4
    assert not any(parameter.any() for parameter in plan.model.parameters())  # all were filled


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn", "panoptic_fpn"])
@pytest.mark.parametrize("fusion", ["nearest", "freqfusion"])
def test_small_ones_there_and_back(kind: str, fusion: str, tmp_path: Path) -> None:
    """Also plain ones, ResNet-18 and other numbers of classes, through a file."""
    panoptic = {"things": [True] * 3 + [False] * 2} if kind == "panoptic_fpn" else {}
    options = (
        {"fusion_options": {"feature_resample_norm": kind != "panoptic_fpn"}}
        if fusion == "freqfusion"
        else {}
    )
    torch.manual_seed(0)
    model = create_model(
        f"{kind}_r18",
        5 if panoptic else 4,
        fusion,
        top_level="pool" if fusion == "nearest" else "fused",
        channels=64,
        **panoptic,
        **options,
    )
    official = official_names(kind, fusion)
    state = {official[key]: value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    conversion = convert_official(tmp_path / "official.pth", tmp_path / "out")
    assert conversion.tensors == len(state)
    again = freqfusion.from_pretrained(tmp_path / "out")
    assert again.spec.name == f"{kind}_r18"
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert isinstance(again, PanopticFPN) == (kind == "panoptic_fpn")


@pytest.mark.parametrize(
    "kind, options",
    [
        ("faster_rcnn", {"top_level": "pool", "head_channels": 48}),
        ("faster_rcnn", {"channels": 32, "fusion_options": {"feature_resample_group": 8}}),
        ("mask_rcnn", {"fusion_options": {"compressed_channels": 24, "feature_resample_group": 2}}),
        ("panoptic_fpn", {"semantic_channels": 32, "fusion_options": {"feature_resample": False}}),
        ("faster_rcnn", {"fusion_options": {"encoder_kernel": 1, "lowpass_kernel": 3, "highpass_kernel": 5}}),
        ("faster_rcnn", {"fusion_options": {"lowpass_kernel": 7, "use_high_pass": False, "semi_conv": True}}),
        (
            "faster_rcnn",
            {"fusion_options": {"hamming_window": False, "direction_feat": "sim", "up_group": 2}},
        ),
        ("faster_rcnn", {"fusion_options": {"feature_resample_norm": False, "up_group": 4}}),
    ],
)
def test_options_are_told_by_the_shapes(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    things = {"things": [True, True, False]} if kind == "panoptic_fpn" else {}
    options = {"channels": 64, "top_level": "fused", **things, **options}
    torch.manual_seed(0)
    model = create_model(f"{kind}_r18", 3, "freqfusion", **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    names = official_names(kind, "freqfusion", len(model.backbone.fpn.fusions))
    torch.save({names[key]: value for key, value in model.state_dict().items()}, tmp_path / "official.pth")
    again: Any = read_official(tmp_path / "official.pth")[0].model
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    maps = [torch.randn(1, 64 * 2**i, 32 // 2**i, 32 // 2**i) for i in range(4)]
    with torch.no_grad():
        pyramids = [x.backbone.fpn.eval()(maps) for x in (model, again)]
    assert all(torch.equal(one, other) for one, other in zip(*pyramids, strict=True))


def official_names(kind: str, fusion: str, fusions: int = 4) -> dict[str, str]:
    """Ours to the released ones, by the longest key list; the backbone's are the same behind the prefix."""
    names = {own: key for key in key_list("panoptic_fpn_r50") for own in own_keys(key, fusions)}
    names |= {own: key for key in key_list("faster_rcnn_r50") for own in own_keys(key, fusions)}
    torch.manual_seed(0)
    options = {"things": [True, False]} if kind == "panoptic_fpn" else {}
    fused = "fused" if fusion == "freqfusion" else "pool"
    model = create_model(f"{kind}_r18", 2, fusion, top_level=fused, channels=64, **options)
    body = "backbone.body."
    names |= {key: "backbone." + key.removeprefix(body) for key in model.state_dict() if key.startswith(body)}
    return names


def test_a_backbone_that_was_not_published(tmp_path: Path) -> None:
    shapes = {key: shape for key, shape in key_list("faster_rcnn_r50").items() if "layer3.5" not in key}
    torch.save(empty_state(shapes), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"ResNet has \(4, 5\) blocks in the second and third stage"):
        read_official(tmp_path / "other.pth")


def test_a_neck_with_a_level_less(tmp_path: Path) -> None:
    shapes = {key: shape for key, shape in key_list("faster_rcnn_r50").items() if "fpn_convs.4" not in key}
    torch.save(empty_state(shapes), tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"2 missing: backbone\.fpn\.outputs\.4\.weight"):
        read_official(tmp_path / "cut.pth")
