"""The compiled kernels: the oracle on shapes that reach every branch, containment, determinism, derivatives."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from freqfusion.ops import (
    _native,
    carafe,
    carafe_naive,
    local_similarity,
    local_similarity_naive,
    resample,
    resample_naive,
    window_similarity,
)
from support import assert_close

pytestmark = pytest.mark.skipif(bool(_native.REASON), reason=_native.REASON or "native is there")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
CHANNELS_LAST = torch.channels_last


def values_and_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def assert_matches(
    fast: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    shape: tuple[int, ...],
    position_error: float = 0.0,
) -> None:
    """Result and gradients against the oracle in float64: both layouts of ``x``, and of the other maps beside it."""
    cotangent = torch.randn(shape, dtype=torch.float64)
    exact = values_and_gradients(oracle, tuple(tensor.double() for tensor in inputs), cotangent)
    plain = torch.contiguous_format
    for layout, beside in ((plain, plain), (CHANNELS_LAST, plain), (CHANNELS_LAST, CHANNELS_LAST)):
        x, *rest = inputs
        others = (tensor.contiguous(memory_format=beside) for tensor in rest)
        placed = (x.contiguous(memory_format=layout), *others)
        actual = values_and_gradients(fast, placed, cotangent.contiguous(memory_format=layout))
        for name, value, expected in zip(("out", "grad 0", "grad 1"), actual, exact, strict=False):
            tolerance = TOLERANCE[x.dtype]
            if x.dtype != torch.float64:
                tolerance = max(tolerance, position_error)
            assert_close(f"{name} {layout} {beside}", value, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("channels", "groups", "size", "out_size", "kernel"),
    [
        (1, 1, (1, 1), (1, 1), 3),
        (3, 1, (1, 1), (7, 5), 5),
        (5, 1, (2, 9), (4, 17), 3),  # as from a map that was halved with rounding up
        (9, 1, (6, 20), (12, 40), 5),
        (25, 1, (4, 18), (8, 36), 5),
        (48, 1, (3, 19), (6, 38), 5),
        (37, 1, (3, 5), (3, 5), 3),
        (64, 2, (5, 17), (10, 34), 3),
        (34, 2, (7, 6), (7, 6), 7),
        (6, 3, (5, 7), (13, 12), 3),
        (4, 1, (9, 8), (4, 3), 3),  # fewer pixels than x
        (2, 1, (3, 4), (15, 20), 1),
        (2, 1, (2, 530), (4, 1060), 3),  # several blocks of columns
        (2, 1, (2, 1031), (2, 1031), 5),
    ],
)
def test_carafe(
    channels: int,
    groups: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    kernel: int,
    padding: str,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size).to(dtype)
    kernels = torch.randn(2, groups * kernel**2, *out_size).to(dtype)
    assert_matches(
        lambda x, kernels: carafe(x, kernels, kernel, groups, padding, backend="native"),
        lambda x, kernels: carafe_naive(x, kernels, kernel, groups, padding),
        (x, kernels),
        (2, channels, *out_size),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "size", "window", "dilation"),
    [(1, (1, 1), 3, 2), (3, (2, 3), 3, 2), (64, (9, 20), 3, 2), (19, (5, 40), 5, 1), (9, (7, 2), 3, 3)],
)
def test_local_similarity(
    channels: int, size: tuple[int, int], window: int, dilation: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    assert_matches(
        lambda x: local_similarity(x, window, dilation, backend="native"),
        lambda x: local_similarity_naive(x, window, dilation),
        (torch.randn(2, channels, *size).to(dtype),),
        (2, window**2 - 1, *size),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "groups", "size", "out_size", "unit"),
    [
        (1, 1, (1, 1), (3, 2), None),
        (4, 2, (1, 5), (2, 9), (1, 3)),
        (64, 4, (10, 12), (10, 12), (5, 6)),
        (37, 1, (6, 7), (11, 13), None),
        (58, 2, (6, 7), (11, 13), None),  # 29 channels: vectors of every width
        (40, 2, (3, 530), (5, 600), (2, 300)),  # several blocks of columns and of channels
    ],
)
def test_resample(
    channels: int,
    groups: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    unit: tuple[int, int] | None,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    # exact in bfloat16, and never at a whole position, where the derivative in the offsets jumps
    offsets = ((16 * torch.randn(2, 2 * groups, *out_size)).round().clamp(-60, 60) + 0.25) / 16
    x = torch.randn(2, channels, *size).to(dtype)
    fast = values_and_gradients(
        lambda x, offsets: resample(x, offsets, groups, unit, backend="native"),
        (x, offsets.to(dtype)),
        torch.ones(2, channels, *out_size),
    )
    torch_path = values_and_gradients(
        lambda x, offsets: resample(x, offsets, groups, unit, backend="torch"),
        (x.double(), offsets.double()),
        torch.ones(2, channels, *out_size),
    )
    for name, value, expected in zip(("out", "grad x", "grad offsets"), fast, torch_path, strict=True):
        assert_close(name, value, expected, max(TOLERANCE[dtype], 1e-3 if dtype != torch.float64 else 0))
    assert_matches(
        lambda x: resample(x, offsets.to(dtype), groups, unit, backend="native"),
        lambda x: resample_naive(x, offsets.to(x.dtype), groups, unit),
        (x,),
        (2, channels, *out_size),
        2e-4,  # of a position in float32, on a row of hundreds
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 4), (6, 8)])
def test_bad_values_stay_in_their_windows(
    place: tuple[int, int], value: float, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x, kernels = torch.randn(1, 20, 7, 9), torch.rand(1, 9, 14, 18)
    bad = x.clone()
    bad[..., place[0], place[1]] = value
    touched = torch.zeros(14, 18, dtype=torch.bool)
    top, left = (max(0, 2 * (p - 1)) for p in place)
    touched[top : 2 * (place[0] + 2), left : 2 * (place[1] + 2)] = True
    good_out, bad_out = (
        carafe(t.contiguous(memory_format=layout), kernels, 3, backend="native")[0] for t in (x, bad)
    )
    assert torch.equal(good_out[:, ~touched], bad_out[:, ~touched])
    assert not bool(torch.isfinite(bad_out[:, touched]).any())

    # a bad kernel weight, or gradient, of one fine pixel reaches the coarse pixels of its window alone
    bad_grad = torch.rand(1, 20, 14, 18)
    bad_grad[..., 2 * place[0], 2 * place[1]] = value
    grad_x = _native.carafe_backward_x(
        kernels, bad_grad.contiguous(memory_format=layout), (7, 9), 3, 1, False
    )[0]
    reached = torch.zeros(7, 9, dtype=torch.bool)
    reached[max(0, place[0] - 1) : place[0] + 2, max(0, place[1] - 1) : place[1] + 2] = True
    assert bool(torch.isfinite(grad_x[:, ~reached]).all())
    grad_kernels = _native.carafe_backward_kernels(
        x.contiguous(memory_format=layout), bad_grad.contiguous(memory_format=layout), 3, 1, False
    )[0]
    reached = torch.zeros(14, 18, dtype=torch.bool)
    reached[2 * place[0], 2 * place[1]] = True
    assert bool(torch.isfinite(grad_kernels[:, ~reached]).all())

    similarity = local_similarity(bad.contiguous(memory_format=layout), backend="native")[0]
    near = torch.zeros(7, 9, dtype=torch.bool)
    for dy in (-2, 0, 2):
        for dx in (-2, 0, 2):
            if 0 <= place[0] + dy < 7 and 0 <= place[1] + dx < 9:
                near[place[0] + dy, place[1] + dx] = True
    assert bool(torch.isfinite(similarity[:, ~near]).all())


def test_bad_offsets_read_a_valid_place() -> None:
    x = torch.randn(1, 2, 4, 5)
    offsets = torch.zeros(1, 2, 4, 5)
    offsets[0, 0, 1, 1], offsets[0, 0, 2, 2], offsets[0, 1, 3, 3] = float("nan"), float("inf"), -1e30
    out = resample(x, offsets, backend="native")
    assert bool(out[0, :, 1, 1].isnan().all())  # nothing is known of where to read
    assert torch.allclose(out[0, :, 2, 2], x[0, :, 2, 4])
    assert torch.allclose(out[0, :, 3, 3], x[0, :, 0, 3])
    assert int(out.isnan().sum()) == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_same_bits_with_any_number_of_threads(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "OPERATIONS_A_THREAD", 1)  # as many threads as torch may use
    torch.manual_seed(0)
    x = torch.randn(1, 40, 24, 30).contiguous(memory_format=layout)
    kernels, offsets = torch.rand(1, 25, 48, 60), 0.3 * torch.randn(1, 8, 48, 60)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = []
            for function, inputs in (
                (
                    lambda x, kernels: carafe(x, kernels, 5, padding_mode="reflect", backend="native"),
                    (x, kernels),
                ),
                (lambda x, kernels: carafe(x, kernels, 5, backend="native"), (x, kernels)),
                (lambda x, offsets: resample(x, offsets, 4, backend="native"), (x, offsets)),
                (lambda x: local_similarity(x, backend="native"), (x,)),
            ):
                shape = function(*inputs).shape
                cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
                found += values_and_gradients(function, inputs, cotangent.contiguous(memory_format=layout))
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(value, expected) for value, expected in zip(found, results[0], strict=True))


def test_any_strides() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, 20)[:, ::2, :, ::3]
    kernels = torch.randn(2, 14, 16, 9)[..., :9].transpose(2, 3)[:, :9, :7]
    function = partial(carafe, kernel_size=3, backend="native")
    expected = function(x.contiguous(), kernels.contiguous())
    assert torch.equal(function(x, kernels), expected)
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        leaves = [x.contiguous(memory_format=layout).requires_grad_(), kernels.contiguous().requires_grad_()]
        out = function(*leaves)
        for cotangent in (torch.ones(()).expand(out.shape), torch.ones(out.shape)):
            grads = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
            oracle = torch.autograd.grad(carafe_naive(*leaves, 3), leaves, torch.ones(out.shape))
            for name, actual, wanted in zip(("x", "kernels"), grads, oracle, strict=True):
                assert_close(name, actual, wanted, 1e-5)


def test_empty_batches_and_channels() -> None:
    for x in (torch.zeros(0, 4, 3, 5), torch.zeros(2, 0, 3, 5)):
        x.requires_grad_()
        kernels = torch.zeros(x.shape[0], 9, 6, 10, requires_grad=True)
        offsets = torch.zeros(x.shape[0], 2, 6, 10, requires_grad=True)
        total = carafe(x, kernels, 3, backend="native").sum() + resample(x, offsets, backend="native").sum()
        total = total + local_similarity(x, backend="native").sum()
        for grad in torch.autograd.grad(total, (x, kernels, offsets)):
            assert bool((grad == 0).all())


def test_derivatives_to_second_order() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    offsets = (0.3 + 0.1 * torch.rand(1, 4, 6, 8, dtype=torch.float64)).requires_grad_()
    for function, inputs in (
        (lambda x, offsets: resample(x, offsets, 2, (3, 4), backend="native"), (x, offsets)),
        (lambda x: local_similarity(x, dilation=1, backend="native"), (x,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivative_leaves_the_arguments_alone() -> None:
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    offsets = torch.rand(1, 2, 3, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(resample(x, offsets, backend="native").square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert not offsets.requires_grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 5, 6).to(dtype).contiguous(memory_format=layout).requires_grad_()
    offsets = torch.rand(2, 4, 7, 8).to(dtype).requires_grad_()
    grad = torch.randn(2, 4, 7, 8).to(dtype).contiguous(memory_format=layout)
    similarity = torch.ops.freqfusion.local_similarity(x, 3, 2)[0].detach()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in (
        (torch.ops.freqfusion.resample, (x, offsets, 2, (3, 4))),
        (torch.ops.freqfusion.resample_backward_x, (x.detach(), offsets.detach(), grad, 2, (3, 4))),
        (torch.ops.freqfusion.resample_backward_offsets, (x.detach(), offsets.detach(), grad, 2, (3, 4))),
        (torch.ops.freqfusion.local_similarity, (x, 3, 2)),
        (
            torch.ops.freqfusion.local_similarity_backward,
            (x.detach(), similarity, torch.rand_like(similarity), 3, 2),
        ),
    ):
        results = torch.library.opcheck(operator.default, arguments, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


def test_compiles_to_one_graph_for_all_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def chain(x: Tensor, kernels: Tensor, offsets: Tensor) -> Tensor:
        out = resample(carafe(x, kernels, 3, backend="native"), offsets, backend="native")
        return local_similarity(out, backend="native")

    compiled = torch.compile(chain, fullgraph=True, dynamic=True, backend=counter)
    for h, w in ((3, 4), (5, 7), (6, 9)):
        x = torch.randn(2, 20, h, w, requires_grad=True)
        kernels, offsets = torch.randn(2, 9, 2 * h, 2 * w), torch.rand(2, 2, 2 * h, 2 * w)
        (actual,) = torch.autograd.grad(compiled(x, kernels, offsets).sum(), x)
        (expected,) = torch.autograd.grad(chain(x, kernels, offsets).sum(), x)
        assert torch.allclose(actual, expected, atol=1e-5)
    assert counter.frame_count == 1


def test_autocast_changes_nothing() -> None:
    x, offsets = torch.randn(1, 8, 6, 7), torch.rand(1, 2, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            for native, other in (
                [local_similarity(x.to(dtype), backend=name) for name in ("native", "torch")],
                [resample(x.to(dtype), offsets, backend=name) for name in ("native", "torch")],
            ):
                assert native.dtype == other.dtype == dtype
                assert_close("out", native, other, TOLERANCE[dtype])


def test_window_similarity_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = _native.carafe_backward_kernels
    monkeypatch.setattr(_native, "carafe_backward_kernels", lambda *args: calls.append(1) or original(*args))
    window_similarity(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 2, 2), 3)
    assert calls == [1]


LEVELS = """
import torch
from freqfusion.ops import _native, carafe, carafe_naive, local_similarity, local_similarity_naive, resample
torch.manual_seed(0)
worst = 0.0
for x in (torch.randn(1, 25, 9, 20), torch.randn(1, 25, 9, 20).contiguous(memory_format=torch.channels_last)):
    kernels = torch.rand(1, 25, 18, 40)
    for fast, slow in (
        (lambda x: carafe(x, kernels, 5, backend="native"), lambda x: carafe_naive(x, kernels, 5)),
        (lambda x: local_similarity(x, backend="native"), local_similarity_naive),
    ):
        x = x.detach().requires_grad_()
        a, b = fast(x), slow(x)
        grads = (torch.autograd.grad(value.square().sum(), x)[0] for value in (a, b))
        first, second = grads
        worst = max(worst, float(((a - b).abs().max() / b.abs().max()).detach()))
        worst = max(worst, float((first - second).abs().max() / second.abs().max()))
