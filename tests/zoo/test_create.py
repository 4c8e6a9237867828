"""The one entrance: names, weights to start from, contracts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freqfusion import create_model, from_pretrained, list_models, save_pretrained
from freqfusion.models import ObjectInference, ObjectModel, PixelModel
from freqfusion.zoo import ModelSpec

IMAGE = torch.linspace(-1, 1, 3 * 37 * 45).reshape(1, 3, 37, 45)
SMALL = {"channels": 32, "head_channels": 32, "min_size": 64, "max_size": 96}


def shaken(model: Any) -> Any:
    """With other weights than fresh ones, so that what is not loaded shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    own, theirs = one.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in own.items())


def test_a_line_of_text_makes_the_same_network() -> None:
    model = create_model("fpn_small?channels=16", 3, "carafe")
    again = create_model(str(model.spec))
    assert (
        again.spec
        == model.spec
        == ModelSpec("fpn_small", {"num_classes": 3, "fusion": "carafe", "channels": 16})
    )
    assert {key: x.shape for key, x in again.state_dict().items()} == {
        key: x.shape for key, x in model.state_dict().items()
    }


def test_a_name_and_an_argument_that_contradict_each_other() -> None:
    assert create_model("fpn_small?num_classes=3", 3).num_classes == 3
    for name in ("fpn_small?num_classes=3", "segformer_b0?num_classes=3"):
        with pytest.raises(ValueError, match="says another number of classes than 4; leave"):
            create_model(name, 4)


def test_the_spec_of_an_upgraded_model_says_so() -> None:
    pytest.importorskip("torchvision")
    model = create_model("torchvision:fasterrcnn_resnet50_fpn", 2, "carafe", min_size=64)
    assert model.spec.options == {"min_size": 64, "num_classes": 3}
    assert model.spec.upgrade == model.host.freqfusion_upgrade
    assert (model.spec.upgrade.fusion, model.spec.upgrade.init) == ("carafe", "paper")


@pytest.mark.parametrize("network", ["fpn_small", "segnext_t", "unet_mobilenetv3_small_050"])
def test_pixel_models_are_under_one_contract(network: str) -> None:
    if network.startswith("unet"):
        pytest.importorskip("timm")
    model = create_model(network, 4)
    assert isinstance(model, PixelModel)
    assert model.training
    mask = torch.randint(0, 4, (2, 37, 45))
    loss = model.loss(IMAGE.expand(2, -1, -1, -1), mask)
    assert loss.shape == ()
    loss.backward()
    backbone = {name for name, _ in model.named_parameters() if model.is_backbone(name)}
    assert backbone == {f"backbone.{name}" for name, _ in model.backbone.named_parameters()}


