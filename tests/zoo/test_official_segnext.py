"""SegNeXt of mmsegmentation and of the FreqFusion release: recognised, converted, and with the released numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freqfusion import from_pretrained
from freqfusion.models import SegNeXt
from freqfusion.zoo.official import convert_official, read_official, segnext
from freqfusion.zoo.official.base import Shapes
from official_files import key_list, official_state
from support import assert_close, load_golden

pytest.importorskip("safetensors")


def save(state: dict[str, Tensor], path: Path) -> Path:
    torch.save({"meta": {"epoch": 1}, "state_dict": state}, path)
    return path


def source(variant: str = "t", classes: int = 3, **options: Any) -> dict[str, Tensor]:
    """The state dict of a model of ours, each value of it changed."""
    torch.manual_seed(0)
    state = SegNeXt(variant, classes, **options).state_dict()
    return {
        key: value + 0.01 * torch.rand_like(value) if value.is_floating_point() else value + 7
        for key, value in state.items()
    }


def test_a_converted_file_gives_the_released_numbers(tmp_path: Path) -> None:
    state = official_state(key_list("segnext_t"), torch.float64)
    conversion = convert_official(save(state, tmp_path / "t.pth"), tmp_path / "t")
    assert conversion.title == "SegNeXt-T, FreqFusion head, 150 classes"
    assert conversion.parameters == 4_520_794
    assert conversion.tensors == len(state) - 2
    assert conversion.unneeded == {"sub-pixel positions, which follow from the sizes": 2}
    assert [file.name for file in conversion.files] == ["model.safetensors", "freqfusion.json"]
    assert {*conversion.files} == {*(tmp_path / "t").iterdir()}

    model: Any = from_pretrained(tmp_path / "t")
    _, arrays = load_golden("seg_a_model_tiny_64x96")
    model.decode_head.hamburger.ham.eval_bases = arrays["bases"]
    image = arrays["in/img"]
    with torch.no_grad():
        features = model.backbone(image)
        assert_close("logits", model.decode(image), arrays["out/logits"], 1e-9)
        full = model(image)
    for i, feature in enumerate(features):
        assert_close(f"backbone/{i}", feature, arrays[f"out/backbone/{i}"], 1e-9)
    assert torch.equal(full.argmax(1), arrays["out/argmax_full"].long())


def test_every_tensor_of_the_large_list_arrives_under_its_name(tmp_path: Path) -> None:
    state = official_state(key_list("segnext_b"))
    model = read_official(save(state, tmp_path / "b.pth"))[0].model
    assert isinstance(model, SegNeXt)
    assert not model.training
    own = model.state_dict()
    assert own.keys() == {key for key in state if not key.endswith("init_pos")}
    for key, value in own.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("variant", ["t", "s", "b", "l"])
@pytest.mark.parametrize(("fusion", "head"), [("bilinear", "plain"), ("freqfusion", "FreqFusion")])
def test_variants_and_heads_are_told_by_the_shapes(variant: str, fusion: str, head: str) -> None:
    with torch.device("meta"):
        official = SegNeXt(variant, 19, fusion)
        shapes = Shapes({key: tuple(value.shape) for key, value in official.state_dict().items()})
        assert segnext.FAMILY.recognises(shapes)
        plan = segnext.FAMILY.plan(shapes)
    assert plan.title == f"SegNeXt-{variant.upper()}, {head} head, 19 classes"
    own = {key: tuple(value.shape) for key, value in plan.model.state_dict().items()}
    assert own == shapes


@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "bilinear"},
        {"compress_ratio": 2, "feature_resample_group": 2},
        {
            "compress_ratio": 13,
            "feature_resample_group": 8,
            "fusion_options": {"feature_resample_norm": False},
        },
        {"compress_ratio": 4, "fusion_options": {"feature_resample": False}},
        {"compress_ratio": 8, "fusion_options": {"feature_resample_norm": False, "hamming_window": True}},
        {
            "feature_resample_group": 8,
            "fusion_options": {
                "compressed_channels": 48,
                "encoder_kernel": 1,
                "lowpass_kernel": 3,
                "highpass_kernel": 7,
                "direction_feat": "sim_concat",
            },
        },
    ],
)
def test_same_outputs_as_the_model_that_was_saved(tmp_path: Path, options: dict[str, Any]) -> None:
    state = source(**options)
    torch.manual_seed(1)
    model = SegNeXt("t", 3, **options).eval()
    model.load_state_dict(state)
    convert_official(save(state, tmp_path / "t.pth"), tmp_path / "t")
    converted: Any = from_pretrained(tmp_path / "t")
    bases = torch.rand(1, 256, 16)
    for one in (model, converted):
        one.decode_head.hamburger.ham.eval_bases = bases
    image = torch.randn(1, 3, 37, 51)
    with torch.no_grad():
        assert torch.equal(converted(image), model(image))
    written = json.loads((tmp_path / "t" / "freqfusion.json").read_text())["spec"]["options"]
    assert written == {"num_classes": 3, "fusion": "freqfusion", **options}


def test_a_backbone_that_none_has(tmp_path: Path) -> None:
    state = {key: value for key, value in source().items() if not key.startswith("backbone.block3.4.")}
    with pytest.raises(
        ValueError,
        match=r"t\.pth looks like one of SegNeXt T.*, but its backbone has the widths \(32, 64, 160, 256\) and "
        r"depths \(3, 3, 4, 2\), as no published one has",
    ):
        read_official(save(state, tmp_path / "t.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode_head.conv_seg.weight": None}, r"but it has no decode_head\.conv_seg\.weight"),
        ({"decode_head.conv_seg.weight": torch.tensor(1.0)}, "looks like one of SegNeXt"),
        ({"decode_head.conv_seg.bias": torch.zeros(4)}, r"conv_seg\.bias \(4,\) instead of \(3,\)"),
        ({"backbone.norm4.bias": None}, r"1 missing: backbone\.norm4\.bias"),
        (
            {"auxiliary_head.conv_seg.bias": torch.zeros(3)},
            r"1 without a place: auxiliary_head\.conv_seg\.bias",
        ),
        (
            {"decode_head.freqfusions.1.hamming_lowpass": torch.ones(1, 1, 5, 5)},
            r"freqfusions\.1\.hamming_lowpass \(1, 1, 5, 5\) instead of \(1,\)",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    state = {key: value for key, value in {**source(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_official(save(state, tmp_path / "t.pth"), tmp_path / "t")
    assert not (tmp_path / "t").exists()
