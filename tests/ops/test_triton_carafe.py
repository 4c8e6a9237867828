"""The kernels of the reassembly, each on awkward shapes, and what they take of a GPU, which needs none.

As in ``test_triton.py``, Triton's interpreter runs them where there is no GPU. It takes the bits of bfloat16 for
numbers in a product of matrices, so half precision is float16 here.
"""

import inspect
from types import ModuleType

import pytest
import torch
from torch import Tensor

from freqfusion.ops import available_backends, carafe, carafe_naive, explain, use_backend
from freqfusion.ops.carafe import op
from freqfusion.ops.carafe.logits import _applied_kernels, add_low_pass, carafe_from_logits
from support import run_compiling

REASON = available_backends()["triton"]
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "triton is there")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

F32, F16 = torch.float32, torch.float16
TOLERANCE = {F32: 1e-6, F16: 5e-4}
FIRST, LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().cpu().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def random_map(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=layout).requires_grad_()


def assert_agrees(
    x: Tensor,
    kernels: Tensor,
    cotangent: Tensor,
    kernel_size: int,
    groups: int,
    padding: str,
    gain: int | None,
    window: Tensor | None,
    tolerance: float | None = None,
) -> None:
    """Result and gradients with those in float64: of the reassembly, or from logits where there is a gain."""
    with use_backend("triton"):
        if gain is None:
            out = carafe(x, kernels, kernel_size, groups, padding)
        else:
            out = carafe_from_logits(x, kernels, kernel_size, groups, window, gain, padding)
        grads = torch.autograd.grad(out, (x, kernels), cotangent)
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in (x, kernels)]
    applied = exact[1]
    if gain is not None:
        applied = _applied_kernels(
            applied, kernel_size, groups, None if window is None else window.cpu(), gain
        )
    expected = carafe_naive(exact[0], applied, kernel_size, groups, padding)
    wanted = torch.autograd.grad(expected, exact, cotangent.cpu().double())
    for name, actual, right, like in zip(
        ("result", "gradient in x", "gradient in kernels"),
        (out, *grads),
        (expected, *wanted),
        (x, x, kernels),
        strict=True,
    ):
        assert actual.dtype == like.dtype, name
        assert error(actual, right) < (tolerance or TOLERANCE[x.dtype]), name


@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize(
    ("dtype", "channels", "groups", "size", "out_size", "kernel", "padding", "gain", "served"),
    [
        (F16, 5, 1, (6, 13), (6, 13), 3, "zeros", None, "both gradients: bands"),
        (F16, 34, 1, (2, 9), (2, 9), 3, "zeros", 2, "both gradients: bands"),
        (F16, 6, 3, (2, 13), (2, 13), 5, "reflect", 1, "both gradients: bands"),
        (F16, 6, 2, (3, 5), (6, 10), 5, "zeros", None, "forward: bands"),
        (F16, 9, 1, (5, 3), (10, 6), 3, "zeros", 2, "gradient in x: bands"),
        (F16, 4, 2, (3, 5), (5, 9), 3, "reflect", 1, "gradient in x: bands"),  # rounded up, then halved
        (F16, 3, 1, (5, 4), (3, 3), 5, "zeros", 0, "in kernels: bands"),  # fewer pixels than x
        (F16, 2, 1, (1, 2), (3, 8), 3, "zeros", None, "in kernels: bands"),  # twelve phases
        (F16, 2, 1, (1, 1), (1, 1), 3, "reflect", None, "both gradients: bands"),
        (F32, 5, 1, (5, 4), (5, 4), 3, "zeros", 2, "forward: registers"),
        (F32, 8, 1, (2, 6), (4, 12), 5, "zeros", None, "forward: registers"),
        (F32, 5, 1, (2, 6), (4, 12), 5, "zeros", None, "gradient in x: bands"),
        (F32, 2, 2, (3, 5), (6, 10), 3, "zeros", 1, "forward: registers"),
        (F32, 3, 1, (2, 7), (2, 7), 5, "zeros", None, "forward: registers"),
        (F32, 4, 2, (3, 4), (5, 7), 3, "reflect", 1, "gradient in x: bands"),
    ],
)
def test_agrees_with_float64(
    dtype: torch.dtype,
    channels: int,
    groups: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    kernel: int,
    padding: str,
    gain: int | None,
    served: str,
    layout: torch.memory_format,
) -> None:
    x = random_map((2, channels, *size), dtype, layout)
    kernels = random_map((2, groups * kernel**2, *out_size), dtype, layout)
    cotangent = random_map((2, channels, *out_size), dtype, layout).detach()
    window = None if gain == 1 else torch.rand(kernel, kernel, device=DEVICE) + 0.1
    operator = "carafe" if gain is None else "carafe_from_logits"
    with use_backend("triton"):
        assert served in explain(operator, x, kernels, groups=groups, padding_mode=padding).kernels
    assert_agrees(x, kernels, cotangent, kernel, groups, padding, gain, window)


