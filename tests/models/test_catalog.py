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
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        create_model("fpn_small", 0)
    with pytest.raises(TypeError, match="colour"):
        create_model("fpn_small", 2, colour="red")
