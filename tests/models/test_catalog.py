"""Models by name."""

import importlib.util

import pytest
import torch

from freqfusion.models import create_model, list_models


def test_every_name_builds() -> None:
    for name in list_models():
        if name == "fpn_resnet18" and importlib.util.find_spec("timm") is None:
            with pytest.raises(ImportError, match=r"freqfusion\[vision\]"):
                create_model(name, 7)
            continue
        with torch.device("meta"):
            model = create_model(name, 7)
        assert model.num_classes == 7
        assert {child for child, _ in model.named_children()} == {"backbone", "decode_head"}


def test_names() -> None:
    assert list_models() == ["segnext_t", "segnext_s", "segnext_b", "segnext_l", "fpn_small", "fpn_resnet18"]


def test_options_reach_the_network() -> None:
    model = create_model("fpn_small", 4, "bilinear", channels=24)
    assert model.state_dict()["decode_head.conv_seg.weight"].shape == (4, 24, 1, 1)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="unknown model 'resnet'; choose one of segnext_t"):
        create_model("resnet", 2)
    with pytest.raises(ValueError, match=r"unknown model 'unet_'.*such as unet_convnext_tiny"):
        create_model("unet_", 2)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        create_model("fpn_small", 0)
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