@pytest.mark.parametrize("layout", [LAST, FIRST])
@pytest.mark.parametrize(
    ("dtype", "channels", "groups", "size", "out_size", "kernel", "padding", "served"),
    [
        (F16, 5, 1, (2, 3), (2, 3), 3, "zeros", "both gradients: bands"),
        (F16, 9, 1, (1, 5), (2, 10), 5, "zeros", "forward: bands"),
        (F16, 4, 2, (2, 3), (3, 5), 3, "reflect", "in kernels: bands"),
        (F32, 9, 1, (1, 4), (2, 8), 3, "zeros", "forward: registers"),
        (F32, 9, 1, (1, 2), (2, 4), 5, "zeros", "forward: sums"),
        (F32, 4, 2, (2, 3), (3, 5), 3, "reflect", "forward: sums"),
        (F16, 3, 1, (1, 2), (2, 2), 7, "zeros", "in kernels: sums"),
    ],
)
def test_sum_with_a_low_pass(
    dtype: torch.dtype,
    channels: int,
    groups: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    kernel: int,
    padding: str,
    served: str,
    layout: torch.memory_format,
) -> None:
    """The sum, the kernels that it keeps, and gradients that come through both or one."""
    x = random_map((1, channels, *size), dtype, layout)
    plus = random_map((1, channels, *out_size), dtype, layout)
    logits = random_map((1, groups * kernel**2, *out_size), dtype, layout)
    window = torch.rand(kernel, kernel, device=DEVICE) + 0.1
    cotangents = [random_map(tuple(like.shape), dtype, layout).detach() for like in (plus, logits)]
    with use_backend("triton"):
        assert served in explain("carafe_from_logits", x, logits, groups=groups, padding_mode=padding).kernels
        total, kept = add_low_pass(plus, x, logits, kernel, groups, window, padding, keep=True)
        alone, nothing = add_low_pass(plus, x, logits, kernel, groups, window, padding)
    assert nothing is None
    assert torch.equal(alone, total)
    assert total.is_contiguous(memory_format=layout)
    assert kept.dtype == dtype

    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in (plus, x, logits)]
    kernels = _applied_kernels(exact[2], kernel, groups, window.cpu(), 0)
    expected = exact[0] + carafe_naive(exact[1], kernels, kernel, groups, padding)
    assert error(total, expected) < TOLERANCE[dtype]
    assert error(kept, kernels) < TOLERANCE[dtype]
    wanted = [cotangent.cpu().double() for cotangent in cotangents]
    for outputs, rights, incoming, right in (
        ((total, kept), (expected, kernels), cotangents, wanted),
        ((alone,), (expected,), cotangents[:1], wanted[:1]),
        ((kept,), (kernels,), cotangents[1:], wanted[1:]),
    ):
        grads = torch.autograd.grad(
            outputs, (plus, x, logits), incoming, retain_graph=True, allow_unused=True
        )
        exact_grads = torch.autograd.grad(rights, exact, right, retain_graph=True, allow_unused=True)
        for name, actual, one in zip(("plus", "x", "logits"), grads, exact_grads, strict=True):
            one = torch.zeros(()) if one is None else one
            actual = one if actual is None else actual
            assert error(actual, one) < TOLERANCE[dtype], (name, len(outputs))


