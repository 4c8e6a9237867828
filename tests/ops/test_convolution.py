"""The convolution to few channels: Triton's kernel against float64, and torch's where it cannot serve."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops import available_backends, explain, use_backend
from freqfusion.ops.convolution.op import convolution

REASON = available_backends()["triton"]
triton = pytest.mark.skipif(bool(REASON), reason=REASON or "triton is there")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F16, LAST = torch.float16, torch.channels_last


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def arguments(
    shape: tuple[int, ...], outputs: int, kernel_size: int = 3, dtype: torch.dtype = F16
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=LAST)
    weight = torch.randn(outputs, shape[1], kernel_size, kernel_size, device=DEVICE).to(dtype)
    bias = torch.randn(outputs, device=DEVICE).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().cpu().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


@triton
@pytest.mark.parametrize(
    ("shape", "outputs", "kernel_size", "dilation"),
    [
        ((2, 16, 5, 7), 9, 3, 1),
        ((1, 24, 9, 6), 25, 3, 1),
        ((1, 40, 1, 1), 1, 3, 1),
        ((1, 8, 6, 5), 17, 1, 1),
        ((2, 8, 7, 6), 32, 5, 1),
        ((1, 8, 8, 9), 3, 3, 2),
    ],
)
def test_agrees_with_float64(shape: tuple[int, ...], outputs: int, kernel_size: int, dilation: int) -> None:
    inputs = arguments(shape, outputs, kernel_size)
    exact = tuple(tensor.detach().cpu().double().requires_grad_() for tensor in inputs)
    expected = F.conv2d(*exact, padding=dilation * (kernel_size // 2), dilation=dilation)
    with use_backend("triton"):
        actual = convolution(*inputs, dilation)[0]
    assert actual.dtype == F16
    assert outputs == 1 or actual.is_contiguous(memory_format=LAST)
    assert error(actual, expected) < 5e-4
    grad = torch.randn(actual.shape, device=DEVICE).to(F16)
    found = torch.autograd.grad(actual, inputs, grad)
    wanted = torch.autograd.grad(expected, exact, grad.cpu().double())
    for name, value, right, like in zip(("x", "weight", "bias"), found, wanted, inputs, strict=True):
        assert value.dtype == like.dtype
        assert error(value, right) < 1e-3, name


@triton
@pytest.mark.parametrize(("shape", "outputs"), [((2, 16, 5, 7), 9), ((1, 40, 1, 2), 1), ((3, 8, 8, 9), 25)])
@pytest.mark.parametrize("dtype", [F16, torch.bfloat16])
def test_sums_of_what_it_reads(shape: tuple[int, ...], outputs: int, dtype: torch.dtype) -> None:
    """Counted from the first pixel of each image, for a normalisation of channels far from zero."""
    x, weight, bias = arguments(shape, outputs, dtype=dtype)
    x = (x.detach() + 300).requires_grad_()
    with use_backend("triton"):
        out, sums = convolution(x, weight, bias, summing=True)
        alone, nothing = convolution(x, weight, bias)
    assert nothing is None
    assert torch.equal(out, alone)
    assert sums is not None
    assert not sums.requires_grad
    away = (x - x[:, :, :1, :1].detach()).detach().cpu().double()
    expected = torch.stack((away.sum((2, 3)), away.square().sum((2, 3))), 1)
    assert sums.shape == expected.shape
    torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-6, atol=1e-3)


@triton
def test_a_bias_of_float32_is_added_before_rounding() -> None:
    x, weight, _ = arguments((1, 8, 4, 4), 2)
    bias = torch.tensor([1000.0, 0.0], device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        out = convolution(x, weight / 100, bias)[0]
    expected = F.conv2d(x.double(), (weight / 100).double(), bias.double(), padding=1)
    assert error(out, expected.cpu()) < 5e-4
    out.sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


@triton
def test_a_bad_value_reaches_its_neighbours_alone() -> None:
    x, weight, bias = arguments((1, 8, 6, 9), 5)
    x = x.detach()
    x[0, 3, 2, 4] = float("inf")
    with use_backend("triton"):
        bad = ~convolution(x, weight, bias)[0][0].isfinite().all(0)
    assert bad.nonzero().tolist() == [[i, j] for i in (1, 2, 3) for j in (3, 4, 5)]


@triton
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x, w: (x.float(), w.float()), "half precision"),
        (lambda x, w: (x.contiguous(), w), "side by side"),
        (lambda x, w: (x[:, :4], w[:, :4]), "side by side"),
        (lambda x, w: (x, w.repeat(7, 1, 1, 1)), "at most 32 channels"),
        (lambda x, w: (x[:0], w), "side by side"),
    ],
    ids=["float32", "rows", "four channels", "35 channels", "empty"],
)
def test_torch_serves_elsewhere(change, why: str) -> None:
    x, weight, _ = arguments((1, 8, 5, 4), 5)
    x, weight = change(x.detach(), weight.detach())
    bias = torch.zeros(len(weight), device=DEVICE)
    with use_backend("triton"):
        found = explain("convolution", x, weight) if x.numel() else None
        out = convolution(x, weight, bias)[0]
    if found is not None:
        assert found.backend == "torch"
        assert why in found.cannot["triton"]
    assert torch.equal(out, F.conv2d(x, weight, bias.to(x.dtype), padding=1))


@triton
def test_opcheck() -> None:
    inputs = arguments((1, 8, 3, 4), 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for summing in (False, True):
        results = torch.library.opcheck(
            torch.ops.freqfusion.convolution.default, (*inputs, 1, summing), test_utils=tests
        )
        assert set(results.values()) == {"SUCCESS"}, results


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    inputs = tuple(
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 2, 3, 4), (2, 2, 3, 3), (2,))
    )
    assert torch.autograd.gradgradcheck(lambda *inputs: convolution(*inputs)[0], inputs)