x, kernels, offsets = torch.randn(1, 25, 3, 5, 9), torch.rand(1, 27, 6, 10, 18), 0.3 * torch.randn(1, 3, 6, 10, 18)
results = []
for backend in ("native", "torch"):
    leaves = [x.detach().requires_grad_() for x in (x, kernels, offsets)]
    values = [
        carafe(*leaves[:2], 3, backend=backend),
        local_similarity(leaves[0], backend=backend),
        resample(leaves[0], leaves[2], backend=backend),
    ]
    grads = torch.autograd.grad(sum(value.square().sum() for value in values), leaves)
    results.append([*values, *grads])
for first, second in zip(*results):
    worst = max(worst, float(((first - second).abs().max() / second.abs().max()).detach()) / 10)
print(_native.instruction_set(), worst < 1e-5)
"""


@pytest.mark.parametrize(("limit", "level"), [("1", "baseline"), ("3", "v3")])
def test_lower_instruction_sets(limit: str, level: str) -> None:
    if level == "v3" and _native.instruction_set() == "baseline":
        pytest.skip("the processor has no x86-64-v3")
    environment = {**os.environ, "FREQFUSION_X86_LEVEL": limit}
    result = subprocess.run([sys.executable, "-c", LEVELS], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == [level, "True"], result.stderr