def test_maps_may_lie_differently() -> None:
    """Some channels of a map, one set of kernels for all images, a gradient in another layout."""
    x = random_map((2, 9, 3, 5), F16, LAST)
    kernels = random_map((1, 9, 6, 10), F16, FIRST)
    for cotangent in (random_map((2, 5, 6, 10), F16, FIRST), torch.ones(1, 1, 1, 1, device=DEVICE).half()):
        cotangent = cotangent.detach().expand(2, 5, 6, 10)
        assert_agrees(x[:, 2:7], kernels.expand(2, -1, -1, -1), cotangent, 3, 1, "zeros", None, None)


def test_more_precise_kernels_of_a_half_precision_map() -> None:
    x, kernels = random_map((1, 4, 3, 5), F16, LAST), random_map((1, 9, 3, 5), F32, FIRST)
    assert_agrees(x, kernels, torch.randn(1, 4, 3, 5).to(DEVICE, F16), 3, 1, "zeros", 2, None)


@pytest.mark.parametrize(("kernel", "ratio"), [(5, 2), (3, 1)])
def test_softmax_weights_are_not_rounded(kernel: int, ratio: int) -> None:
    """Beside the rounding of the result, 2.1e-4, that of the weights would make it 2.9e-4."""
    x = random_map((1, 16, 6, 8), F16, LAST)
    logits = random_map((1, kernel**2, 6 * ratio, 8 * ratio), F16, LAST)
    cotangent = random_map((1, 16, 6 * ratio, 8 * ratio), F16, LAST).detach()
    assert_agrees(x, logits, cotangent, kernel, 1, "zeros", 0, None, tolerance=2.4e-4)


def test_explains_why_not_the_faster_kernels() -> None:
    def kernels_of(x: Tensor, taps: int, *size: int, padding_mode: str = "zeros") -> str:
        with use_backend("triton"):
            kernels = torch.zeros(1, taps, *size, dtype=x.dtype, device=DEVICE)
            return explain("carafe", x, kernels, padding_mode=padding_mode).kernels

    x = torch.zeros(1, 4, 3, 5, dtype=F16, device=DEVICE)
    assert "kernels of 3 and 5, got 7" in kernels_of(x, 49, 3, 5)
    assert "ratios up to 4" in kernels_of(x, 9, 15, 25)
    assert "side by side" in kernels_of(x[..., ::2], 9, 3, 3)
    assert "do not mirror" in kernels_of(x.float(), 9, 3, 5, padding_mode="reflect")
    assert "narrower than a window" in kernels_of(x[..., :3].float(), 25, 3, 3)


