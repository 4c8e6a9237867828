"""Upsamplers published after those that FreqFusion's paper compares with, against numbers of their authors' code."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from freqfusion.fusion import LDAAQU, SAPAD, FADELite, Fusion, ReSFU
from support import GOLDEN, load_golden

METHODS: dict[str, type[Fusion]] = {
    "fade_lite": FADELite,
    "lda_aqu": LDAAQU,
    "resfu": ReSFU,
    "sapa_d": SAPAD,
}
# arguments that say what our contract says otherwise, or what the released code never varies
IMPLIED = {"in_channels", "in_channels_en", "in_channels_de", "dim_y", "dim_x", "scale", "y_conv", "lr_mult"}
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz") if path.stem.startswith(tuple(METHODS)))
FULL = sorted(
    path.stem
    for method in METHODS
    for path in GOLDEN.glob("full_*.npz")
    if path.stem.startswith(f"full_{method}")
)


def build(meta: dict[str, Any], hr_channels: int, lr_channels: int) -> Fusion:
    options = {key: value for key, value in meta["constructor"].items() if key not in IMPLIED}
    if meta["method"] == "lda_aqu":
        options.pop("scale_factor")
    return METHODS[meta["method"]](hr_channels, lr_channels, **options)


def guide(lr: Tensor, out: Tensor) -> Tensor:
    """What a method without a guide gets: only the size of the fine map matters."""
    return torch.zeros(len(lr), 1, *out.shape[-2:], dtype=lr.dtype)


def check(name: str, actual: Tensor | None, expected: Tensor, tolerance: float) -> None:
    """Some gradients are zero by structure: those below 1e-3 are compared as if they were that large."""
    assert actual is not None, f"{name}: missing"
    assert actual.shape == expected.shape, name
    error = float((actual.double() - expected).abs().max())
    assert error <= tolerance * max(float(expected.abs().max()), 1e-3), (name, error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, dtype: torch.dtype) -> None:
    meta, arrays = load_golden(case)
    out_tolerance, tolerance = (1e-9, 1e-8) if dtype == torch.float64 else (5e-5, 3e-4)
    lr = arrays["in/lr"].to(dtype).requires_grad_()
    hr = arrays["in/hr"].to(dtype).requires_grad_() if "in/hr" in arrays else guide(lr, arrays["out"])
    fusion = build(meta, hr.shape[1], lr.shape[1]).to(dtype)
    prefixes = ("param/", "buffer/")
    state = {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(prefixes)}
    fusion.load_state_dict(state, strict=True)
    _, fine, out = fusion(hr_feat=hr, lr_feat=lr)
    assert fine is hr
    assert float((out.detach() - arrays["out"]).abs().max()) <= out_tolerance
    out.backward(arrays["cot"].to(dtype))
    inputs = {"lr": lr, "hr": hr} if "in/hr" in arrays else {"lr": lr}
    for name, x in inputs.items():
        check(f"grad {name}", x.grad, arrays[f"grad/in/{name}"], tolerance)
    left_out = {name.removeprefix("param/") for name in meta["gradients_left_out"]}
    compared = dict(fusion.named_parameters()).keys() - left_out
    assert compared
    for name in compared:
        gradient = fusion.get_parameter(name).grad
        check(f"grad {name}", gradient, arrays[f"grad/param/{name}"], tolerance)


def unit(seed: int, shape: list[int]) -> Tensor:
    """Numbers in [-1, 1) by the golden files' formula, in 32 bits."""
    x = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * 2654435761 + (seed + 1) * 2654404609
    x %= 2**32
    x ^= x >> 16
    x = x * 2246822519 % 2**32
    x ^= x >> 13
    x = x * 3266489917 % 2**32
    x ^= x >> 16
    return torch.from_numpy(x.astype(np.float64) / 2**31 - 1).reshape(shape)


def fill(fusion: Fusion) -> None:
    """Weights by the golden files' rule."""
    state = fusion.state_dict()
    for number, key in enumerate(sorted(state)):
        shape = list(state[key].shape)
        if key == "GF.kernel":
            continue
        values = unit(number, shape)
        if len(shape) > 1:
            state[key] = 1.5 * values / (values.numel() / shape[0]) ** 0.5
        else:
            state[key] = 1 + 0.2 * values if key.endswith("weight") else 0.2 * values
    fusion.load_state_dict(state)


@pytest.mark.parametrize("case", FULL)
def test_released_sizes(case: str) -> None:
    meta, arrays = load_golden(case)
    shapes = meta["input_shapes"]
    inputs = {
        name: (1.5 * unit(1000 + number, shape)).requires_grad_()
        for number, (name, shape) in enumerate(shapes.items())
    }
    lr = inputs["lr"]
    hr = inputs["hr"] if "hr" in inputs else guide(lr, torch.empty(meta["out_shape"]))
    fusion = build(meta, hr.shape[1], lr.shape[1]).double()
    keys = {key: list(value.shape) for key, value in fusion.state_dict().items()}
    assert list(keys.items()) == list(meta["state_dict_shapes"].items())
    assert sum(parameter.numel() for parameter in fusion.parameters()) == meta["n_params"]
    fill(fusion)
    out = fusion(hr, lr).lr_feat
    out.backward(unit(2000, meta["out_shape"]))
    for name, value in {"out": out, **{f"grad/in/{name}": x.grad for name, x in inputs.items()}}.items():
        assert value is not None
        value = value.detach()
        expected = arrays[f"{name}/value"]
        largest = float(value.abs().max())
        assert float((value.flatten()[arrays[f"{name}/index"]] - expected).abs().max()) <= 1e-9 * largest, (
            name
        )
        sums = torch.stack([value.sum(), value.abs().sum()])
        assert float((sums - arrays[f"{name}/sum"]).abs().max()) <= 1e-9 * float(value.abs().sum()), name
