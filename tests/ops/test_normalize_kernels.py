"""Kernel normalisation: golden numbers, the oracle, dtypes, wrong input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freqfusion.ops import normalize_kernels, normalize_kernels_naive
from support import assert_close, load_golden

META, ARRAYS = load_golden("ops_kernel_normalizer_a")


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: case["prefix"].strip("/"))
def test_golden(case: dict) -> None:
    prefix = case["prefix"]
    window = ARRAYS[prefix + "hamming"] if case["hamming"] else None
    logits = ARRAYS[prefix + "in"].clone().requires_grad_()
    out = normalize_kernels(logits, case["kernel"], window=window)
    out.backward(ARRAYS[prefix + "cot"])
    assert logits.grad is not None
    assert_close("out", out, ARRAYS[prefix + "out"], 1e-12)
    assert_close("grad", logits.grad, ARRAYS[prefix + "grad"], 1e-12)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3),
    kernel=st.sampled_from([1, 3, 5, 7]),
    height=st.integers(1, 4),
    width=st.integers(1, 5),
    windowed=st.booleans(),
)
def test_equals_naive(groups: int, kernel: int, height: int, width: int, windowed: bool) -> None:
    logits = 5 * torch.randn(2, groups * kernel**2, height, width, dtype=torch.float64)
    window = torch.rand(kernel, kernel, dtype=torch.float64) + 0.1 if windowed else None
    out = normalize_kernels(logits, kernel, groups, window)
    assert_close("out", out, normalize_kernels_naive(logits, kernel, groups, window), 1e-12)
    sums = out.reshape(2, groups, kernel**2, height, width).sum(2)
    assert torch.allclose(sums, torch.ones_like(sums))
    assert bool((out >= 0).all())


def test_gradcheck() -> None:
    logits = torch.randn(1, 18, 2, 3, dtype=torch.float64, requires_grad=True)
    window = torch.rand(3, 3, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda x: normalize_kernels(x, 3, 2, window), (logits,))
    assert torch.autograd.gradgradcheck(lambda x: normalize_kernels(x, 3, 2, window), (logits,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    logits = (20 * torch.randn(2, 25, 3, 4)).to(dtype)
    out = normalize_kernels(logits, 5)
    assert out.dtype == dtype
    assert_close("out", out, normalize_kernels(logits.double(), 5), torch.finfo(dtype).eps)


def test_empty_batch() -> None:
    assert normalize_kernels(torch.zeros(0, 9, 3, 3), 3).shape == (0, 9, 3, 3)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"2 \* 3\*\*2 = 18 channels, got 9"):
        normalize_kernels(torch.zeros(1, 9, 2, 2), 3, groups=2)
    with pytest.raises(ValueError, match=r"window must have kernel_size\*\*2 = 9 entries"):
        normalize_kernels(torch.zeros(1, 9, 2, 2), 3, window=torch.ones(5, 5))
    with pytest.raises(TypeError, match="logits must be floating point"):
        normalize_kernels(torch.zeros(1, 9, 2, 2, dtype=torch.int32), 3)
