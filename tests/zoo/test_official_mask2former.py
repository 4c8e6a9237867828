"""Mask2Former in detectron2's names: recognised, converted, with the numbers of the original code, and back."""

import inspect
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import transformers
from torch import Tensor, nn

from freqfusion import from_pretrained, upgrade_
from freqfusion.fusion import FreqFusion
from freqfusion.weights.fill import reason_for
from freqfusion.zoo.official import convert_official, mask2former, read_official
from freqfusion.zoo.official.base import Shapes
from freqfusion.zoo.official.mask2former import NOT_OFFICIAL, PIXEL_DECODER, to_official
from official_files import key_list, official_state
from support import GOLDEN, assert_close, load_golden

MODELS = ["m2f_model_swin_plain", "m2f_model_swin_freqfusion", "m2f_model_resnet_freqfusion"]
CONSTANT = ("init_pos", "relative_position_index", "hamming_lowpass", "hamming_highpass")
BACKBONES = {
    "Swin-T": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "Swin-S": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "Swin-B": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    "Swin-L": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
    "ResNet-50": {"depths": [3, 4, 6, 3]},
    "ResNet-101": {"depths": [3, 4, 23, 3]},
}


def save(state: Mapping[str, Tensor], path: Path) -> Path:
    torch.save({"model": dict(state), "iteration": 159999}, path)
    return path


def golden_state(name: str) -> dict[str, Tensor]:
    """The weights of one of the small models that the original code was run with."""
    return official_state(load_golden(name)[0]["shapes"], torch.float64)


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return Shapes({key: tuple(value.shape) for key, value in state.items()})


def official_count(model: nn.Module) -> int:
    """Parameters without a norm after Swin's last stage, and without batch norms, which are frozen in detectron2."""
    others = (".swin.layernorm.", ".normalization.")
    return sum(x.numel() for name, x in model.named_parameters() if not any(part in name for part in others))


