"""Group normalisation with the similarity of its result: the composed form, and Triton's kernels against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops import available_backends, explain, local_similarity, use_backend
from freqfusion.ops.convolution.op import convolution
from freqfusion.ops.normalized_similarity.op import normalized_similarity

REASON = available_backends()["triton"]
triton = pytest.mark.skipif(bool(REASON), reason=REASON or "triton is there")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16 = torch.float32, torch.float16
FIRST, LAST = torch.contiguous_format, torch.channels_last
TOLERANCE = {F32: 2e-6, F16: 1e-3}


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype = F32, layout: torch.memory_format = FIRST, mean: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    x = (torch.randn(shape) + mean).to(DEVICE, dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randn(shape[1], device=DEVICE, dtype=dtype) for _ in range(2))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def composed(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    normalized = F.group_norm(x, groups, weight, bias, 1e-5)
    return torch.cat((normalized, local_similarity(normalized)), 1)


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().cpu().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_agrees(inputs: tuple[Tensor, ...], groups: int, tolerance: float) -> None:
    """Result and gradients with those in float64."""
    exact = tuple(tensor.detach().cpu().double().requires_grad_() for tensor in inputs)
    expected = composed(*exact, groups)
    with use_backend("triton"):
        actual = normalized_similarity(*inputs, groups)
    assert actual.dtype == inputs[0].dtype
    assert actual.is_contiguous(memory_format=FIRST if inputs[0].is_contiguous() else LAST)
    grad = torch.randn(actual.shape, device=DEVICE).to(actual.dtype)
    found = torch.autograd.grad(actual, inputs, grad)
    wanted = torch.autograd.grad(expected, exact, grad.cpu().double())
    assert error(actual, expected) < tolerance
    for name, value, right, like in zip(("x", "weight", "bias"), found, wanted, inputs, strict=True):
        assert value.dtype == like.dtype
        assert error(value, right) < 2 * tolerance, name


def test_elsewhere_it_is_composed() -> None:
    inputs = arguments((2, 16, 5, 7))
    with use_backend("torch"):
        assert torch.equal(normalized_similarity(*inputs, 2), composed(*inputs, 2))


@triton
@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 16, 5, 7), 2),
        ((1, 24, 3, 4), 3),
        ((3, 8, 1, 1), 1),
        ((2, 12, 6, 3), 3),
        ((1, 64, 9, 13), 8),
        ((1, 72, 4, 5), 9),
    ],
)
def test_agrees_with_float64(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    assert_agrees(arguments(shape, dtype, layout), groups, TOLERANCE[dtype])


@triton
def test_groups_of_another_size_are_composed() -> None:
    assert_agrees(arguments((1, 18, 4, 5)), 2, 2e-6)  # of nine channels


@triton
@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_a_large_mean_costs_no_digits(layout: torch.memory_format) -> None:
    """Beyond those of the input itself; sums of squares of numbers near 1000 would keep one digit of the variance."""
    x, weight, bias = arguments((2, 16, 12, 11), F32, layout, mean=1000.0)
    assert_agrees((x, weight, bias), 2, 1e-4)


@triton
def test_a_constant_map_becomes_the_bias() -> None:
    x, weight, bias = arguments((1, 8, 4, 4))
    x = torch.full_like(x, 3.7).requires_grad_()
    with use_backend("triton"):
        joined = normalized_similarity(x, weight, bias, 1)
        joined.sum().backward()
    assert torch.allclose(joined[:, :8], bias[None, :, None, None].expand(1, 8, 4, 4), atol=1e-4)
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@triton
def test_the_same_in_every_run_of_any_batch() -> None:
    x, weight, bias = arguments((3, 16, 9, 32))
    with use_backend("triton"):
        together = normalized_similarity(x, weight, bias, 2)
        again = normalized_similarity(x, weight, bias, 2)
    assert torch.equal(together, again)


@triton
def test_sums_that_are_known_are_not_taken_again() -> None:
    """They are what a convolution has of the map; of others the results would be wrong."""
    x, weight, bias = arguments((2, 16, 5, 7), F16, LAST)
    kernel = torch.zeros(3, 16, 3, 3, device=DEVICE, dtype=F16)
    with use_backend("triton"):
        _, sums = convolution(x, kernel, kernel.new_zeros(3), summing=True)
        assert sums is not None
        expected = normalized_similarity(x, weight, bias, 2)
        found = normalized_similarity(x, weight, bias, 2, sums=sums)
        wrong = normalized_similarity(x, weight, bias, 2, sums=2 * sums)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert error(wrong[:, :16], expected.detach().cpu().double()[:, :16]) > 0.1
    grad = torch.randn(expected.shape, device=DEVICE).to(F16)
    of_expected = torch.autograd.grad(expected, (x, weight, bias), grad)
    for value, right in zip(torch.autograd.grad(found, (x, weight, bias), grad), of_expected, strict=True):
        assert error(value, right.cpu().double()) < TOLERANCE[F16]


@triton
def test_weights_of_another_dtype() -> None:
    """As under autocast: the map in half precision, the parameters in float32."""
    x, weight, bias = arguments((2, 16, 5, 7), F16, LAST)
    wide = tuple(tensor.detach().float().requires_grad_() for tensor in (weight, bias))
    assert_agrees((x, *wide), 2, TOLERANCE[F16])


@triton
def test_weights_that_do_not_lie_side_by_side() -> None:
    x, weight, bias = arguments((2, 16, 5, 7))
    strided = (
        torch.randn(32, device=DEVICE)[::2].requires_grad_(),
        bias.detach()[:1].expand(16).requires_grad_(),
    )
    assert_agrees((x, *strided), 2, TOLERANCE[F32])
    with use_backend("triton"), pytest.raises(RuntimeError, match="weight"):
        normalized_similarity(x, weight[:8], bias, 2)


@triton
def test_a_bad_value_spoils_its_group_of_its_image() -> None:
    """And of that all it says about gradients: a huge number in place of NaN would pass for one."""
    for bad in (float("nan"), float("inf")):
        x, weight, bias = arguments((2, 8, 4, 5))
        x.data[1, 1, 2, 3] = bad
        with use_backend("triton"):
            joined = normalized_similarity(x, weight, bias, 2)
            in_x, in_weight, in_bias = torch.autograd.grad(joined.sum(), (x, weight, bias))
        spoilt = torch.zeros(2, 8, dtype=torch.bool)
        spoilt[1, :4] = True
        assert torch.equal(joined[:, :8].isnan().all((2, 3)).cpu(), spoilt)
        assert bool(joined[0].isfinite().all())
        assert bool(in_x[0].isfinite().all())
        assert bool(in_x[1].isnan().all())  # all pixels have cosines with spoilt ones
        assert bool(in_weight.isnan().all())
        assert bool(in_bias.isnan().all())


@triton
def test_second_derivatives() -> None:
    inputs = arguments((1, 8, 3, 4))

    def twice(function) -> list[Tensor]:
        out = function()
        torch.manual_seed(1)
        grad = torch.randn(out.shape, device=DEVICE).requires_grad_()
        first = torch.autograd.grad(out, inputs, grad, create_graph=True)
        total = sum((value * torch.randn_like(value)).sum() for value in first)
        return [value.detach() for value in torch.autograd.grad(total, (*inputs, grad))]

    with use_backend("triton"):
        found = twice(lambda: normalized_similarity(*inputs, 1))
    with use_backend("torch"):
        expected = twice(lambda: composed(*inputs, 1))
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-4)


@triton
def test_opcheck() -> None:
    x, weight, bias = arguments((1, 8, 2, 3), F32, LAST)
    operators = torch.ops.freqfusion
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for sums in (None, torch.ones(1, 2, 8, device=DEVICE)):
        results = torch.library.opcheck(
            operators.normalized_similarity.default, (x, weight, bias, sums, 1, 1e-5), test_utils=tests
        )
        assert set(results.values()) == {"SUCCESS"}, results


@triton
def test_explains_what_it_cannot() -> None:
    with use_backend("triton"):
        assert explain("normalized_similarity", torch.zeros(1, 8, 4, 4, device=DEVICE)).backend == "triton"
        wide = explain("normalized_similarity", torch.zeros(1, 512, 4, 4, device=DEVICE))
    assert wide.backend == "torch"
    assert "more than 256 channels" in wide.cannot["triton"]
