"""The Hamburger core and head against the released code's numbers, and their own promises."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.decoders.ham import NMF2D, LightHamHead
from freqfusion.fusion import create_fusion
from support import assert_close, fill_by_rule, load_golden

HEADS = ["seg_a_head_tiny", "seg_a_head_small_noresample"]
OFFICIAL_FUSION_OPTIONS = (
    "feature_resample",
    "comp_feat_upsample",
    "hamming_window",
    "semi_conv",
    "use_high_pass",
    "lowpass_kernel",
    "highpass_kernel",
    "use_checkpoint",
)


def make_official_head(kwargs: dict[str, Any]) -> LightHamHead:
    return LightHamHead(
        kwargs["in_channels"],
        kwargs["num_classes"],
        channels=kwargs["channels"],
        ham_channels=kwargs["ham_channels"],
        ham_rank=kwargs["ham_kwargs"]["MD_R"],
        fusion="freqfusion",
        compress_ratio=kwargs["compress_ratio"],
        feature_resample_group=kwargs["feature_resample_group"],
        dropout=kwargs["dropout_ratio"],
        fusion_options={name: kwargs[name] for name in OFFICIAL_FUSION_OPTIONS},
    )


def make_small_head(fusion: str = "bilinear", **options: Any) -> LightHamHead:
    torch.manual_seed(0)
    return LightHamHead(
        [8, 12, 20], 5, channels=32, ham_channels=64, ham_rank=4, fusion=fusion, **options
    ).eval()


def make_maps(
    *sizes: tuple[int, int], batch: int = 2, channels: tuple[int, ...] = (8, 12, 20)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)
    ]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, (1e-9, 1e-9)), (torch.float32, (1e-5, 2e-5))])
@pytest.mark.parametrize("case", [0, 1], ids=["eval", "training"])
def test_nmf_equals_the_released_code(case: int, dtype: torch.dtype, tolerance: tuple[float, float]) -> None:
    meta, arrays = load_golden("seg_nmf_a")
    info = meta["cases"][case]
    arrays = {
        key.removeprefix(info["prefix"]): value.to(dtype)
        for key, value in arrays.items()
        if key.startswith(info["prefix"])
    }
    core = NMF2D(info["shape"][1], info["R"]).train(info["training"])
    x = arrays["in"].requires_grad_()
    out = core(x, arrays["bases"])
    assert out.dtype == dtype
    assert_close("out", out, arrays["out"], tolerance[0])
    out.backward(arrays["cot"])
    assert x.grad is not None
    assert_close("grad", x.grad, arrays["grad"], tolerance[1])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, (1e-9, 1e-9)), (torch.float32, (1e-5, 2e-5))])
@pytest.mark.parametrize("name", HEADS)
def test_head_equals_the_released_code(name: str, dtype: torch.dtype, tolerance: tuple[float, float]) -> None:
    meta, arrays = load_golden(name)
    kwargs = meta["kwargs"]
    head = fill_by_rule(make_official_head(kwargs).double()).to(dtype).eval()
    assert sum(p.numel() for p in head.parameters()) == meta["n_params"]
    features = [arrays[f"in/{i}"].to(dtype).requires_grad_() for i in kwargs["in_index"]]
    bases = arrays["bases"].to(dtype)

    logits = head(features, bases=bases)
    assert_close("logits", logits, arrays["out/logits"], tolerance[0])
    assert_close("align_feature", head.embed(features, bases), arrays["out/align_feature"], tolerance[0])

    logits.backward(arrays["cot/logits"].to(dtype))
    for i, feature in zip(kwargs["in_index"], features, strict=True):
        assert feature.grad is not None
        assert_close(f"grad/in/{i}", feature.grad, arrays[f"grad/in/{i}"], tolerance[1])
    if dtype == torch.float64:
        gradients = {key: p.grad for key, p in head.named_parameters()}
        stored = {k.removeprefix("gradnorm/"): v for k, v in arrays.items() if k.startswith("gradnorm/")}
        assert gradients.keys() == stored.keys()
        for key, (norm, total) in stored.items():
            gradient = gradients[key]
            assert gradient is not None
            assert float(gradient.norm()) == pytest.approx(float(norm), rel=1e-8, abs=1e-10), key
            # a sum cancels: its error scales with the norm, not with the sum
            assert float(gradient.sum() - total) == pytest.approx(
                0, abs=1e-8 * float(norm) * gradient.numel() ** 0.5 + 1e-10
            ), key


def test_nmf_in_evaluation_is_deterministic_and_treats_each_image_alone() -> None:
    core = NMF2D(32, 4).eval()
    x = torch.rand(3, 32, 5, 7)
    out = core(x)
    assert torch.equal(out, core(x))
    torch.manual_seed(99)
    assert torch.equal(out, NMF2D(32, 4).eval()(x)), "the bases must not depend on the global seed"
    for i in range(3):
        assert_close(f"image {i}", core(x[i : i + 1]), out[i : i + 1], 1e-5)


def test_nmf_in_training_draws_new_bases_from_the_global_generator() -> None:
    core = NMF2D(32, 4).train()
    x = torch.rand(2, 32, 5, 7)
    torch.manual_seed(3)
    first, second = core(x), core(x)
    assert not torch.allclose(first, second, rtol=1e-4)
    torch.manual_seed(3)
    assert torch.equal(core(x), first)
    same = core(x[:1].expand(2, -1, -1, -1))
    assert not torch.allclose(same[0], same[1], rtol=1e-4), "each image has bases of its own"


def test_nmf_result_has_the_rank_of_its_bases_and_approximates() -> None:
    torch.manual_seed(0)
    exact = torch.einsum("cr,rn->cn", torch.rand(32, 3), torch.rand(3, 48)).reshape(1, 32, 6, 8).double()
    out = NMF2D(32, 3).double().eval()(exact)
    assert int(torch.linalg.matrix_rank(out.reshape(32, 48), rtol=1e-9)) == 3
    constant = exact.mean(dim=(2, 3), keepdim=True).expand_as(exact)
    assert float((out - exact).norm()) < 0.5 * float((constant - exact).norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nmf_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    core = NMF2D(32, 4).eval()
    x = torch.rand(1, 32, 6, 6).to(dtype)
    out = core(x)
    assert out.dtype == dtype
    assert torch.equal(out, core(x.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(core(x.float()), core(x.float()))
        assert core(x.float()).dtype == torch.float32


def test_nmf_of_zeros_is_zero() -> None:
    x = torch.zeros(1, 32, 1, 1, requires_grad=True)
    out = NMF2D(32, 4).eval()(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_bases_are_not_in_the_state_dict() -> None:
    assert list(NMF2D(32, 4).state_dict()) == []


@pytest.mark.parametrize("of_meta", [False, True])
def test_bases_come_back_where_values_were_lost(of_meta: bool) -> None:
    """No state dict has them."""
    expected = NMF2D(8, 4)
    with torch.device("meta" if of_meta else "cpu"):
        module = NMF2D(8, 4)
    for emptied in (module.to_empty(device="cpu"), NMF2D(8, 4).to("meta").to_empty(device="cpu")):
        assert torch.equal(emptied.eval_bases, expected.eval_bases)
    assert torch.equal(expected.half().float().eval_bases, module.eval_bases)
    assert NMF2D(8, 4).to("meta").eval_bases.is_meta


def test_plain_head_resizes_all_maps_at_once() -> None:
    head = make_small_head()
    assert not any(key.startswith("freqfusions") for key in head.state_dict())
    maps = make_maps((9, 7), (5, 4), (3, 2))
    resized = [F.interpolate(x, size=(9, 7), mode="bilinear", align_corners=False) for x in maps[1:]]
    x = F.relu(head.squeeze(torch.cat([maps[0], *resized], dim=1)))
    y = head.hamburger.ham_out(head.hamburger.ham(F.relu(head.hamburger.ham_in(x))))
    expected = head.conv_seg(F.relu(head.align(F.relu(x + y))))
    assert_close("logits", head(maps), expected, 1e-6)


@pytest.mark.parametrize("fusion", ["bilinear", "nearest", "freqfusion"])
@pytest.mark.parametrize(
    "sizes", [[(9, 7), (5, 4), (3, 2)], [(1, 1), (1, 1), (1, 1)], [(8, 1), (4, 1), (2, 1)]]
)
def test_any_size(fusion: str, sizes: list[tuple[int, int]]) -> None:
    options = {"fusion_options": {"compressed_channels": 8}} if fusion == "freqfusion" else {}
    head = make_small_head(fusion, **options)
    out = head(make_maps(*sizes))
    assert out.shape == (2, 5, *sizes[0])
    assert bool(torch.isfinite(out).all())


def test_other_fusions_are_joined_fine_map_first() -> None:
    head = make_small_head("nearest")
    fine, middle, coarse = make_maps((8, 8), (4, 4), (2, 2))
    enlarged = F.interpolate(torch.cat([middle, F.interpolate(coarse, size=(4, 4))], dim=1), size=(8, 8))
    seen: list[Tensor] = []
    head.squeeze.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    head([fine, middle, coarse])
    assert torch.equal(seen[0], torch.cat([fine, enlarged], dim=1))


def test_freqfusion_channels_interleave_by_group() -> None:
    head = make_small_head("freqfusion", fusion_options={"compressed_channels": 8})
    fine, middle, coarse = make_maps((4, 4), (2, 2), (1, 1))
    outputs: list[Any] = []
    head.freqfusions[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    joined: list[Tensor] = []
    head.freqfusions[1].register_forward_pre_hook(
        lambda module, args, kwargs: joined.append(kwargs["lr_feat"]), with_kwargs=True
    )
    head([fine, middle, coarse])
    _, hr_feat, lr_feat = outputs[0]  # 12 and 20 channels in 4 groups: 3 and 5 a group
    for group in range(4):
        part = joined[0][:, 8 * group : 8 * group + 8]
        assert torch.equal(part[:, :3], hr_feat[:, 3 * group : 3 * group + 3])
        assert torch.equal(part[:, 3:], lr_feat[:, 5 * group : 5 * group + 5])


def test_settings_reach_the_fusion() -> None:
    head = LightHamHead([64, 160, 256], 3, fusion="freqfusion", compress_ratio=8, fusion_options={
        "feature_resample": False, "compressed_channels": 24,
    })  # fmt: skip
    own = create_fusion(
        "freqfusion", 160, 256, feature_resample=False, compressed_channels=24, hamming_window=False
    ).state_dict()
    stored = head.freqfusions[0].state_dict()
    assert {key: value.shape for key, value in stored.items()} == {k: v.shape for k, v in own.items()}
    wide = LightHamHead([64, 160, 256], 3, fusion="freqfusion", compress_ratio=8, fusion_options={
        "feature_resample": False,
    })  # fmt: skip
    assert wide.freqfusions[0].state_dict()["hr_channel_compressor.weight"].shape[0] == (160 + 256) // 8


def test_dropout_acts_in_training_only() -> None:
    maps = make_maps((8, 8), (4, 4), (2, 2))
    out = make_small_head(dropout=1.0)(maps)
    assert_close("evaluation", out, make_small_head(dropout=0.0)(maps), 1e-6)
    assert float(out.detach().abs().max()) > 0
    head = make_small_head(dropout=1.0).train()
    assert torch.equal(head(maps), torch.zeros(2, 5, 8, 8)), "no channel is left, and the bias is zero"


def test_fresh_classifier_is_small_and_other_convolutions_keep_the_variance() -> None:
    torch.manual_seed(0)
    head = LightHamHead([64, 160, 256], 150)
    assert float(head.conv_seg.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert head.conv_seg.bias is not None
    assert float(head.conv_seg.bias.detach().abs().max()) == 0
    assert float(head.squeeze.conv.weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_channels": [8]}, "at least two maps"),
        ({"fusion": "bilinear", "fusion_options": {"lowpass_kernel": 3}}, "takes no fusion_options"),
        ({"fusion": "freqfusion", "in_channels": [62, 64, 64]}, "feature_resample_group=4 must divide"),
        ({"fusion": "no such"}, "no such"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightHamHead(**{"in_channels": [8, 12, 20], "num_classes": 2, **arguments})


def test_wrong_number_of_maps() -> None:
    with pytest.raises(ValueError, match="got 2 maps, this head was built for 3"):
        make_small_head()(make_maps((2, 2), (1, 1), (1, 1))[:2])
