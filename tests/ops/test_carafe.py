"""The reassembly: golden numbers, the oracle, derivatives, layouts, dtypes, compilation, wrong input."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from freqfusion.ops import carafe, carafe_naive, normalize_kernels
from support import assert_close, load_golden

META, ARRAYS = load_golden("ops_carafe_a")
pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.mark.parametrize("operator", [carafe, carafe_naive])
@pytest.mark.parametrize("case", META["cases"], ids=lambda case: case["prefix"].strip("/"))
def test_golden(case: dict, operator: Callable[..., Tensor]) -> None:
    prefix = case["prefix"]
    x, kernels = (ARRAYS[f"{prefix}in/{name}"].clone().requires_grad_() for name in ("x", "mask"))
    out = operator(x, kernels, case["kernel_size"], case["group"], case["padding"])
    out.backward(ARRAYS[prefix + "cot"])
    assert x.grad is not None
    assert kernels.grad is not None
    assert_close("out", out, ARRAYS[prefix + "out"], 1e-12)
    assert_close("grad x", x.grad, ARRAYS[prefix + "grad/x"], 1e-12)
    assert_close("grad kernels", kernels.grad, ARRAYS[prefix + "grad/mask"], 1e-12)


def random_inputs(
    batch: int, groups: int, size: tuple[int, int], out_size: tuple[int, int], kernel: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2 * groups, *size, dtype=torch.float64, generator=generator)
    kernels = torch.randn(batch, groups * kernel**2, *out_size, dtype=torch.float64, generator=generator)
    return x, kernels


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3]),
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    extra_h=st.integers(-3, 12),
    extra_w=st.integers(-3, 12),
    kernel=st.sampled_from([1, 3, 5]),
    padding=st.sampled_from(["zeros", "reflect"]),
    channels_last=st.booleans(),
    seed=st.integers(0, 9),
)
def test_equals_naive_at_any_size(
    batch: int,
    groups: int,
    h: int,
    w: int,
    extra_h: int,
    extra_w: int,
    kernel: int,
    padding: str,
    channels_last: bool,
    seed: int,
) -> None:
    out_size = max(1, h + extra_h), max(1, w + extra_w)
    x, kernels = random_inputs(batch, groups, (h, w), out_size, kernel, seed)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    kernels.requires_grad_()
    fast, oracle = (
        carafe(x, kernels, kernel, groups, padding),
        carafe_naive(x, kernels, kernel, groups, padding),
    )
    assert_close("out", fast, oracle.detach(), 1e-12)
    cotangent = torch.randn_like(oracle)
    for name, actual, expected in zip(
        ("grad x", "grad kernels"),
        torch.autograd.grad(fast, (x, kernels), cotangent),
        torch.autograd.grad(oracle, (x, kernels), cotangent),
        strict=True,
    ):
        assert_close(name, actual, expected, 1e-12)


@pytest.mark.parametrize("out_size", [(27, 33), (28, 34), (14, 17), (56, 68)])
def test_centres_are_floor_of_ratio(out_size: tuple[int, int]) -> None:
    h, w = 14, 17
    x = torch.arange(h * w, dtype=torch.float64).reshape(1, 1, h, w)
    centre = torch.zeros(1, 25, *out_size, dtype=torch.float64)
    centre[:, 12] = 1
    rows = torch.tensor([row * h // out_size[0] for row in range(out_size[0])])
    columns = torch.tensor([column * w // out_size[1] for column in range(out_size[1])])
    assert torch.equal(carafe(x, centre, 5)[0, 0], x[0, 0][rows][:, columns])


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("out_size", [(4, 6), (3, 5), (2, 3)])
def test_gradcheck_to_second_order(out_size: tuple[int, int], padding: str) -> None:
    x, kernels = (tensor.requires_grad_() for tensor in random_inputs(1, 2, (2, 3), out_size, 3))

    def call(x: Tensor, kernels: Tensor) -> Tensor:
        return carafe(x, kernels, 3, 2, padding)

    assert torch.autograd.gradcheck(call, (x, kernels))
    assert torch.autograd.gradgradcheck(call, (x, kernels))


@pytest.mark.parametrize("out_size", [(10, 12), (9, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, out_size: tuple[int, int], each_backend: str) -> None:
    x, kernels = (tensor.to(dtype) for tensor in random_inputs(2, 2, (5, 6), out_size, 3))
    grad = torch.randn(2, 4, *out_size).to(dtype)
    for tensor in (x, kernels, grad):
        tensor.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operators = torch.ops.freqfusion
    for operator, arguments in (
        (operators.carafe, (x, kernels, 3, 2, False)),
        (operators.carafe, (x.detach().contiguous(memory_format=torch.channels_last), kernels, 3, 2, True)),
        (operators.carafe_backward_x, (kernels, grad, (5, 6), 3, 2, False)),
        (operators.carafe_backward_kernels, (x, grad, 3, 2, True)),
    ):
        results = torch.library.opcheck(operator.default, (*arguments, each_backend), test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("out_size", [(14, 20), (13, 19)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, out_size: tuple[int, int]) -> None:
    x, kernels = random_inputs(1, 1, (7, 10), out_size, 5)
    x, kernels = x.to(dtype), normalize_kernels(kernels, 5).to(dtype)
    out = carafe(x, kernels, 5)
    assert out.dtype == dtype
    exact = carafe(x.double(), kernels.double(), 5)
    assert_close("out", out, exact, torch.finfo(dtype).eps)  # one rounding, at the end


def test_mixed_dtypes_keep_that_of_x() -> None:
    x, kernels = random_inputs(1, 1, (3, 4), (6, 8), 3)
    x, kernels = x.bfloat16().requires_grad_(), kernels.float().requires_grad_()
    out = carafe(x, kernels, 3)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert kernels.grad is not None
    assert kernels.grad.dtype == torch.float32


def test_layouts() -> None:
    x, kernels = random_inputs(2, 2, (5, 6), (10, 12), 3)
    expected = carafe(x, kernels, 3, 2)
    last = carafe(x.contiguous(memory_format=torch.channels_last), kernels, 3, 2)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(last, expected, rtol=0, atol=1e-13)
    x_last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = carafe(x_last, kernels, 3, 2)
    (grad,) = torch.autograd.grad(out, x_last, out.detach())
    assert grad.is_contiguous(memory_format=torch.channels_last)
    strided = torch.randn(2, 4, 10, 12, dtype=torch.float64)[:, :, ::2, ::2]
    transposed = torch.randn(2, 9 * 2, 12, 10, dtype=torch.float64).transpose(2, 3)
    assert torch.equal(
        carafe(strided, transposed, 3, 2), carafe(strided.contiguous(), transposed.contiguous(), 3, 2)
    )


def test_empty_batch() -> None:
    x = torch.randn(0, 4, 3, 5, requires_grad=True)
    kernels = torch.randn(0, 9, 6, 10, requires_grad=True)
    out = carafe(x, kernels, 3)
    assert out.shape == (0, 4, 6, 10)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_no_kept_copies() -> None:
    """The backward pass keeps the two inputs and nothing of the size of a window times the map."""
    x, kernels = (tensor.requires_grad_() for tensor in random_inputs(1, 1, (8, 8), (16, 16), 5))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        carafe(x, kernels, 5)
    assert sorted(kept) == sorted([x.numel(), kernels.numel()])


def test_compiles_to_one_graph_for_all_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(carafe, fullgraph=True, dynamic=True, backend=counter)
    for size in ((3, 4), (5, 7), (6, 9)):
        x, kernels = random_inputs(2, 1, size, (2 * size[0], 2 * size[1]), 3)
        x.requires_grad_()
        compiled(x, kernels, 3).sum().backward()
        assert x.grad is not None
        reference = torch.autograd.grad(carafe(x, kernels, 3).sum(), x)[0]
        assert torch.allclose(x.grad, reference)
    assert counter.frame_count == 1


X, KERNELS = torch.zeros(1, 4, 3, 3), torch.zeros(1, 9, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], KERNELS, 3), ValueError, r"x must have 4 dimensions \(B, C, H, W\), got 3"),
        ((X, KERNELS[0], 3), ValueError, "kernels must have 4 dimensions"),
        ((X.long(), KERNELS, 3), TypeError, r"x must be floating point, got torch.int64.*\.float\(\)"),
        ((X, KERNELS, 5), ValueError, r"1 \* 5\*\*2 = 25 channels, got 9"),
        ((X, KERNELS, 2), ValueError, "kernel_size must be odd and at least 1.*got 2"),
        ((X, KERNELS, 3, 3), ValueError, "groups must divide the channels of x, got 3 groups for 4 channels"),
        ((X, KERNELS.expand(2, -1, -1, -1), 3), ValueError, "batch sizes differ: x has 1, kernels has 2"),
        ((X, KERNELS.to("meta"), 3), ValueError, "x is on cpu and kernels on meta"),
        ((X, KERNELS, 3, 1, "wrap"), ValueError, "padding_mode must be .* got 'wrap'"),
        ((X[:, :, :0], KERNELS, 3), ValueError, "empty side"),
    ],
)
def test_wrong_input(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        carafe(*arguments)
