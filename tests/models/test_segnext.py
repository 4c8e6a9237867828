"""SegNeXt against the released code's numbers, key lists and parameter counts."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freqfusion import create_model
from freqfusion.models.mscan import MSCAN, DropPath
from freqfusion.models.segnext import SegNeXt
from support import GOLDEN, assert_close, fill_by_rule, load_golden

INIT_POSITION = "dysampler.init_pos"  # a constant of the released sampler; ours derives it from the sizes


def official_shapes(variant: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = json.loads((GOLDEN / f"keys_segnext_{variant}.json").read_text())
    return shapes


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def golden_model() -> SegNeXt:
    model = SegNeXt("t", 150).double()
    fill_by_rule(model)
    return model.eval()


@pytest.fixture(scope="module")
def tiny() -> SegNeXt:
    torch.manual_seed(0)
    return SegNeXt("t", 4).eval()


def test_whole_model_equals_the_released_code(golden_model: SegNeXt) -> None:
    meta, arrays = load_golden("seg_a_model_tiny_64x96")
    assert count(golden_model) == meta["n_params"]
    image = arrays["in/img"]
    with torch.no_grad():
        features = golden_model.backbone(image)
        logits = golden_model.decode_head(features[1:], bases=arrays["bases"])
        full = nn.functional.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False)
    for i, feature in enumerate(features):
        assert_close(f"backbone/{i}", feature, arrays[f"out/backbone/{i}"], 1e-9)
    assert_close("logits", logits, arrays["out/logits"], 1e-9)
    assert_close("upsampled_corner", full[..., :9, :9], arrays["out/upsampled_corner"], 1e-9)
    assert torch.equal(full.argmax(1), arrays["out/argmax_full"].long())


def test_forward_gives_the_heads_logits_at_image_size(golden_model: SegNeXt) -> None:
    _, arrays = load_golden("seg_a_model_tiny_64x96")
    image, bases = arrays["in/img"], arrays["bases"]
    own = golden_model.decode_head.hamburger.ham.eval_bases
    golden_model.decode_head.hamburger.ham.eval_bases = bases
    try:
        with torch.no_grad():
            full = golden_model(image)
    finally:
        golden_model.decode_head.hamburger.ham.eval_bases = own
    assert_close("upsampled_corner", full[..., :9, :9], arrays["out/upsampled_corner"], 1e-9)
    assert torch.equal(full.argmax(1), arrays["out/argmax_full"].long())


def test_whole_model_in_float32(golden_model: SegNeXt) -> None:
    _, arrays = load_golden("seg_a_model_tiny_64x96")
    model = SegNeXt("t", 150).eval()
    model.load_state_dict(golden_model.state_dict())
    with torch.no_grad():
        logits = model.decode_head(
            model.backbone(arrays["in/img"].float())[1:], bases=arrays["bases"].float()
        )
    error = float((logits.double() - arrays["out/logits"]).abs().max())
    assert error <= 1.5e-5, error  # the released code itself is off by 7e-6 here


@pytest.mark.parametrize("variant", ["t", "b"])
def test_official_state_dict_loads_strictly(variant: str) -> None:
    shapes = official_shapes(variant)
    model = SegNeXt(variant, 150)
    own = model.state_dict()
    assert set(own) == {key for key in shapes if not key.endswith(INIT_POSITION)}
    assert {key: list(value.shape) for key, value in own.items()} == {key: shapes[key] for key in own}
    state: dict[str, Tensor] = {}
    for i, (key, shape) in enumerate(shapes.items()):
        integer = key.endswith("num_batches_tracked")
        state[key] = torch.tensor(i) if integer else torch.full(shape, float(i))
    model.load_state_dict(state, strict=True)
    for key, value in model.state_dict().items():
        if "hamming" not in key:
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    "variant, fused, plain",
    [
        ("t", 4_520_794, 4_263_414),
        ("s", 14.643, 13.933),
        ("b", 28_346_810, 27_636_310),
        ("l", 49.637, 48.927),
    ],
)
def test_parameter_counts(variant: str, fused: float, plain: float) -> None:
    with torch.device("meta"):  # shapes alone
        counts = [
            count(create_model(f"segnext_{variant}", 150, fusion)) for fusion in ("freqfusion", "bilinear")
        ]
    for found, expected in zip(counts, (fused, plain), strict=True):
        assert (found if isinstance(expected, int) else round(found / 1e6, 3)) == expected


def test_counts_are_those_of_the_golden_file() -> None:
    counts = json.loads((GOLDEN / "param_counts.json").read_text())
    for variant in ("t", "b"):
        entry = counts[f"segnext_{variant}"]
        with torch.device("meta"):
            model = SegNeXt(variant, 150)
            plain = SegNeXt(variant, 150, "bilinear")
        assert count(model) == entry["params"]
        assert count(plain) == entry["plain_params"]
        assert count(model.backbone) == entry["backbone"]
        assert count(model.decode_head.freqfusions) == entry["freqfusion"]


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 96), (97, 31), (1, 40)])
@pytest.mark.parametrize("fusion", ["freqfusion", "bilinear"])
def test_any_image_size(size: tuple[int, int], fusion: str) -> None:
    torch.manual_seed(0)
    model = SegNeXt("t", 3, fusion).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 3, *size)
    assert bool(torch.isfinite(out).all())


def test_maps_have_the_stated_sizes() -> None:
    backbone = MSCAN("t").eval()
    maps = backbone(torch.randn(1, 3, 97, 31))
    assert [tuple(x.shape[1:]) for x in maps] == [(32, 25, 8), (64, 13, 4), (160, 7, 2), (256, 4, 1)]
    assert backbone.out_channels == (32, 64, 160, 256)


def test_evaluation_is_deterministic_and_treats_each_image_alone(tiny: SegNeXt) -> None:
    images = torch.randn(3, 3, 40, 56)
    with torch.no_grad():
        out = tiny(images)
        torch.manual_seed(123)
        assert torch.equal(tiny(images), out)
        for i in range(3):
            assert_close(f"image {i}", tiny(images[i : i + 1]), out[i : i + 1], 1e-4)


def test_training_is_random_and_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = SegNeXt("t", 3).train()
    images = torch.randn(2, 3, 64, 64)
    state = torch.get_rng_state()
    first = model(images)
    assert not torch.equal(model(images), first)
    torch.set_rng_state(state)
    assert_close("same seed", model(images), first, 1e-4)
    first.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_compiles_without_a_graph_break(tiny: SegNeXt) -> None:
    image = torch.randn(1, 3, 64, 96)
    torch.compiler.reset()
    compiled = torch.compile(tiny, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close("logits", compiled(image), tiny(image), 1e-5)


def test_half_precision_autocast_stays_close(tiny: SegNeXt) -> None:
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = tiny(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = tiny(image)
    difference = (found.float() - expected).square().mean().sqrt() / expected.std()
    assert float(difference) < 0.1


def test_fresh_convolutions_follow_the_fan_out_rule() -> None:
    torch.manual_seed(0)
    backbone = MSCAN("t")
    state = backbone.state_dict()
    gate = "block3.0.attn.spatial_gating_unit"
    for key, fan_out in {
        "patch_embed3.proj.weight": 9 * 160,
        "block1.0.mlp.fc1.weight": 256,
        f"{gate}.conv0.weight": 25,  # depthwise: one output channel a group
        f"{gate}.conv2_1.weight": 21,
    }.items():
        assert float(state[key].std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.04), key
        assert float(state[key.replace("weight", "bias")].abs().max()) == 0
    assert bool((state["block4.1.layer_scale_2"] == 0.01).all())


def test_stochastic_depth_grows_over_the_blocks() -> None:
    rates = [m.rate for m in MSCAN("l").modules() if isinstance(m, DropPath)]
    assert len(rates) == 3 + 5 + 27 + 3
    assert rates == pytest.approx([0.3 * i / 37 for i in range(38)])


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3, 1)
    out = drop(x)
    kept = out[:, 0, 0, 0] > 0
    assert torch.equal(out, torch.where(kept[:, None, None, None], 1 / 0.75, 0.0).expand_as(x))
    assert float(out.mean()) == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x


def test_head_settings_are_passed_on() -> None:
    model = SegNeXt("t", 3, compress_ratio=8, dropout=0.3, fusion_options={"feature_resample": False})
    assert model.decode_head.dropout.p == 0.3
    assert model.state_dict()["decode_head.freqfusions.0.hr_channel_compressor.weight"].shape[0] == 52


@pytest.mark.parametrize(
    "image, error, message",
    [
        (torch.zeros(3, 32, 32), ValueError, r"shape \(B, 3, H, W\), got \(3, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"got \(1, 4, 32, 32\)"),
        (torch.zeros(1, 3, 0, 32), ValueError, r"got \(1, 3, 0, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "got torch.uint8"),
    ],
)
def test_wrong_images(tiny: SegNeXt, image: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny(image)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"variant": "x"}, "unknown MSCAN variant 'x'; choose one of t, s, b, l"),
        ({"fusion": "magic"}, "magic"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegNeXt(**{"variant": "t", "num_classes": 2, **arguments})