def test_images_beyond_32_bit_offsets_are_left_to_plain_sums() -> None:
    from freqfusion.ops.carafe import triton as kernels

    x = torch.empty(1, 64, 8192, 8192, dtype=F16, device="meta")
    assert x.numel() > 2**31
    for chosen in (
        kernels.for_forward(x, (8192, 8192), 3, 1, False, False),
        kernels.for_gradient_in_x(x, (8192, 8192), 3),
        kernels.for_gradient_in_kernels(x, x, 3),
    ):
        assert str(chosen) == "sums (one image spans 2**31 values or more)"
    # a batch of them is another matter: offsets of images are 64 bit
    batch = torch.empty(64, 64, 1024, 1024, dtype=F16, device="meta", memory_format=torch.channels_last)
    assert batch.numel() > 2**31
    assert str(kernels.for_forward(batch, (1024, 1024), 3, 1, False, False)) == "bands"


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "layout"), [(F16, LAST), (F32, FIRST)])
def test_bad_values_reach_their_tiles_at_most(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """They never get lost either."""
    limit = 15  # coarse pixels, as the kernels' docstring has it
    x = random_map((1, 2, 20, 22), dtype, layout).detach()
    kernels = torch.rand(1, 9, 20, 22, device=DEVICE).to(dtype)
    grad = random_map((1, 2, 20, 22), dtype, layout).detach()
    with torch.no_grad():
        x[..., 1, 2] = float("nan")
        grad[..., 1, 2] = float("inf")
    out = carafe(x, kernels, 3, backend="triton")[0].cpu()
    in_x = op._carafe_backward_x(kernels, grad, (20, 22), 3, 1, False, "triton")[0].cpu()
    in_kernels = op.carafe_backward_kernels(x, grad.nan_to_num(), 3, 1, False, "triton")[0].cpu()
    near, far = torch.zeros(2, 20, 22, dtype=torch.bool)
    near[0:3, 1:4] = True
    far[3 + limit :] = True
    far[:, 4 + limit :] = True
    for name, value in (("result", out), ("gradient in x", in_x)):
        assert bool(torch.isfinite(value[:, far]).all()), name
        assert not bool(torch.isfinite(value[:, near]).any()), name
    assert bool(torch.isfinite(in_kernels[:, ~near]).all())
    assert bool(in_kernels[:, near].isnan().any(0).all())


def test_no_kernel_adds_atomically() -> None:
    from freqfusion.ops.carafe.triton import bands, registers, sums

    for module in (bands, registers, sums):
        assert "atomic" not in inspect.getsource(module)


class Recorded:
    """A kernel ``(x, out, length, TILE)`` that notes its launches, by Triton's way or past it."""

    __name__ = "recorded"
    arg_names = ("x", "out", "length", "TILE")

    def __init__(self) -> None:
        self.slow: list[tuple[tuple[int, ...], dict[str, int]]] = []
        self.fast: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*args: object, **constants: int) -> dict[tuple[int, ...], object]:
            self.slow.append((grid, constants))
            return {grid: lambda *args: self.fast.append(args)}  # the compiled kernel

        return run