def assert_same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Constants, which are not stored, need only be there."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        if not key.endswith(CONSTANT):
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_file_gives_the_numbers_of_the_original_code(tmp_path: Path, name: str) -> None:
    meta, arrays = load_golden(name)
    state = golden_state(name)
    conversion = convert_official(save(state, tmp_path / "m.pth"), tmp_path / "m")
    backbone = "ResNet-17" if "resnet" in name else "Swin (width 16, depths [2, 2, 2, 1])"
    decoder = "plain" if "plain" in name else "FreqFusion"
    assert (
        conversion.title == f"Mask2Former, {backbone} backbone, {decoder} pixel decoder, 6 classes, 7 queries"
    )
    unneeded = [key for key in state if key.endswith(("init_pos", "relative_position_index"))]
    assert conversion.tensors == len(state) - len(unneeded)
    assert sum(conversion.unneeded.values()) == len(unneeded) > 0

    model: Any = from_pretrained(tmp_path / "m")
    assert official_count(model) == meta["n_params"]
    assert conversion.parameters == sum(parameter.numel() for parameter in model.parameters())
    image = arrays["in/image"]
    with torch.no_grad():
        maps = model.model.pixel_level_module.encoder(image).feature_maps
        output = model(image, output_auxiliary_logits=True)
    assert_close("res3", maps[1], arrays["out/res3"], 1e-6)  # stored in float32
    assert_close("res5", maps[3], arrays["out/res5"], 1e-12)
    # the original rounds its positions to float32
    assert_close("class_logits", output.class_queries_logits, arrays["out/class_logits"], 1e-6)
    assert_close("mask_logits", output.masks_queries_logits, arrays["out/mask_logits"], 1e-6)
    assert len(output.auxiliary_logits) == 4
    for i, layer in enumerate(output.auxiliary_logits):
        expected = arrays[f"out/class_logits_of_layer/{i}"]
        assert_close(f"layer {i}", layer["class_queries_logits"], expected, 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    state = golden_state(name)
    model = read_official(save(state, tmp_path / "m.pth"))[0].model
    back = to_official(model)
    assert_same_weights(back, state)
    again = read_official(save(back, tmp_path / "again.pth"))[0].model
    for (key, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


def test_constants_are_the_original_ones(tmp_path: Path) -> None:
    model = read_official(save(golden_state("m2f_model_swin_freqfusion"), tmp_path / "m.pth"))[0].model
    state = to_official(model)
    _, arrays = load_golden("ff_a02_m2f_style")
    for i in range(3):
        fusion = f"{PIXEL_DECODER}freqfusions.{i}."
        assert torch.equal(state[fusion + "dysampler.init_pos"], arrays["buffer/dysampler.init_pos"])
        for window in ("hamming_lowpass", "hamming_highpass"):
            assert torch.equal(state[fusion + window], torch.ones(1, dtype=torch.float64))
    index = state["backbone.layers.0.blocks.1.attn.relative_position_index"]
    cells = [(y, x) for y in range(3) for x in range(3)]
    expected = [[5 * (y - v + 2) + x - u + 2 for v, u in cells] for y, x in cells]
    assert index.tolist() == expected


@pytest.mark.parametrize(
    ("name", "backbone"), [("mask2former_r50", "ResNet-50"), ("mask2former_swin_b", "Swin-B")]
)
def test_every_key_of_the_released_models_has_its_place(name: str, backbone: str) -> None:
    official = key_list(name)
    shapes = Shapes({key: tuple(shape) for key, shape in official.items()})
    assert mask2former.FAMILY.recognises(shapes)
    plan = mask2former.FAMILY.plan(shapes)
    assert plan.title == (
        f"Mask2Former, {backbone} backbone, FreqFusion pixel decoder, 150 classes, 100 queries"
    )
    assert shapes_of(to_official(plan.model)) == shapes
    assert (
        official_count(plan.model) == json.loads((GOLDEN / "param_counts.json").read_text())[name]["params"]
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_are_told_by_the_shapes(name: str) -> None:
    resnet = name.startswith("ResNet")
    config_class = transformers.ResNetConfig if resnet else transformers.SwinConfig
    out = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.Mask2FormerConfig(
        backbone_config=config_class(**BACKBONES[name], out_features=out), num_labels=19, num_queries=200
    )
    with torch.device("meta"):
        official = transformers.Mask2FormerForUniversalSegmentation(config)
        shapes = shapes_of(to_official(official))
        plan = mask2former.FAMILY.plan(shapes)
    assert plan.title == f"Mask2Former, {name} backbone, plain pixel decoder, 19 classes, 200 queries"
    assert shapes_of(plan.model.state_dict()) == shapes_of(official.state_dict())
    found: Any = plan.model.config
    for key in ("encoder_layers", "decoder_layers", "num_attention_heads", "dim_feedforward"):
        assert getattr(found, key) == getattr(config, key), key
    for key, value in BACKBONES[name].items():
        assert getattr(found.backbone_config, key) == value, key
    assert resnet or found.backbone_config.drop_path_rate == 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"feature_resample_group": 8, "feature_resample_norm": True},
        {"compressed_channels": 24, "lowpass_kernel": 3, "hamming_window": True},
        {"feature_resample": False, "encoder_kernel": 1},
        {"points": ["out_4"], "direction_feat": "sim"},
        {"layer_type": "basic", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "embedding_size": 8},
        {"mlp_ratio": 2.0, "qkv_bias": False},
    ],
    ids=str,
)
def test_options_are_told_by_the_shapes(options: dict[str, Any], tmp_path: Path) -> None:
    fusion = {key: value for key, value in options.items() if key in inspect.signature(FreqFusion).parameters}
    points = options.get("points", mask2former.POINTS_OF_FUSION)
    small = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
    kind = transformers.ResNetConfig if "layer_type" in options else transformers.SwinConfig
    own = {key: value for key, value in options.items() if key not in fusion and key != "points"}
    backbone = kind(**(own if "layer_type" in own else {**small, **own}), out_features=mask2former.STAGES)
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_labels=3, feature_size=64, mask_feature_size=64, hidden_dim=64
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    upgrade_(model, init="paper", filter_fn=lambda x: x.path.endswith(tuple(points)), **fusion)
    state = mask2former._names_of(model).official_state(
        {key: value for key, value in model.state_dict().items() if not reason_for(key, NOT_OFFICIAL)}
    )
    again = read_official(save(state, tmp_path / "m.pth"))[0].model
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in again.state_dict().items():
        if not reason_for(key, NOT_OFFICIAL):
            assert torch.equal(value, model.state_dict()[key]), key
    assert again.freqfusion_upgrade.sites == model.freqfusion_upgrade.sites


