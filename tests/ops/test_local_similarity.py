"""Local cosine similarity: golden numbers, the oracle, zero vectors, dtypes, wrong input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from freqfusion.ops import local_similarity, local_similarity_naive
from support import assert_close, load_golden

pytestmark = pytest.mark.usefixtures("each_backend")

META, ARRAYS = load_golden("ops_similarity_a")
COSINE_CASES = [case for case in META["cases"] if case["sim"] == "cos"]


@pytest.mark.parametrize("case", COSINE_CASES, ids=lambda case: case["prefix"].strip("/"))
def test_golden(case: dict) -> None:
    prefix = case["prefix"]
    x = ARRAYS[prefix + "in"].clone().requires_grad_()
    out = local_similarity(x, case["k"], case["dilation"])
    assert_close("out", out, ARRAYS[prefix + "out"], 1e-12)
    if prefix + "grad" in ARRAYS:
        out.backward(ARRAYS[prefix + "cot"])
        assert x.grad is not None
        assert_close("grad", x.grad, ARRAYS[prefix + "grad"], 1e-11)


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 6),
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    window=st.sampled_from([3, 5]),
    dilation=st.integers(1, 3),
)
def test_equals_naive(channels: int, height: int, width: int, window: int, dilation: int) -> None:
    x = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    out, oracle = (function(x, window, dilation) for function in (local_similarity, local_similarity_naive))
    assert_close("out", out, oracle.detach(), 1e-12)
    cotangent = torch.randn_like(oracle)
    actual, expected = (torch.autograd.grad(value, x, cotangent)[0] for value in (out, oracle))
    norm = (
        x.detach().norm(dim=1, keepdim=True).clamp_max(1)
    )  # the derivative, and so its rounding, grows as 1 / norm
    assert torch.allclose(actual * norm, expected * norm, rtol=1e-9, atol=1e-11)


def test_zero_vectors_have_similarity_zero() -> None:
    x = torch.ones(1, 3, 5, 5)
    x[:, :, 2, 2] = 0
    out = local_similarity(x, dilation=1)
    assert bool((out[0, :, 2, 2] == 0).all())
    assert float(out[0, 7, 1, 1]) == 0  # its neighbour below right


def test_gradcheck() -> None:
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(local_similarity, (x,))
    assert torch.autograd.gradgradcheck(local_similarity, (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(2, 64, 6, 7).to(dtype)
    out = local_similarity(x)
    assert out.dtype == dtype
    assert_close("out", out, local_similarity(x.double()), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("channels", [1, 2, 16, 256])
def test_rounding_in_float32(channels: int, each_backend: str) -> None:
    """The documented bound, down to vectors a little longer than the floor."""
    generator = torch.Generator().manual_seed(channels)
    unit = 4 * 2.0**-23
    largest = 0.0
    for scale in (1e-7, 1e-5, 1e-3, 1.0, 1e3):
        for window, dilation in ((3, 2), (5, 1)):
            x = torch.randn(2, channels, 6, 7, generator=generator)
            x = scale * (x + 0.2 * x.sign())  # no vector below the floor
            cotangent = torch.randn(2, window**2 - 1, 6, 7, generator=generator)
            leaves = [tensor.requires_grad_() for tensor in (x.clone(), x.double())]
            values = [local_similarity(leaf, window, dilation, backend=each_backend) for leaf in leaves]
            assert float((values[0].double() - values[1]).detach().abs().max()) <= unit
            grads = [
                torch.autograd.grad(value, leaf, cotangent.to(value.dtype))[0]
                for value, leaf in zip(values, leaves, strict=True)
            ]
            error = (grads[0].double() - grads[1]).norm(dim=1)
            # all that reaches a pixel: of its own similarities and of its neighbours' with it
            reach = window // 2 * dilation
            padded = F.pad(cotangent.abs().double(), [reach] * 4)
            incoming = cotangent.abs().double().sum(1)
            for channel in range(window**2 - 1):
                dy, dx = (p * dilation for p in divmod(channel + (channel >= window**2 // 2), window))
                incoming += padded[:, channel, 2 * reach - dy :, 2 * reach - dx :][:, :6, :7]
            bound = unit * incoming / x.double().norm(dim=1)
            assert bool((error <= bound).all())
            if channels == 1:  # a sign: the exact derivative is 0 where the floor is not reached
                assert bool((grads[1].abs() <= 1e-14 * incoming[:, None] / x.double().abs()).all())
            largest = max(largest, float((error / bound).max()))
    assert largest > 0.01  # the bound says something


def test_layouts_and_empty_batch() -> None:
    x = torch.randn(2, 4, 6, 7)
    expected = local_similarity(x)
    assert torch.allclose(
        local_similarity(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-6
    )
    assert torch.allclose(local_similarity(x.repeat(1, 1, 2, 1)[:, :, :6]), expected, atol=1e-6)
    assert local_similarity(torch.zeros(0, 4, 6, 7)).shape == (0, 8, 6, 7)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="window must be odd"):
        local_similarity(torch.zeros(1, 2, 3, 3), window=4)
    with pytest.raises(ValueError, match="window must be at least 3 and dilation at least 1, got 1 and 2"):
        local_similarity(torch.zeros(1, 2, 3, 3), window=1)
    with pytest.raises(TypeError, match="floating point"):
        local_similarity(torch.zeros(1, 2, 3, 3, dtype=torch.int64))