def recorded_launch(x: Tensor, out: Tensor, length: int):
    from freqfusion.ops._triton.launch import Launch

    choices = [{"TILE": 1, "num_warps": 4}, {"TILE": 2, "num_warps": 4}]
    return Launch(lambda chosen: 10 * chosen["TILE"], [length], choices, {})


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that launches, as where Triton compiles and nothing was launched before."""
    from freqfusion.ops._triton import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_remembered", {})
    monkeypatch.setattr(launch, "_fastest", {})
    return launch


def test_a_launch_is_prepared_once_for_tensors_that_lie_alike(launching: ModuleType) -> None:
    kernel, x, out = Recorded(), torch.zeros(2, 6), torch.zeros(2, 6)
    for _ in range(2):
        launching.launch(kernel, (x, out), recorded_launch, 9)
    assert kernel.slow == [((10, 1, 1), {"TILE": 1, "num_warps": 4, "enable_fp_fusion": True})]
    assert kernel.fast == [(x, out, 9, 1)]
    others = {
        "option": ((x, out), 8),
        "shape": ((x[:1], out[:1]), 9),
        "strides": ((torch.zeros(6, 2).t(), out), 9),
        "dtype": ((x.double(), out), 9),
        "alignment": ((torch.zeros(13)[1:].view(2, 6), out), 9),
    }
    for number, (what, (tensors, length)) in enumerate(others.items(), 2):
        launching.launch(kernel, tensors, recorded_launch, length)
        assert len(kernel.slow) == number, what
    assert len(kernel.fast) == 1
    another = Recorded()
    launching.launch(another, (x, out), recorded_launch, 9)
    assert len(another.slow) == 1


def test_launches_are_not_remembered_without_end(
    launching: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "REMEMBERED", 3)
    kernel = Recorded()
    for length in range(1, 9):
        launching.launch(kernel, (torch.zeros(length), torch.zeros(length)), recorded_launch, length)
        assert len(launching._remembered) <= 3


def test_tuning_measures_only_when_it_is_asked_for(
    launching: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Recorded()

    def run(length: int) -> tuple[int, ...]:
        launching.launch(kernel, (torch.zeros(3), torch.zeros(3)), recorded_launch, length)
        return kernel.slow[-1][0]

    def bench(call) -> float:
        call()
        return -kernel.slow.pop()[1]["TILE"]  # the larger tile is the faster one

    monkeypatch.setattr("triton.testing.do_bench", bench)
    assert run(9) == (10, 1, 1)
    monkeypatch.setattr(launching, "TUNING", True)
    launching._remembered.clear()
    assert run(9) == (20, 1, 1)
    assert len(kernel.slow) == 2
    monkeypatch.setattr("triton.testing.do_bench", lambda call: 1 / 0)
    assert run(12) == (20, 1, 1)  # of about the same size


def test_opcheck() -> None:
    x, kernels = random_map((1, 2, 2, 3), F16, LAST), random_map((1, 9, 2, 3), F16, LAST)
    grad = random_map((1, 2, 2, 3), F16, LAST)
    operators = torch.ops.freqfusion
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in (
        (operators.carafe_backward, (x, kernels, grad, 3, 1, False)),
        (operators.carafe_backward_kernels, (x, grad, 3, 1, False, "triton", F16)),
    ):
        results = torch.library.opcheck(operator.default, arguments, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


def test_second_derivatives_at_equal_sizes() -> None:
    """There one operator computes both first derivatives."""
    leaves = [random_map(shape, F32, FIRST) for shape in ((1, 2, 2, 3), (1, 9, 2, 3))]
    found = []
    for backend, dtype in (("triton", F32), ("torch", torch.float64)):
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        with use_backend(backend):
            total = carafe(*inputs, 3).square().sum()
            first = torch.autograd.grad(total, inputs, create_graph=True)
            found.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs))
    for actual, wanted in zip(*found, strict=True):
        assert error(actual, wanted.cpu()) < 1e-5


COMPILE = """
import json, sys
from freqfusion.ops._triton import registry
from freqfusion.ops._triton.registry import compile_case

found = []
for case in registry.cases():
    if any(name in case.name for name in sys.argv[2:]):
        found += [usage._asdict() for usage in compile_case(case, int(sys.argv[1]))]
print(json.dumps(found))
"""


SIZES = """
import json, sys
from functools import partial
import torch
from freqfusion.ops.carafe import triton
from freqfusion.ops._triton.registry import Case, compile_case

keys = []
for coarse in ((8, 16), (15, 24)):
    for ratio, kernel_size, gain in ((2, 5, None), (1, 3, 2)):
        sizes = 64, 1, coarse, (ratio * coarse[0], ratio * coarse[1]), kernel_size, gain, False
        for backward in (False, True):
            run = partial(triton._run, backward, torch.bfloat16, torch.channels_last, *sizes)
            keys += [usage.key for usage in compile_case(Case("", run), 90)]
print(json.dumps(keys))
"""


@pytest.mark.parametrize(
    ("capability", "shared", "cases"),
    [
        ("90", 227, ("5x5 to twice the size, bfloat16", "high-pass 3x3, bfloat16")),
        ("80", 163, ("high-pass 3x3, bfloat16",)),
        pytest.param("90", 227, ("",), marks=pytest.mark.slow),
        pytest.param("80", 163, ("",), marks=pytest.mark.slow),
    ],
)
def test_kernels_fit_a_gpu(capability: str, shared: int, cases: tuple[str, ...]) -> None:
    found = run_compiling(COMPILE, capability, *cases)
    assert len(found) >= 6
    for usage in found:
        assert usage["stack"] == 0, usage  # no register is spilled
        assert usage["shared"] <= shared * 1024, usage


def test_a_second_size_compiles_nothing() -> None:
    keys = run_compiling(SIZES)
    assert len(keys) == 12
    assert keys[:6] == keys[6:]
    assert len(set(keys)) == 6
