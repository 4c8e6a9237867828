"""What a stranger does to the upsamplers: odd options, files, sizes and precisions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from freqfusion.features import create_upsampler, encoder_options, extract_features, list_upsamplers

SMALL: dict[str, dict[str, Any]] = {
    "naf": {"dim": 32, "kernel_size": 3},
    "anyup": {"qk_dim": 16},
    "jafar": {"qk_dim": 16},
    "loftup": {"n_freqs": 4, "num_layers": 1},
    "uplift": {"encoder_channels": (4, 8), "decoder_channels": (20, 20)},
}


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 4, 5, generator=generator), torch.rand(2, 3, 17, 21, generator=generator)


@pytest.mark.parametrize("name", [name for name in list_upsamplers() if name != "bilinear"])
def test_the_image_gets_a_gradient(name: str) -> None:
    upsampler = create_upsampler(name, 8, **SMALL.get(name, {})).requires_grad_(False)
    features, image = _inputs()
    image.requires_grad_()
    upsampler(features, image).square().sum().backward()
    assert image.grad is not None
    assert image.grad.abs().max() > 0
    with pytest.raises(ValueError, match="chunk is for use without gradients"):
        upsampler(features, image, chunk=2)


@pytest.mark.parametrize("name", list_upsamplers())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_zeros_in_half_precision(name: str, dtype: torch.dtype) -> None:
    upsampler = create_upsampler(name, 8, **SMALL.get(name, {})).to(dtype)
    features, image = (x.to(dtype) for x in _inputs())
    with torch.no_grad():
        assert upsampler(0 * features, image).isfinite().all()


@pytest.mark.parametrize("name", ["anyup", "jafar"])
def test_positions_of_a_large_map_in_half_precision(name: str) -> None:
    rope = create_upsampler(name, 8, qk_dim=16).rope.requires_grad_(False)
    x = torch.rand(1, 16, 600, 2)
    exact = rope.turn(x, 0, 600, 600)
    low = rope.bfloat16().turn(x.bfloat16(), 0, 600, 600)
    torch.testing.assert_close(low.float(), exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [20, (20,), (20, 20, 20)])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match=r"size must be \(H, W\), got"):
        create_upsampler("bilinear")(*_inputs(), size)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5, 0.5), None), (None, (1.0,)), (None, (0.5, 0.0, 0.5)), ((0.5,), None)]
)
def test_normalisations_that_are_none(mean: Any, std: Any) -> None:
    message = "mean and std must be three numbers each"
    upsampler = create_upsampler("jafar", 8, qk_dim=16, mean=mean, std=std)
    with pytest.raises(ValueError, match=message):
        upsampler(*_inputs())
    timm = pytest.importorskip("timm")
    encoder = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    with pytest.raises(ValueError, match=message):
        extract_features(encoder, torch.rand(1, 3, 32, 32), mean=mean, std=std)


def test_dropout_refuses_strips() -> None:
    upsampler = create_upsampler("featup_jbu", 8).train()
    with torch.no_grad(), pytest.raises(ValueError, match="chunk is for evaluation"):
        upsampler(*_inputs(), chunk=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loftup", {"num_heads": 3}, "num_heads must divide the width of the attention, 28, got 3"),
        ("uplift", {"encoder_channels": (0, 8)}, "encoder_channels must be at least 1, got 0"),
        ("uplift", {"decoder_channels": (8, -1)}, "decoder_channels must be at least 1, got -1"),
    ],
)
def test_options_that_are_none(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_upsampler(name, 8, **options)


@pytest.mark.parametrize(
    "key", ["attention.in_proj_weight", "attention.in_proj_bias", "norm_q.weight", "norm_k.weight"]
)
def test_file_of_the_other_form_of_anyup_that_is_incomplete(key: str, tmp_path: Path) -> None:
    state = create_upsampler("anyup", qk_dim=16).state_dict()
    del state[f"cross_decode.cross_attn.{key}"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth: .*[12] missing: cross_decode"):
        create_upsampler("anyup", qk_dim=16, natten=True, weights=tmp_path / "w.pth")


def test_message_names_no_channels_of_a_method_for_any(tmp_path: Path) -> None:
    torch.save(create_upsampler("naf").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"The file fits naf$"):
        create_upsampler("jafar", 8, weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "options"),
    [("ViTMAEModel", {"mask_ratio": 0.0}), ("YolosModel", {"num_detection_tokens": 5})],
)
def test_tokens_in_another_order_are_refused(name: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    size = [32, 32] if name == "YolosModel" else 32
    config = kind.config_class(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=size,
        **options,
    )
    with pytest.raises(ValueError, match=f"it has {next(iter(options))}"):
        extract_features(kind(config).eval(), torch.rand(1, 3, 32, 32))


def test_options_that_follow_from_the_encoder() -> None:
    timm = pytest.importorskip("timm")
    encoder = timm.create_model("test_vit", num_classes=0)
    encoder.pretrained_cfg = {"mean": (0.4, 0.4, 0.4), "std": (0.3, 0.3, 0.3)}
    uplift = create_upsampler("uplift", 8, **encoder_options("uplift", encoder))
    assert (uplift.mean, uplift.std, uplift.patch_size) == ((0.4,) * 3, (0.3,) * 3, 16)
    assert create_upsampler("jafar", 8, **encoder_options("jafar", encoder)).mean == (0.4,) * 3
    assert create_upsampler("naf", **encoder_options("naf", encoder)).mean != (0.4,) * 3
