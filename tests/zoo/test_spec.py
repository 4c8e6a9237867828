"""Models by a line of text."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from freqfusion.upgrade import Upgrade
from freqfusion.zoo.spec import ModelSpec
from support import load_model


@pytest.mark.parametrize(
    ("text", "library", "name", "options"),
    [
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision", "torchvision:fasterrcnn_resnet50_fpn", {}),
        ("segnext_t?num_classes=19", "", "segnext_t", {"num_classes": 19}),
        (
            "smp:Unet?encoder_name=resnet18&classes=2",
            "smp",
            "smp:Unet",
            {"encoder_name": "resnet18", "classes": 2},
        ),
        (
            "a.b:make?sizes=(1,2)&on=True&none=None",
            "a.b",
            "a.b:make",
            {"sizes": (1, 2), "on": True, "none": None},
        ),
        ("some/dir/file.py:make?name='3'", "some/dir/file.py", "some/dir/file.py:make", {"name": "3"}),
    ],
)
def test_parse_and_write(text: str, library: str, name: str, options: dict[str, object]) -> None:
    spec = ModelSpec.parse(text)
    assert (spec.library, spec.name, spec.options) == (library, name, options)
    assert ModelSpec.parse(str(spec)) == spec


def test_json_and_back() -> None:
    upgrade = Upgrade("carafe", "paper", ("a.fusions.0",), {"compressed_channels": 8})
    spec = ModelSpec("smp:Unet", {"encoder_name": "resnet18", "classes": 2}, upgrade, ("sky", "ground"))
    text = json.dumps(spec.to_json())
    assert ModelSpec.from_json(json.loads(text)) == spec
    assert ModelSpec.from_json(json.loads(json.dumps(ModelSpec("segnext_t").to_json()))) == ModelSpec(
        "segnext_t"
    )


@pytest.mark.parametrize("text", ["", "torchvision:", ":x", "smp:Unet?encoder"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"does not name a model; write it like(.|\n)*smp:Unet|bad query field"
    ):
        ModelSpec.parse(text)


def test_own_models() -> None:
    model = load_model("fusion:carafe?hr_channels=8&lr_channels=16")
    assert (model.hr_channels, model.lr_channels) == (8, 16)
    assert model.spec == ModelSpec("fusion:carafe", {"hr_channels": 8, "lr_channels": 16})
    assert isinstance(load_model("fpn_small?num_classes=2&fusion=nearest"), nn.Module)


def test_functions_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text("import torch\ndef make(width=2):\n    return torch.nn.Conv2d(width, 1, 1)\nthing = 3\n")
    assert load_model(f"{file}:make?width=5").in_channels == 5
    assert isinstance(load_model("torch.nn:Identity"), nn.Identity)
    with pytest.raises(ValueError, match="has no function or class 'thing'"):
        load_model(f"{file}:thing")
    with pytest.raises(ValueError, match=r"there is no file .*missing\.py"):
        load_model(f"{tmp_path / 'missing.py'}:make")
    with pytest.raises(ValueError, match="made a dict, not a"):
        load_model("builtins:dict")
    with pytest.raises(ValueError, match="neither a library nor a Python module 'torchvison'"):
        load_model("torchvison:fcos")


def test_torchvision_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download")
    )
    model = load_model("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn?num_classes=3")
    assert model.roi_heads.box_predictor.cls_score.out_features == 3
    with pytest.raises(ValueError, match="torchvision has no model 'fasterrcnn'"):
        load_model("torchvision:fasterrcnn")


def test_libraries_give_models_only() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    model = load_model("smp:Unet?encoder_name=resnet18&classes=2&encoder_depth=3&decoder_channels=(8,8,8)")
    assert model.segmentation_head[0].out_channels == 2
    with pytest.raises(ValueError, match="smp has no model 'from_pretrained'"):
        load_model("smp:from_pretrained?pretrained_model_name_or_path=x")


def test_transformers_by_short_name() -> None:
    transformers = pytest.importorskip("transformers")
    small = "depths=[1,1,1,1]&hidden_sizes=[8,8,16,16]&num_attention_heads=[1,1,1,1]&decoder_hidden_size=16"
    model = load_model(f"transformers:Segformer?{small}&num_labels=5")
    assert type(model) is transformers.SegformerForSemanticSegmentation
    assert model.decode_head.classifier.out_channels == 5
    with pytest.raises(ValueError, match="transformers has no model 'AutoModel'"):
        load_model("transformers:AutoModel")


def test_ultralytics_is_told_not_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ultralytics", None)
    with pytest.raises(ImportError, match=r"AGPL.*pip install ultralytics"):
        load_model("ultralytics:yolo11n.yaml")
    with pytest.raises(
        ValueError, match=r"named by its configuration, such as yolo11n\.yaml, not 'yolo11n\.pt'"
    ):
        load_model("ultralytics:yolo11n.pt")