def test_a_network_starts_from_its_own_file_and_from_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    trained = shaken(create_model("fpn_small", 3, "bilinear"))
    torch.save(trained.state_dict(), tmp_path / "plain.pth")
    torch.save(
        {"state_dict": {f"network.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "last.ckpt"
    )
    save_pretrained(trained, tmp_path / "saved", classes=("a", "b", "c"))
    for weights in ("plain.pth", "last.ckpt", "saved"):
        model = create_model("fpn_small", 3, "bilinear", weights=tmp_path / weights)
        assert same_weights(model, trained), weights
    whole = create_model(tmp_path / "saved")
    assert same_weights(whole, trained)
    assert whole.training
    assert whole.spec.classes == from_pretrained(tmp_path / "saved").spec.classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="predicts 3 classes, not 4"):
        create_model(tmp_path / "saved", 4)
    with pytest.raises(ValueError, match=r"is as it was saved: leave out channels"):
        create_model(tmp_path / "saved", channels=8)
    with pytest.raises(ValueError, match="finds no objects, so it takes neither things nor output"):
        create_model(tmp_path / "saved", things=[True] * 3)

    with pytest.warns(
        UserWarning, match=r"fresh weights: decode_head\.conv_seg\.bias, decode_head\.conv_seg\.w"
    ):
        other = create_model("fpn_small", 7, "bilinear", weights=tmp_path / "saved")
    assert torch.equal(other.backbone.stages[0][0][0].weight, trained.backbone.stages[0][0][0].weight)
    with pytest.raises(
        ValueError, match=r"plain\.pth: its tensors do not fit .* \d+ missing: decode_head\.fpn\.fus"
    ):
        create_model("fpn_small", 3, "carafe", weights=tmp_path / "plain.pth")
    with pytest.raises(FileNotFoundError, match=r"there are no weights at .*: give a file, a folder of"):
        create_model("fpn_small", 3, weights=tmp_path / "absent.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no freqfusion\.json, so it is not a folder of"):
        create_model("fpn_small", 3, weights=tmp_path / "empty")


def test_an_official_release_is_recognised(tmp_path: Path) -> None:
    """Its names may be those of ours, and of a constant that we do not keep."""
    trained = shaken(create_model("segnext_t", 19))
    official = {
        **trained.state_dict(),
        "decode_head.freqfusions.0.dysampler.init_pos": torch.zeros(1, 32, 1, 1),
    }
    torch.save({"state_dict": official}, tmp_path / "released.pth")
    assert same_weights(create_model("segnext_t", 19, weights=tmp_path / "released.pth"), trained)


def test_a_backbone_of_timm_starts_from_a_file(tmp_path: Path) -> None:
    """Of timm's whole classifier; each tensor has its place, what comes after the last map is left out."""
    timm = pytest.importorskip("timm")
    whole = shaken(timm.create_model("mobilenetv3_small_050", pretrained=False))
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    model = create_model("unet_mobilenetv3_small_050", 2, backbone_weights=tmp_path / "whole.pth")
    with torch.no_grad():
        expected = whole.eval().forward_intermediates(IMAGE, intermediates_only=True)
        found = model.eval().backbone(IMAGE)
    assert torch.equal(found[-1], expected[-1])
    state = dict(whole.state_dict(), extra=torch.zeros(1))
    del state["conv_stem.weight"]
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(
        ValueError, match=r"variant\? .* 1 missing: conv_stem\.weight; 1 without a place: extra"
    ):
        create_model("unet_mobilenetv3_small_050", 2, backbone_weights=tmp_path / "odd.pth")


@pytest.mark.parametrize(
    "source", ["timm", "timm:a1_in1k", "timm:resnet18.a1_in1k", "torchvision:IMAGENET1K_V1"]
)
def test_tags_ask_the_library(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    from torchvision.models._api import WeightsEnum

    state = torchvision.models.resnet18(weights=None).state_dict()
    asked: list[str] = []
    create = timm.create_model

    def stand_in(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            asked.append(name)
        network = create(name.partition(".")[0], pretrained=False, **options)
        if pretrained:
            network.load_state_dict(state)
        return network

    monkeypatch.setattr(timm, "create_model", stand_in)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: state)
    model = create_model("faster_rcnn_r18", 2, backbone_weights=source, **SMALL)
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert asked == {"timm": ["resnet18"], "torchvision:IMAGENET1K_V1": []}.get(source, ["resnet18.a1_in1k"])
    with pytest.raises(
        ValueError, match="torchvision has no weights 'NONE' of resnet18; it has IMAGENET1K_V1"
    ):
        create_model("faster_rcnn_r18", 2, backbone_weights="torchvision:NONE", **SMALL)
    with pytest.raises(ValueError, match="torchvision has no weights for"):
        create_model("segnext_t", 2, backbone_weights="torchvision:IMAGENET1K_V1")


@pytest.mark.parametrize(
    "network", ["mask_rcnn_r18", "torchvision:maskrcnn_resnet50_fpn", "mask2former_swin_t"]
)
def test_object_models_are_under_one_contract(network: str) -> None:
    pytest.importorskip("torchvision")
    options: dict[str, Any] = SMALL if network == "mask_rcnn_r18" else {}
    if network.startswith("mask2former"):
        pytest.importorskip("transformers")
        from tiny_masks import TINY

        options = TINY
    elif network.startswith("torchvision"):
        options = {"min_size": 64, "max_size": 96}
    torch.manual_seed(0)
    model = create_model(network, 3, **options)
    assert isinstance(model, ObjectModel)
    assert (model.num_classes, model.finds, list(model.things)) == (3, "instances", [True] * 3)
    masks = torch.zeros(2, 48, 60, dtype=torch.uint8)
    masks[0, 5:20, 5:30] = masks[1, 25:40, 20:50] = 1
    sample = {
        "boxes": torch.tensor([[5.0, 5, 30, 20], [20, 25, 50, 40]]),
        "labels": torch.tensor([0, 2]),
        "iscrowd": torch.tensor([False, False]),
        "masks": masks,
    }
    loss = model.loss([torch.rand(3, 48, 60)], [sample])
    assert loss.isfinite()
    loss.backward()
    found = model.eval().find([torch.rand(3, 48, 60), torch.rand(3, 33, 40)], ObjectInference(sizes=[48]))
    assert len(found) == 2
    for result in found:
        labels: Tensor = result["labels"]
        assert ((labels >= 0) & (labels < 3)).all()
        assert result["masks"].shape[0] == len(labels) == len(result["boxes"]) == len(result["scores"])
    assert found[1]["masks"].shape[2:] == (33, 40)


def test_all_names_of_the_list_are_known() -> None:
    assert {"segnext_t", "fpn_small", "mask_rcnn_r50", "panoptic_fpn_r101", "mask2former_swin_b"} <= set(
        list_models()
    )
    assert list_models("nothing*") == []


def test_another_output_is_refused() -> None:
    pytest.importorskip("transformers")
    from tiny_masks import TINY

    with pytest.raises(ValueError, match="output must be instance or panoptic, got 'boxes'"):
        create_model("mask2former_swin_t", 3, output="boxes", **TINY)