def test_the_golden_pixel_decoder_through_the_converter(tmp_path: Path) -> None:
    meta, arrays = load_golden("m2f_a_real_r50")
    layers = meta["kwargs"]["transformer_enc_layers"]
    shapes = {
        key: shape
        for key, shape in key_list("mask2former_r50").items()
        if "pixel_decoder.transformer.encoder" not in key or int(key.split(".")[5]) < layers
    }
    own = {key.removeprefix(PIXEL_DECODER): x for key, x in shapes.items() if key.startswith(PIXEL_DECODER)}
    filled = {
        PIXEL_DECODER + key: value for key, value in official_state(own, torch.float64).items()
    }  # by names without prefix
    state = {key: filled.get(key, torch.zeros(shape)) for key, shape in shapes.items()}
    model: Any = read_official(save(state, tmp_path / "m.pth"))[0].model
    with torch.no_grad():
        output = model.model.pixel_level_module.decoder([arrays[f"in/res{i}"] for i in range(2, 6)])
    assert_close("mask_features", output.mask_features, arrays["out/mask_features"], 1e-6)
    for i, x in enumerate(output.multi_scale_features):
        assert_close(f"multi_scale/{i}", x, arrays[f"out/multi_scale/{i}"], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r50", "swin_b"])
def test_released_sizes_there_and_back(tmp_path: Path, name: str) -> None:
    state = official_state(key_list(f"mask2former_{name}"))
    convert_official(save(state, tmp_path / "m.pth"), tmp_path / "m")
    assert_same_weights(to_official(from_pretrained(tmp_path / "m")), state)


def test_names_of_the_first_version(tmp_path: Path) -> None:
    state = golden_state("m2f_model_swin_plain")
    old = {}
    for key, value in state.items():
        key = key.replace("query_feat", "static_query")
        old[key.replace(PIXEL_DECODER, "sem_seg_head.")] = value
    assert len(old.keys() & state.keys()) < len(state) - 40
    assert_same_weights(to_official(read_official(save(old, tmp_path / "m.pth"))[0].model), state)


def test_batch_norm_that_counts_its_steps(tmp_path: Path) -> None:
    state = golden_state("m2f_model_resnet_freqfusion")
    counts = {
        key.replace("running_var", "num_batches_tracked"): torch.tensor(90_000)
        for key in state
        if key.endswith("running_var")
    }
    conversion = convert_official(save(state | counts, tmp_path / "m.pth"), tmp_path / "m")
    assert conversion.unneeded["counts of training steps, without effect"] == len(counts) == 20
    assert_same_weights(to_official(from_pretrained(tmp_path / "m")), state)


def test_a_file_for_inference(tmp_path: Path) -> None:
    state = golden_state("m2f_model_swin_plain")
    del state["criterion.empty_weight"]
    state["pixel_mean"] = state["pixel_std"] = torch.ones(3, 1, 1)
    model = read_official(save(state, tmp_path / "m.pth"))[0].model
    weight = to_official(model)["criterion.empty_weight"]
    torch.testing.assert_close(weight, torch.tensor([1.0] * 6 + [0.1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.patch_embed.proj.weight": None}, r"but it has no backbone\.patch_embed\.proj\.weight"),
        (
            {"sem_seg_head.predictor.class_embed.weight": None},
            r"but it has no sem_seg_head\.predictor\.class_emb",
        ),
        (
            {"backbone.layers.1.blocks.0.attn.qkv.bias": torch.zeros(95)},
            r"layers\.1\.blocks\.0\.attn\.qkv\.bias \(95,\) instead of \(96,\) of .*q.*\.bias, .*k.*\.bias, ",
        ),
        (
            {PIXEL_DECODER + "freqfusions.0.hamming_lowpass": torch.ones(1, 1, 5, 5)},
            r"freqfusions\.0\.hamming_lowpass \(1, 1, 5, 5\) instead of \(1,\) of .*fusions\.in_16\.fusion\.hamm",
        ),
        (
            {"sem_seg_head.IGU.up.0.content_encoder.bias": torch.zeros(9)},
            r"1 without a place: sem_seg_head\.IGU\.",
        ),
        (
            {"backbone.layers.0.blocks.0.mlp.fc3.bias": torch.zeros(9)},
            r"1 without a place: backbone\.layers\.0",
        ),
        ({"sem_seg_head.predictor.query_embed.weight": None}, r"1 missing: .*\.queries_embedder\.weight"),
        (
            {"sem_seg_head.predictor.static_query.weight": torch.zeros(7, 32)},
            r"1 without a place: sem_seg_head\.predictor\.static_query\.weight",
        ),
        ({PIXEL_DECODER + "transformer.level_embed": torch.zeros(3, 31)}, "looks like one of Mask2Former"),
        ({PIXEL_DECODER + "transformer.level_embed": torch.zeros(3)}, "looks like one of Mask2Former"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    state = {**golden_state("m2f_model_swin_freqfusion"), **change}
    kept = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_official(save(kept, tmp_path / "m.pth"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.fixture
def small(tmp_path: Path) -> nn.Module:
    return read_official(save(golden_state("m2f_model_swin_plain"), tmp_path / "m.pth"))[0].model


@pytest.mark.parametrize(
    ("fusion", "options", "found"),
    [
        ("freqfusion", {}, "'freqfusion' at 3 with init='identity'"),
        ("carafe", {"init": "paper"}, "'carafe' at 3 with init='paper'"),
        (
            "freqfusion",
            {"init": "paper", "filter_fn": lambda site: "out_" in site.path},
            "'freqfusion' at 1 with init='paper'",
        ),
    ],
)
def test_upgrades_that_the_release_does_not_have(
    small: nn.Module, fusion: str, options: dict[str, Any], found: str
) -> None:
    upgrade_(small, fusion, verify=False, **options)
    with pytest.raises(ValueError, match=f"no gates; this model has {found}"):
        to_official(small)


def test_an_upgrade_of_ones_own_gets_the_released_names(small: nn.Module) -> None:
    upgrade_(small, "freqfusion", init="paper", verify=False)
    official = load_golden("m2f_model_swin_freqfusion")[0]["shapes"]
    assert shapes_of(to_official(small)) == {key: tuple(shape) for key, shape in official.items()}


def test_other_models_have_no_official_names() -> None:
    with pytest.raises(ValueError, match="no official names are known for 1 keys: weight"):
        to_official(nn.Linear(2, 2, bias=False))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(golden_state("m2f_model_resnet_freqfusion"), tmp_path / "m.pth")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install .freqfusion\[hosts\]"):
        read_official(path)


def test_names_of_swin_before_transformers_5() -> None:
    names = mask2former._names(old_swin=True)
    block = "model.pixel_level_module.encoder.encoder.layers.2.blocks.17."
    expected = {
        "attn.qkv.weight": [f"attention.self.{name}.weight" for name in ("query", "key", "value")],
        "attn.relative_position_bias_table": ["attention.self.relative_position_bias_table"],
        "attn.proj.bias": ["attention.output.dense.bias"],
        "mlp.fc1.weight": ["intermediate.dense.weight"],
        "mlp.fc2.weight": ["output.dense.weight"],
    }
    for key, own in expected.items():
        official = f"backbone.layers.2.blocks.17.{key}"
        assert list(names.own_keys(official)) == [block + name for name in own]
        pieces = {block + name: torch.full((1,), float(i)) for i, name in enumerate(own)}
        assert names.official_state(pieces)[official].tolist() == list(range(len(own)))


def test_examples_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {key: value.float() for key, value in golden_state("m2f_model_swin_freqfusion").items()}
    convert_official(save(state, tmp_path / "official.pth"), tmp_path / "mask2former")
    page = Path(__file__).parents[2] / "docs" / "models.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    segment, back = [block for block in blocks if "official" in block]
    names: dict[str, Any] = {}
    exec(segment, names)
    assert set(names["found"]) >= {"boxes", "labels", "scores", "masks"}
    padded = F.pad(names["normalised"][None], (0, 5, 0, 6))
    with torch.no_grad():
        output = names["model"](padded)
    masks = F.interpolate(output.masks_queries_logits, size=(96, 128), mode="bilinear", align_corners=False)
    classes = output.class_queries_logits.softmax(dim=-1)[..., :-1]
    scores = torch.einsum("bqk,bqhw->bkhw", classes, masks.sigmoid())[0, :, :90, :123]
    assert scores.shape == (6, 90, 123)
    assert torch.allclose(names["scores"][0], scores.log(), atol=1e-5)
    exec(back, names)
    written = torch.load("official_again.pth", weights_only=True)["model"]
    assert_same_weights(written, state)
