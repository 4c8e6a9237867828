"""The peer methods against numbers made with their authors' code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from freqfusion.fusion import (
    A2U,
    CARAFE,
    FADE,
    SAPA,
    Bilinear,
    Deconv,
    DySample,
    Fusion,
    IndexNet,
    Nearest,
    PixelShuffle,
)
from support import GOLDEN, load_golden, relative_error

METHODS: dict[str, type[Fusion]] = {
    "nearest": Nearest,
    "bilinear": Bilinear,
    "deconv": Deconv,
    "pixelshuffle": PixelShuffle,
    "carafe": CARAFE,
    "indexnet": IndexNet,
    "a2u": A2U,
    "fade": FADE,
    "sapa_b": SAPA,
    "dysample": DySample,
}
NORMS = {"GroupNorm(32)": "group", "LayerNorm": "layer", None: "none"}
# arguments that say what our contract says otherwise: channels, sizes, and what follows from the kernel
IMPLIED = {
    "in_channels",
    "out_channels",
    "channels",
    "in_channels_en",
    "in_channels_de",
    "dim_y",
    "dim_x",
    "size",
    "stride",
    "padding",
    "output_padding",
    "group",
}
NEWER = ("fade_lite", "sapa_d")  # in test_newer_golden.py
CASES = sorted(
    path.stem
    for path in GOLDEN.glob("*.npz")
    if path.stem.split("_")[0] in {*METHODS, "sapa"} and not path.stem.startswith(NEWER)
)


def build(method: str, constructor: dict[str, Any], hr_channels: int, lr_channels: int) -> Fusion:
    options = {key: value for key, value in constructor.items() if key not in IMPLIED}
    if method in ("nearest", "bilinear"):
        options.pop("scale_factor", None)
    if method == "dysample" and "scale_factor" in options:
        options["scale"] = options.pop("scale_factor")
    if method == "sapa_b":
        options["norm"] = NORMS[options["norm"]]
    return METHODS[method](hr_channels, lr_channels, **options)


def selected(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def check(name: str, actual: Tensor | None, expected: Tensor, tolerance: float) -> None:
    assert actual is not None, f"{name}: missing"
    assert actual.shape == expected.shape, name
    assert relative_error(actual, expected) <= tolerance, (name, relative_error(actual, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_statistics(case: str, dtype: torch.dtype) -> None:
    meta, arrays = load_golden(case)
    lr = arrays["in/lr"].to(dtype).requires_grad_()
    guided = "in/hr" in arrays
    if guided:
        hr = arrays["in/hr"].to(dtype).requires_grad_()
    else:  # unguided: only the size of the fine map matters
        hr = torch.zeros(lr.shape[0], 1, *arrays["out"].shape[-2:], dtype=dtype)
    module = build(meta["method"], meta["constructor"], hr.shape[1], lr.shape[1]).to(dtype)
    module.load_state_dict(selected(arrays, "param/") | selected(arrays, "buffer/"), strict=True)
    module.train(meta["training_mode"])
    _, fine, out = module(hr_feat=hr, lr_feat=lr)
    assert fine is hr
    out.backward(arrays["cot"].to(dtype))
    out_tolerance, grad_tolerance = (1e-9, 1e-9) if dtype == torch.float64 else (2e-5, 5e-5)
    check("out", out, arrays["out"], out_tolerance)
    check("grad lr", lr.grad, arrays["grad/in/lr"], grad_tolerance)
    if guided:
        check("grad hr", hr.grad, arrays["grad/in/hr"], grad_tolerance)
    gradients = selected(arrays, "grad/param/")
    renamed = renamed_gradients(module, gradients)
    parameters = dict(module.named_parameters())
    assert renamed.keys() == parameters.keys()
    for name, expected in renamed.items():
        check(f"grad {name}", parameters[name].grad, expected.reshape(parameters[name].shape), grad_tolerance)
    buffers = dict(module.named_buffers())
    for name, expected in selected(arrays, "buffer_after/").items():
        check(name, buffers[name].double(), expected.double(), out_tolerance)


def renamed_gradients(module: Fusion, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients under our parameter names: they travel through the module's own key map."""
    renamed = dict(gradients)
    hooks: list[Callable[..., Any]] = list(module._load_state_dict_pre_hooks.values())
    for hook in hooks:
        hook(renamed, "", {}, True, [], [], [])
    return renamed


@pytest.mark.parametrize("case", ["fpn_topdown_carafe", "fpn_topdown_fade_nogate"])
def test_a_whole_top_down_path(case: str) -> None:
    meta, arrays = load_golden(case)
    inputs = [arrays[f"in/l{level}"].clone().requires_grad_() for level in range(4)]
    levels = list(inputs)
    modules = []
    for index in range(3):
        module = build(meta["method"], meta["constructor"], 8, 8).double()
        module.load_state_dict(selected(arrays, f"param/{index}."), strict=True)
        modules.append(module)
    for level in (3, 2, 1):
        fused = modules[level - 1](hr_feat=levels[level - 1], lr_feat=levels[level])
        levels[level - 1] = fused.hr_feat + fused.lr_feat
    sum((levels[level] * arrays[f"cot/l{level}"]).sum() for level in range(4)).backward()
    for level in range(4):
        check(f"out {level}", levels[level], arrays[f"out/l{level}"], 1e-9)
        check(f"grad {level}", inputs[level].grad, arrays[f"grad/in/l{level}"], 1e-9)
