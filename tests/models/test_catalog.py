"""Models by name."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freqfusion import create_model, list_models, register_model
from freqfusion.models import PixelModel


def test_every_name_builds() -> None:
    for name in [*list_models("segnext_?"), *list_models("fpn_*")]:
        if name == "fpn_resnet18" and importlib.util.find_spec("timm") is None:
            with pytest.raises(ImportError, match=r"freqfusion\[vision\]"):
                create_model(name, 7)
            continue
        with torch.device("meta"):
            model = create_model(name, 7)
        assert model.num_classes == 7
        assert {child for child, _ in model.named_children()} == {"backbone", "decode_head"}
        assert model.spec.name == name


def test_names() -> None:
    own = ["segnext_t", "segnext_s", "segnext_b", "segnext_l", "fpn_small", "fpn_resnet18"]
    assert list_models()[:6] == own
    assert list_models("*_r50") == ["faster_rcnn_r50", "mask_rcnn_r50", "panoptic_fpn_r50", "mask2former_r50"]


def test_a_network_of_ones_own() -> None:
    @register_model("tiny_of_mine")
    class Mine(PixelModel):
        def __init__(self, num_classes: int, fusion: str, width: int = 4) -> None:
            super().__init__()
            self.num_classes = num_classes
            self.backbone = nn.Conv2d(3, width, 1)
            self.head = nn.Conv2d(width, num_classes, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.backbone(images))

    model = create_model("tiny_of_mine?width=6", 3)
    assert model.backbone.out_channels == 6
    assert str(model.spec) == "tiny_of_mine?num_classes=3&fusion=freqfusion&width=6"
    assert [name for name, _ in model.named_parameters() if model.is_backbone(name)] == [
        "backbone.weight",
        "backbone.bias",
    ]
    images, mask = torch.randn(2, 3, 5, 6), torch.randint(0, 3, (2, 5, 6))
    mask[:, 0] = 255
    expected = F.cross_entropy(model(images), mask, ignore_index=255, reduction="sum") / mask.numel()
    torch.testing.assert_close(model.loss(images, mask), expected)
    with pytest.raises(ValueError, match="there is a model 'tiny_of_mine' already"):
        register_model("tiny_of_mine")(lambda num_classes, fusion: Mine(num_classes, fusion))
    with pytest.raises(ValueError, match=r"letters, digits, .* got 'a/b'"):
        register_model("a/b")

    register_model("no_contract")(lambda num_classes, fusion: nn.Conv2d(3, num_classes, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"made a Conv2d, expected a freqfusion\.models\.PixelModel"):
        create_model("no_contract", 2)


def test_options_reach_the_network() -> None:
    model = create_model("fpn_small", 4, "bilinear", channels=24)
    assert model.state_dict()["decode_head.conv_seg.weight"].shape == (4, 24, 1, 1)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet'.* Choose a name of freqfusion"):
        create_model("resnet", 2)
    with pytest.raises(ValueError, match=r"unknown model 'unet_'.*such as unet_convnext_tiny"):
        create_model("unet_", 2)
    for path in (tmp_path, tmp_path / "last.ckpt"):
        path.touch()
        with pytest.raises(ValueError, match=r"is not a saved model: .*freqfusion.json.* --model.weights"):
            create_model(str(path), 2)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        create_model("fpn_small", 0)
    with pytest.raises(ValueError, match="unknown model 'segnet_t', did you mean segnext_t"):
        create_model("segnet_t", 2)
    with pytest.raises(ValueError, match="'fpn_small' needs num_classes"):
        create_model("fpn_small")
    with pytest.raises(ValueError, match="not both"):
        create_model("fpn_small", 2, weights="a", backbone_weights="b")
    with pytest.raises(ValueError, match=r"init and upgrade_options are for models of other libraries"):
        create_model("fpn_small", 2, init="paper")
    with pytest.raises(TypeError, match="colour"):
        create_model("fpn_small", 2, colour="red")


@pytest.mark.parametrize("decoder", ["fpn", "unet", "progressive"])
def test_a_decoder_and_a_network_of_timm(decoder: str) -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = create_model(f"{decoder}_mobilenetv3_small_050", 7, "bilinear", channels=24)
        assert model(torch.zeros(1, 3, 65, 40)).shape == (1, 7, 65, 40)
    state = model.state_dict()
    assert any(key.startswith(f"decode_head.{decoder}.laterals.") for key in state)
    assert state["decode_head.conv_seg.weight"].shape == (7, 24, 1, 1)


def test_a_network_that_timm_does_not_have() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"timm has no network 'convnext_minute'; timm.list_models\(\)"):
        create_model("unet_convnext_minute", 7)
