"""The compiled kernels for volumes: shapes of many tiles and vectors, types, layouts, threads, what they refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from freqfusion.ops import (
    _native,
    carafe,
    carafe_naive,
    explain,
    local_similarity,
    local_similarity_naive,
    resample,
    resample_naive,
)
from support import assert_close

pytestmark = pytest.mark.skipif(bool(_native.REASON), reason=_native.REASON or "native is there")

Size = tuple[int, int, int]

TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5, torch.bfloat16: 2e-2}
LAYOUTS = torch.contiguous_format, torch.channels_last_3d


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
    tolerance: float | None = None,
) -> None:
    """Result and gradients against the oracle in float64, of every type and in both layouts."""
    exact = None
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        typed = tuple(tensor.bfloat16().to(dtype) for tensor in inputs)
        if exact is None:
            cotangent = torch.randn(oracle(*typed).shape).bfloat16()
            exact = values_and_gradients(oracle, tuple(tensor.double() for tensor in typed), cotangent)
        for layout in LAYOUTS:
            placed = (typed[0].contiguous(memory_format=layout), *typed[1:])
            actual = values_and_gradients(fast, placed, cotangent.contiguous(memory_format=layout))
            assert actual[0].dtype == dtype
            for name, value, expected in zip(("out", "grad 0", "grad 1"), actual, exact, strict=False):
                allowed = (
                    TOLERANCE[dtype] if dtype == torch.float64 else max(TOLERANCE[dtype], tolerance or 0)
                )
                assert_close(f"{name} {dtype} {layout}", value, expected, allowed)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("channels", "groups", "size", "out_size", "kernel"),
    [
        (37, 1, (3, 5, 9), (6, 10, 18), 3),
        (9, 3, (2, 20, 24), (4, 39, 47), 3),  # several tiles of rows
        (18, 1, (4, 9, 7), (4, 18, 14), 5),  # depth as it is
        (6, 2, (3, 4, 5), (9, 12, 15), 3),
        (5, 1, (3, 4, 5), (7, 6, 13), 3),  # a ratio of its own for each axis
        (11, 1, (6, 5, 17), (6, 5, 17), 3),
        (4, 1, (1, 1, 1), (2, 3, 1), 7),
        (3, 1, (5, 6, 7), (2, 3, 4), 3),
    ],
)
def test_carafe(channels: int, groups: int, size: Size, out_size: Size, kernel: int, padding: str) -> None:
    torch.manual_seed(0)
    assert_matches(
        lambda x, kernels: carafe(x, kernels, kernel, groups, padding, backend="native"),
        lambda x, kernels: carafe_naive(x, kernels, kernel, groups, padding),
        (torch.randn(2, channels, *size), torch.randn(2, groups * kernel**3, *out_size)),
    )


@pytest.mark.parametrize(
    ("channels", "size", "window", "dilation"),
    [
        (1, (1, 1, 1), 3, 2),
        (20, (4, 9, 20), 3, 2),
        (9, (3, 7, 5), 5, 1),
        (3, (6, 30, 2), 3, 3),
        (5, (8, 8, 8), 7, 1),
    ],
)
def test_local_similarity(channels: int, size: Size, window: int, dilation: int) -> None:
    torch.manual_seed(0)
    assert_matches(
        lambda x: local_similarity(x, window, dilation, backend="native"),
        lambda x: local_similarity_naive(x, window, dilation),
        (torch.randn(2, channels, *size),),
    )


@pytest.mark.parametrize(
    ("channels", "groups", "size", "out_size", "unit"),
    [
        (1, 1, (1, 1, 1), (3, 2, 2), None),
        (64, 4, (3, 10, 12), (3, 10, 12), (3, 5, 6)),
        (58, 2, (4, 6, 7), (5, 11, 13), None),  # 29 channels: vectors of every width
        (4, 2, (2, 1, 5), (2, 2, 9), (2, 1, 3)),
    ],
)
def test_resample(channels: int, groups: int, size: Size, out_size: Size, unit: Size | None) -> None:
    torch.manual_seed(0)
    # exact in bfloat16, and never at a whole position, where the derivative in the offsets jumps
    offsets = ((16 * torch.randn(2, 3 * groups, *out_size)).round().clamp(-60, 60) + 0.25) / 16
    assert_matches(
        lambda x, offsets: resample(x, offsets, groups, unit, backend="native"),
        lambda x, offsets: resample_naive(x, offsets, groups, unit),
        (torch.randn(2, channels, *size), offsets),
        1e-3,
    )


def test_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "OPERATIONS_A_THREAD", 1)  # as many threads as torch may use
    torch.manual_seed(0)
    x, kernels = torch.randn(2, 40, 4, 12, 11), torch.rand(2, 27, 8, 24, 22)
    offsets = 0.3 * torch.randn(2, 6, 8, 24, 22)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = []
            for function, inputs in (
                (lambda x, kernels: carafe(x, kernels, 3, 1, "reflect", backend="native"), (x, kernels)),
                (lambda x, kernels: carafe(x, kernels, 3, backend="native"), (x, kernels)),
                (lambda x, offsets: resample(x, offsets, 2, backend="native"), (x, offsets)),
                (lambda x: local_similarity(x, backend="native"), (x,)),
            ):
                shape = function(*inputs).shape
                cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
                found += values_and_gradients(function, inputs, cotangent)
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(value, expected) for value, expected in zip(found, results[0], strict=True))


def test_bad_values_stay_in_their_windows() -> None:
    torch.manual_seed(0)
    x, kernels, grad = torch.randn(1, 5, 4, 5, 6), torch.rand(1, 27, 8, 10, 12), torch.rand(1, 5, 8, 10, 12)
    x[..., 1, 0, 5] = torch.nan
    out = carafe(x, kernels, 3, backend="native")
    touched = torch.zeros(8, 10, 12, dtype=torch.bool)
    touched[0:6, 0:4, 8:12] = True
    assert bool(out[..., touched].isnan().all())
    assert not bool(out[..., ~touched].isnan().any())
    grad[..., 2, 0, 11] = torch.nan
    grad_x = _native.carafe_backward_x(kernels, grad, (4, 5, 6), 3, 1, False)
    touched = torch.zeros(4, 5, 6, dtype=torch.bool)
    touched[0:3, 0:2, 4:6] = True
    assert bool(grad_x[..., touched].isnan().all())
    assert not bool(grad_x[..., ~touched].isnan().any())
    similarity = local_similarity(x, dilation=1, backend="native")
    assert not bool(similarity[..., ~touched].isnan().any())

    offsets = torch.zeros(1, 3, 4, 5, 6)
    offsets[0, 1, 1, 1, 1], offsets[0, 0, 2, 2, 2], offsets[0, 2, 3, 3, 3] = torch.nan, torch.inf, -1e30
    x = torch.randn(1, 2, 4, 5, 6)
    out = resample(x, offsets, backend="native")
    assert bool(out[0, :, 1, 1, 1].isnan().all())  # nothing is known of where to read
    assert_close("right border", out[0, :, 2, 2, 2], x[0, :, 2, 2, 5], 1e-5)
    assert_close("first slice", out[0, :, 3, 3, 3], x[0, :, 0, 3, 3], 1e-5)
    assert int(out.isnan().sum()) == 2


def test_any_strides_empty_batches_and_channels() -> None:
    torch.manual_seed(0)
    wide, kernels = torch.randn(2, 6, 3, 4, 15)[:, ::2, ..., ::3], torch.randn(2, 27, 6, 10, 8).mT
    offsets = torch.rand(2, 3, 10, 8, 6).transpose(2, 4)
    for function, inputs in (
        (lambda x, kernels: carafe(x, kernels, 3, backend="native"), (wide, kernels)),
        (lambda x, offsets: resample(x, offsets, backend="native"), (wide, offsets)),
        (lambda x: local_similarity(x, backend="native"), (wide,)),
    ):
        out = function(*inputs)
        assert torch.equal(out, function(*(tensor.contiguous() for tensor in inputs)))
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        for cotangent in (torch.ones(()).expand(out.shape), torch.ones(out.shape)):
            grads = torch.autograd.grad(function(*leaves), leaves, cotangent)
            plain = [tensor.detach().contiguous().requires_grad_() for tensor in inputs]
            wanted = torch.autograd.grad(function(*plain), plain, torch.ones(out.shape))
            assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    for x in (torch.zeros(0, 4, 3, 5, 2), torch.zeros(2, 0, 3, 5, 2)):
        x.requires_grad_()
        kernels = torch.zeros(x.shape[0], 27, 3, 10, 4, requires_grad=True)
        offsets = torch.zeros(x.shape[0], 3, 3, 10, 4, requires_grad=True)
        total = carafe(x, kernels, 3, backend="native").sum() + resample(x, offsets, backend="native").sum()
        total = total + local_similarity(x, backend="native").sum()
        for grad in torch.autograd.grad(total, (x, kernels, offsets)):
            assert bool((grad == 0).all())


def test_second_derivatives_of_the_sampling() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    offsets = (0.3 + 0.1 * torch.rand(1, 6, 2, 2, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, o: resample(x, o, 2, (1, 3, 2), backend="native"), (x, offsets)
    )


def test_compiles_to_one_graph_for_all_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def chain(x: Tensor, kernels: Tensor, offsets: Tensor) -> Tensor:
        out = resample(carafe(x, kernels, 3, backend="native"), offsets, backend="native")
        return local_similarity(out, backend="native")

    compiled = torch.compile(chain, fullgraph=True, dynamic=True, backend=counter)
    for size in ((4, 5, 7), (5, 6, 9)):  # no side like another, nor like the channels
        x = torch.randn(2, 20, *size, requires_grad=True)
        fine = [2 * side for side in size]
        kernels, offsets = torch.randn(2, 27, *fine), torch.rand(2, 3, *fine)
        (actual,) = torch.autograd.grad(compiled(x, kernels, offsets).sum(), x)
        (expected,) = torch.autograd.grad(chain(x, kernels, offsets).sum(), x)
        assert torch.allclose(actual, expected, atol=1e-5)
    assert counter.frame_count == 1


def test_autocast_changes_nothing() -> None:
    x, offsets = torch.randn(1, 8, 2, 4, 3), torch.rand(1, 3, 2, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            for native, other in (
                [local_similarity(x.to(dtype), backend=name) for name in ("native", "torch")],
                [resample(x.to(dtype), offsets, backend=name) for name in ("native", "torch")],
            ):
                assert native.dtype == other.dtype == dtype
                assert_close("out", native, other, TOLERANCE[dtype])


def test_what_falls_back() -> None:
    x, kernels = torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 27, 8, 16, 10)
    assert (
        explain("carafe", x, kernels).cannot["native"] == "more than 256 fine pixels lie in one coarse pixel"
    )
    half = explain("local_similarity", x.half())
    assert half.backend == "torch"
    assert half.cannot["native"] == "it has no kernel for torch.float16"
    assert explain("resample", x, torch.zeros(1, 3, 2, 4, 4)).backend == "native"
