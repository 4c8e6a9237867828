"""FreqFusion against numbers made with the released code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from freqfusion import FreqFusion
from support import GOLDEN, assert_close, load_golden

CASES = sorted(path.stem for path in GOLDEN.glob("ff_a*.npz"))


def build(meta: dict[str, Any], arrays: dict[str, Tensor], dtype: torch.dtype) -> FreqFusion:
    options = {"feature_resample": False, **meta["kwargs"]}  # off by default in the released class
    module = FreqFusion(padding_mode=meta["padding"], direction_feat=meta["direction_feat"], **options)
    state = {
        key.split("/", 1)[1]: value for key, value in arrays.items() if key.startswith(("param/", "buffer/"))
    }
    module.to(dtype).load_state_dict(state, strict=True)
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, dtype: torch.dtype) -> None:
    meta, arrays = load_golden(case)
    module = build(meta, arrays, dtype)
    hr, lr = (arrays[f"in/{name}"].to(dtype).requires_grad_() for name in ("hr", "lr"))
    fused = module(hr_feat=hr, lr_feat=lr)
    loss = (fused.hr_feat * arrays["cot/hr"].to(dtype)).sum() + (
        fused.lr_feat * arrays["cot/lr"].to(dtype)
    ).sum()
    loss.backward()
    out_tolerance, grad_tolerance = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 2e-5)
    assert fused.lowpass_kernel is not None
    assert_close("mask", fused.lowpass_kernel, arrays["out/mask"], out_tolerance)
    assert_close("hr", fused.hr_feat, arrays["out/hr"], out_tolerance)
    assert_close("lr", fused.lr_feat, arrays["out/lr"], out_tolerance)
    gradients = {"hr": hr.grad, "lr": lr.grad}
    gradients |= {f"param/{name}": parameter.grad for name, parameter in module.named_parameters()}
    expected = {key.removeprefix("grad/"): value for key, value in arrays.items() if key.startswith("grad/")}
    assert {name for name, value in gradients.items() if value is not None} == expected.keys()
    for name, value in expected.items():
        actual = gradients[name]
        assert actual is not None
        assert_close(f"grad {name}", actual, value, grad_tolerance)


@pytest.mark.parametrize("case", CASES)
def test_windows_are_those_of_the_released_code(case: str) -> None:
    meta, arrays = load_golden(case)
    module = FreqFusion(**{"feature_resample": False, **meta["kwargs"]})
    for name in ("hamming_lowpass", "hamming_highpass"):
        assert torch.equal(getattr(module, name).double(), arrays[f"buffer/{name}"]), name
