"""NAF, AnyUp and JAFAR equal their authors' code; parameters are named and ordered like theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from features_golden import Case
from freqfusion.features import JAFAR, NAF, AnyUp, FeatureUpsampler, create_upsampler
from freqfusion.features._attention import around
from support import GOLDEN, load_golden

KEYS = json.loads((GOLDEN / "keys_features_attention.json").read_text())
SMALL = (
    "naf_default_x2",
    "naf_nonint_k5",
    "naf_bigimage_k3",
    "anyup_default_c12",
    "anyup_c32_outsize",
    "anyup_nowindow_k3_lfu",
    "anyup_natten",
    "jafar_c12",
    "jafar_nonint",
    "jafar_vdim_eq_qkdim_k3",
)
FULL = ("full_naf_c384", "full_anyup_c384", "full_anyup_natten_c384", "full_jafar_c384")


def _build(meta: dict[str, Any]) -> FeatureUpsampler:
    options = dict(meta["constructor"])
    for fixed in ("input_dim", "use_encoder", "init_gaussian_derivatives", "feature_dim"):
        options.pop(fixed, None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the first frequencies are not rounded in the files
    try:
        if meta["method"] == "naf":
            return NAF(**options)
        if meta["method"] == "anyup":
            return AnyUp(**options, natten=meta["use_natten"])
        return JAFAR(options.pop("v_dim"), **options)
    finally:
        torch.set_default_dtype(before)


def _size(meta: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[int, int]:
    height, width = meta["output_size"] or inputs["image"].shape[-2:]
    return height, width


@pytest.mark.parametrize("name", SMALL + FULL)
def test_equals_the_authors_code(name: str) -> None:
    case = Case(name)
    upsampler = case.fill(_build(case.meta))
    inputs = case.inputs()
    out = upsampler.upsample(inputs["features"], inputs["image"], _size(case.meta, inputs), None)
    case.check(upsampler, inputs, out)
    without = {f"param/{key}" for key, value in upsampler.named_parameters() if value.grad is None}
    assert name in FULL or without == set(case.meta["no_gradient"])


@pytest.mark.parametrize("name", SMALL)
def test_float32(name: str) -> None:
    case = Case(name)
    upsampler = case.fill(_build(case.meta)).float()
    inputs = {key: value.detach().float().requires_grad_() for key, value in case.inputs().items()}
    out = upsampler.upsample(inputs["features"], inputs["image"], _size(case.meta, inputs), None)
    assert float((out.detach() - case.arrays["out"]).abs().max()) <= 5e-5
    (out * case.arrays["cot"].float()).sum().backward()
    places = {f"in/{key}": value for key, value in inputs.items()}
    places |= {f"param/{key}": value for key, value in upsampler.named_parameters()}
    for key, value in places.items():
        if f"grad/{key}" in case.arrays:
            expected = case.arrays[f"grad/{key}"]
            # the bias of keys has none but what is rounded
            scale = max(float(expected.abs().max()), 1e-2 if "k_proj.bias" in key else 1e-3)
            assert float((value.grad - expected).abs().max()) <= 3e-4 * scale, key


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
def test_rows_at_a_time_equal_the_whole(name: str, chunk: int) -> None:
    case = Case(name)
    upsampler = case.fill(_build(case.meta))
    inputs = case.inputs()
    with torch.no_grad():
        out = upsampler.upsample(inputs["features"], inputs["image"], _size(case.meta, inputs), chunk)
    assert float((out - case.arrays["out"]).abs().max()) <= 1e-9


def test_windows_are_those_of_the_authors() -> None:
    meta, arrays = load_golden("anyup_windows")
    for number, case in enumerate(meta["cases"]):
        for axis, name in enumerate(("rows", "cols")):
            seen = around(case["output"][axis], case["coarse"][axis], case["ratio"]) > 0
            first = seen.int().argmax(1)
            assert torch.equal(torch.stack([first, first + seen.sum(1)], 1), arrays[f"{number}/{name}"])


@pytest.mark.parametrize(
    ("method", "channels", "options", "listed"),
    [
        ("naf", None, {}, "naf"),
        ("anyup", None, {}, "anyup"),
        ("anyup", None, {"natten": True}, "anyup_natten_converted"),
        ("jafar", 384, {}, "jafar_384"),
        ("jafar", 768, {}, "jafar_768"),
    ],
)
def test_keys_shapes_and_order_are_the_released_ones(
    method: str, channels: int | None, options: dict[str, Any], listed: str
) -> None:
    with torch.device("meta"):
        upsampler = create_upsampler(method, channels, **options)
    expected = KEYS[listed]
    own = {key: list(value.shape) for key, value in upsampler.state_dict().items()}
    assert own == expected["parameters"] | expected["buffers"]
    assert list(own) == [*expected["parameters"], *expected["buffers"]]
    assert sum(parameter.numel() for parameter in upsampler.parameters()) == expected["n_params"]


def test_weights_of_the_masked_form_become_those_of_the_other(tmp_path: Path) -> None:
    masked = create_upsampler("anyup", qk_dim=16)
    for parameter in masked.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(masked.state_dict(), tmp_path / "anyup.pth")
    converted = create_upsampler("anyup", weights=tmp_path / "anyup.pth", qk_dim=16, natten=True)
    assert isinstance(masked, AnyUp)
    # windows of either form that hold the whole map are the same
    features, image = torch.randn(2, 5, 3, 4), torch.rand(2, 3, 9, 12)
    masked.window_ratio = converted.window_ratio = 0.0
    torch.testing.assert_close(converted(features, image), masked(features, image), rtol=1e-4, atol=1e-5)


def test_jafars_file_holds_its_weights_under_its_name(tmp_path: Path) -> None:
    first = create_upsampler("jafar", 6, qk_dim=16)
    torch.save({"jafar": first.state_dict(), "epoch": 3}, tmp_path / "jafar.pth")
    second = create_upsampler("jafar", 6, weights=tmp_path / "jafar.pth", qk_dim=16)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
