"""The Triton kernels against the oracle in float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter takes a tenth of a millisecond for every step of every program, so maps are tiny here, of shapes
that reach every branch; its tiles are 8 wide.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from freqfusion import FreqFusion
from freqfusion.ops import (
    available_backends,
    carafe,
    carafe_naive,
    explain,
    local_similarity,
    local_similarity_naive,
    resample,
    resample_naive,
    use_backend,
    window_similarity,
    window_similarity_naive,
)
from freqfusion.ops.carafe.logits import add_low_pass, carafe_from_logits
from support import assert_close

REASON = available_backends()["triton"]
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "triton is there")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 5e-6, F16: 2e-3, BF16: 2e-2}
FIRST, LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def values_and_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, cotangent.to(out.device, out.dtype))
    return [out.detach(), *grads]


def assert_matches(
    fast: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: tuple[Tensor, ...], tolerance: float
) -> list[Tensor]:
    """Result and gradients, their dtypes and layouts; returns them."""
    exact = tuple(tensor.double() for tensor in inputs)
    layout = LAST if inputs[0].is_contiguous(memory_format=LAST) else FIRST
    cotangent = torch.randn_like(oracle(*exact)).contiguous(memory_format=layout)
    expected = values_and_gradients(oracle, exact, cotangent)
    placed = tuple(tensor.to(DEVICE) for tensor in inputs)
    with use_backend("triton"):
        actual = values_and_gradients(fast, placed, cotangent)
    for name, like, value, wanted in zip(
        ("out", "grad 0", "grad 1"), (inputs[0], *inputs), actual, expected, strict=False
    ):
        assert value.dtype == like.dtype, name
        assert_close(name, value.cpu(), wanted, tolerance)
    return actual


@pytest.mark.parametrize(
    ("channels", "groups", "size", "out_size", "kernel", "padding", "dtype", "layout"),
    [
        (1, 1, (1, 1), (1, 1), 3, "zeros", F32, FIRST),
        (9, 1, (2, 9), (4, 17), 3, "zeros", F32, FIRST),  # as from a map that was halved with rounding up
        (9, 1, (2, 3), (4, 6), 3, "zeros", F32, LAST),
        (4, 2, (1, 2), (2, 4), 5, "reflect", BF16, FIRST),
        (2, 1, (2, 2), (6, 6), 3, "zeros", F16, LAST),  # nine phases
        (33, 1, (1, 10), (1, 10), 3, "zeros", BF16, FIRST),
        (10, 1, (3, 2), (2, 3), 3, "reflect", F32, LAST),  # fewer rows than x, more columns
        (2, 1, (1, 1), (5, 4), 3, "reflect", F32, FIRST),
        (2, 1, (3, 1), (3, 1), 1, "zeros", F32, FIRST),
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
    layout: torch.memory_format,
) -> None:
    x = torch.randn(1, channels, *size).to(dtype).contiguous(memory_format=layout)
    kernels = torch.randn(1, groups * kernel**2, *out_size).to(dtype)
    actual = assert_matches(
        lambda x, kernels: carafe(x, kernels, kernel, groups, padding, backend="triton"),
        lambda x, kernels: carafe_naive(x, kernels, kernel, groups, padding),
        (x, kernels),
        TOLERANCE[dtype],
    )
    for value in actual[:2]:
        assert value.is_contiguous(memory_format=layout)


def test_kernels_may_be_more_precise_than_the_map() -> None:
    x, kernels = torch.randn(2, 3, 2, 3).half(), torch.randn(2, 9, 3, 5)
    assert_matches(
        lambda x, kernels: carafe(x, kernels, 3, backend="triton"),
        lambda x, kernels: carafe_naive(x, kernels, 3),
        (x, kernels),
        TOLERANCE[F16],
    )


def from_logits_naive(
    x: Tensor, logits: Tensor, kernel: int, groups: int, window: Tensor | None, gain: int, padding: str
) -> Tensor:
    """By its definition: softmax, window and sum, reassembly, difference from the centre."""
    batch, _, height, width = logits.shape
    kernels = logits.reshape(batch, groups, kernel**2, height, width).softmax(2)
    if window is not None:
        kernels = kernels * window.reshape(-1, 1, 1)
        kernels = kernels / kernels.sum(2, keepdim=True)
    lowpass = carafe_naive(x, kernels.reshape(logits.shape), kernel, groups, padding)
    centre = torch.zeros_like(logits).reshape(batch, groups, kernel**2, height, width)
    centre[:, :, kernel**2 // 2] = 1
    return gain * carafe_naive(x, centre.reshape(logits.shape), kernel, groups) - lowpass if gain else lowpass


@pytest.mark.parametrize(
    ("channels", "groups", "size", "out_size", "kernel", "gain", "padding", "dtype", "layout"),
    [
        (9, 1, (2, 9), (2, 9), 3, 2, "zeros", F32, FIRST),
        (3, 1, (2, 3), (2, 3), 3, 2, "zeros", F16, LAST),
        (3, 1, (2, 3), (2, 3), 3, 1, "zeros", BF16, FIRST),
        (4, 2, (1, 2), (2, 3), 3, 1, "reflect", F32, FIRST),
        (2, 1, (1, 2), (2, 4), 5, 0, "zeros", F32, LAST),
    ],
)
@pytest.mark.parametrize("windowed", [True, False])
def test_carafe_from_logits(
    channels: int,
    groups: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    kernel: int,
    gain: int,
    padding: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    windowed: bool,
) -> None:
    x = torch.randn(1, channels, *size).to(dtype).contiguous(memory_format=layout)
    logits = (3 * torch.randn(1, groups * kernel**2, *out_size)).to(dtype)
    window = torch.rand(kernel, kernel) + 0.1 if windowed else None
    on_device = None if window is None else window.to(DEVICE)
    assert explain("carafe_from_logits", x.to(DEVICE), logits.to(DEVICE)).cannot["triton"] == ""
    assert_matches(
        lambda x, logits: carafe_from_logits(x, logits, kernel, groups, on_device, gain, padding),
        lambda x, logits: from_logits_naive(x, logits, kernel, groups, window, gain, padding),
        (x, logits),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize(
    ("channels", "size", "window", "dilation", "dtype", "layout"),
    [
        (1, (1, 1), 3, 2, F32, FIRST),
        (9, (2, 9), 3, 2, F32, FIRST),
        (3, (4, 3), 5, 1, F32, LAST),
        (10, (3, 4), 3, 1, BF16, FIRST),
        (5, (3, 4), 3, 2, F16, LAST),
    ],
)
def test_local_similarity(
    channels: int,
    size: tuple[int, int],
    window: int,
    dilation: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    x = torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=layout)
    assert_matches(
        lambda x: local_similarity(x, window, dilation, backend="triton"),
        lambda x: local_similarity_naive(x, window, dilation),
        (x,),
        TOLERANCE[dtype],
    )


def test_zero_vectors_have_similarity_zero() -> None:
    x = torch.ones(1, 3, 3, 3)
    x[:, :, 1, 1] = 0
    leaf = x.to(DEVICE).requires_grad_()
    out = local_similarity(leaf, dilation=1, backend="triton")
    assert bool((out[0, :, 1, 1] == 0).all())
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    oracle = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(local_similarity(oracle, dilation=1, backend="torch").sum(), oracle)
    assert_close("grad", grad.cpu(), wanted, 1e-5)


@pytest.mark.parametrize(
    ("channels", "groups", "size", "out_size", "unit", "dtype", "layout"),
    [
        (1, 1, (1, 1), (3, 2), None, F32, FIRST),
        (4, 2, (1, 5), (2, 9), (1, 3), F32, LAST),
        (9, 1, (4, 3), (4, 3), (2, 2), F32, FIRST),
        (6, 2, (3, 4), (5, 7), None, BF16, FIRST),
        (4, 4, (3, 4), (3, 4), (2, 2), F16, LAST),
    ],
)
def test_resample(
    channels: int,
    groups: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    unit: tuple[int, int] | None,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    # exact in bfloat16, and never at a whole position, where the derivative in the offsets jumps
    offsets = ((16 * torch.randn(2, 2 * groups, *out_size)).round().clamp(-60, 60) + 0.25) / 16
    x = torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=layout)
    assert_matches(
        lambda x, offsets: resample(x, offsets, groups, unit, backend="triton"),
        lambda x, offsets: resample_naive(x, offsets, groups, unit),
        (x, offsets.to(dtype)),
        TOLERANCE[dtype],
    )


def test_window_similarity() -> None:
    assert_matches(
        lambda query, key: window_similarity(query, key, 3),
        lambda query, key: window_similarity_naive(query, key, 3),
        (torch.randn(1, 3, 4, 5), torch.randn(1, 3, 2, 3)),
        TOLERANCE[F32],
    )


def test_bad_values_stay_in_their_windows() -> None:
    value = float("nan")
    x, kernels = torch.randn(1, 2, 4, 9), torch.rand(1, 9, 8, 18)
    bad = x.clone()
    bad[..., 1, 7] = value
    touched = torch.zeros(8, 18, dtype=torch.bool)
    touched[:6, 12:18] = True
    good_out, bad_out = (
        carafe(tensor.to(DEVICE), kernels.to(DEVICE), 3, backend="triton")[0].cpu() for tensor in (x, bad)
    )
    assert torch.equal(good_out[:, ~touched], bad_out[:, ~touched])
    assert not bool(torch.isfinite(bad_out[:, touched]).any())

    similarity = local_similarity(bad.to(DEVICE), backend="triton")[0].cpu()
    near = torch.zeros(4, 9, dtype=torch.bool)
    near[1::2, [5, 7]] = True
    assert bool(torch.isfinite(similarity[:, ~near]).all())


def test_bad_offsets_read_a_valid_place() -> None:
    x = torch.randn(1, 2, 4, 5)
    offsets = torch.zeros(1, 2, 4, 5)
    offsets[0, 0, 1, 1], offsets[0, 0, 2, 2], offsets[0, 1, 3, 3] = float("nan"), float("inf"), -1e30
    out = resample(x.to(DEVICE), offsets.to(DEVICE), backend="triton").cpu()
    assert bool(out[0, :, 1, 1].isnan().all())  # nothing is known of where to read
    assert torch.allclose(out[0, :, 2, 2], x[0, :, 2, 4])
    assert torch.allclose(out[0, :, 3, 3], x[0, :, 0, 3])
    assert int(out.isnan().sum()) == 2


def surrounded(*shape: int) -> Tensor:
    """A random map in the middle of a larger one of NaN."""
    around = torch.full([size + 2 for size in shape], float("nan"), device=DEVICE)
    inside = around[1:-1, 1:-1, 1:-1, 1:-1]
    return inside.copy_(torch.rand(shape))


def test_nothing_outside_is_read() -> None:
    x, kernels, grad, offsets = (surrounded(2, n, 2, 3) for n in (3, 9, 3, 2))
    with use_backend("triton"):
        for operator, inputs in (
            (lambda x, kernels: carafe(x, kernels, 3), (x, kernels)),
            (lambda x, kernels: carafe(x, kernels, 3, padding_mode="reflect"), (x, kernels)),
            (lambda x, logits: carafe_from_logits(x, logits, 3, gain=1), (x, kernels)),
            (resample, (x, offsets)),
        ):
            for value in values_and_gradients(operator, inputs, grad):
                assert bool(torch.isfinite(value).all())
        for value in values_and_gradients(local_similarity, (x,), surrounded(2, 8, 2, 3)):
            assert bool(torch.isfinite(value).all())


def test_any_strides() -> None:
    x = torch.randn(2, 6, 4, 9, device=DEVICE)[:, ::2, ::2, ::3]
    kernels = torch.randn(2, 14, 6, 9, device=DEVICE)[..., :5].transpose(2, 3)[:, :9, :4]
    out = carafe(x, kernels, 3, backend="triton")
    assert torch.equal(carafe(x.contiguous(), kernels.contiguous(), 3, backend="triton"), out)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, kernels)]
    total = carafe(*leaves, 3, backend="triton").sum()  # whose gradient is expanded from one number
    oracle = carafe_naive(*leaves, 3).sum()
    for name, actual, wanted in zip(
        ("x", "kernels"), torch.autograd.grad(total, leaves), torch.autograd.grad(oracle, leaves), strict=True
    ):
        assert_close(name, actual, wanted, 1e-5)


def test_empty_batches_and_channels() -> None:
    for x in (torch.zeros(0, 4, 3, 5), torch.zeros(2, 0, 3, 5)):
        x = x.to(DEVICE).requires_grad_()
        kernels = torch.zeros(x.shape[0], 9, 3, 5, device=DEVICE, requires_grad=True)
        offsets = torch.zeros(x.shape[0], 2, 3, 5, device=DEVICE, requires_grad=True)
        with use_backend("triton"):
            total = carafe(x, kernels, 3).sum() + carafe_from_logits(x, kernels, 3, gain=2).sum()
            total = total + resample(x, offsets).sum() + local_similarity(x).sum()
            for grad in torch.autograd.grad(total, (x, kernels, offsets)):
                assert bool((grad == 0).all())


def test_opcheck() -> None:
    x = torch.randn(1, 2, 1, 2).to(DEVICE, BF16).contiguous(memory_format=LAST).requires_grad_()
    kernels, grad = (torch.randn(1, n, 1, 3).to(DEVICE, BF16).requires_grad_() for n in (9, 2))
    offsets = torch.rand(1, 2, 1, 3).to(DEVICE, BF16).requires_grad_()
    fixed, incoming, fixed_logits = x.detach(), grad.detach(), kernels.detach()
    in_kept = fixed_logits + 1
    operators = torch.ops.freqfusion
    similarity, saved = operators.local_similarity(fixed, 3, 1, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in (
        (operators.carafe, (x, kernels, 3, 1, False, "triton")),
        (operators.carafe_backward_x, (kernels, grad, (1, 2), 3, 1, True, "triton")),
        (operators.carafe_backward_kernels, (x, grad, 3, 1, False, "triton")),
        (operators.carafe_from_logits, (x, kernels, None, None, 3, 1, False, 2, False)),
        (operators.carafe_from_logits, (x, kernels, None, grad, 3, 1, False, 0, True)),
        (operators.carafe_from_logits_backward, (fixed, fixed_logits, None, incoming, None, 3, 1, False, 2)),
        (
            operators.carafe_from_logits_backward,
            (fixed, fixed_logits, None, incoming, in_kept, 3, 1, False, 0),
        ),
        (operators.local_similarity, (x, 3, 1, "triton")),
        (operators.local_similarity_backward, (fixed, saved, similarity + 1, 3, 1, "triton")),
        (operators.normalize_kernels, (kernels, None, 9)),
        (operators.normalize_kernels_backward, (kernels.detach(), None, kernels.detach() + 1, 9)),
        (operators.resample, (x, offsets, 1, (1, 2), "triton")),
        (operators.resample_backward_x, (fixed, offsets.detach(), incoming, 1, (1, 2), "triton")),
        (operators.resample_backward_offsets, (fixed, offsets.detach(), incoming, 1, (1, 2), "triton")),
    ):
        results = torch.library.opcheck(operator.default, arguments, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


def test_second_derivatives() -> None:
    """Of each kernel, against those of plain torch in float64."""
    x, kernels = torch.randn(1, 2, 2, 2), torch.randn(1, 9, 2, 3)
    offsets = 0.3 + 0.1 * torch.rand(1, 2, 2, 3)
    for operator, inputs in (
        (lambda x, kernels: carafe(x, kernels, 3), (x, kernels)),
        (lambda x, logits: carafe_from_logits(x, logits, 3, gain=2), (x, kernels)),
        (
            lambda *maps: torch.cat(add_low_pass(*maps, 3, keep=True), 1),
            (x.repeat(1, 1, 1, 2)[..., :3], x, kernels),
        ),
        (lambda x: local_similarity(x, dilation=1), (x,)),
        (resample, (x, offsets)),
    ):
        found = []
        for name, dtype, device in (("triton", F32, DEVICE), ("torch", torch.float64, "cpu")):
            leaves = [tensor.detach().to(device, dtype).requires_grad_() for tensor in inputs]
            if (operator, name) == (resample, "torch"):
                operator = resample_naive  # the sampler of torch 2.8 has no second derivative
            with use_backend(name):
                first = torch.autograd.grad(operator(*leaves).square().sum(), leaves, create_graph=True)
                found.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
        for number, (actual, wanted) in enumerate(zip(*found, strict=True)):
            assert_close(f"second {number}", actual.cpu(), wanted, 1e-4)


def test_a_whole_module_agrees() -> None:
    """FreqFusion with kernels and without, results and gradients."""
    options = {"compressed_channels": 8, "lowpass_kernel": 3, "feature_resample_group": 2, "init": "official"}
    fusion = FreqFusion(4, 6, **options)
    inputs = torch.randn(1, 4, 3, 4), torch.randn(1, 6, 2, 2)
    found = []
    for name, dtype, device in (("triton", F32, DEVICE), ("torch", torch.float64, "cpu")):
        module = fusion.to(device, dtype)
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
        with use_backend(name):
            out = module(hr_feat=leaves[0], lr_feat=leaves[1])
            total = sum(((i + 1) * value.square()).mean() for i, value in enumerate(out))
            found.append([*out, *torch.autograd.grad(total, (*leaves, *module.parameters()))])
    for number, (actual, wanted) in enumerate(zip(*found, strict=True)):
        assert_close(f"tensor {number}", actual.cpu(), wanted, 1e-3)


def test_freqfusion_filters_from_logits_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from freqfusion.ops.carafe import triton as kernels

    calls = []
    original = kernels.carafe_from_logits
    monkeypatch.setattr(
        kernels, "carafe_from_logits", lambda *args: calls.append(args[4:]) or original(*args)
    )
    fusion = FreqFusion(4, 4, compressed_channels=8, lowpass_kernel=3).to(DEVICE)
    with use_backend("triton"), torch.no_grad():
        fusion(hr_feat=torch.rand(1, 4, 2, 2, device=DEVICE), lr_feat=torch.rand(1, 4, 1, 1, device=DEVICE))
    assert calls == [
        (3, 1, False, 2, False),
        (3, 1, False, 0, False),
        (3, 1, False, 0, True),
        (3, 1, False, 2, False),
    ]  # the gain, and whether the kernels are kept


def test_compiles_to_one_graph_for_all_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def chain(x: Tensor, kernels: Tensor, offsets: Tensor) -> Tensor:
        out = local_similarity(resample(carafe(x, kernels, 3), offsets))
        return carafe_from_logits(out, kernels, 3, gain=2)

    compiled = torch.compile(chain, fullgraph=True, dynamic=True, backend=counter)
    for h, w in ((3, 5), (4, 6)):
        x = torch.randn(1, 7, h, w, device=DEVICE, requires_grad=True)
        kernels = torch.randn(1, 9, h + 1, w + 3, device=DEVICE)
        offsets = 0.3 + 0.1 * torch.rand(1, 2, h + 1, w + 3, device=DEVICE)
        found = []
        for name, called in (("triton", compiled), ("torch", chain)):
            with use_backend(name):
                found += torch.autograd.grad(called(x, kernels, offsets).sum(), x)
        assert_close("grad", *found, 1e-4)
    assert counter.frame_count == 1


def test_nan_offsets_show_in_the_gradients_as_with_torch() -> None:
    x = torch.randn(1, 4, 3, 5, requires_grad=True)
    offsets = torch.randn(1, 4, 4, 6)
    offsets[0, 0, 1, 1] = offsets[0, 3, 2, 2] = float("nan")
    offsets[0, ::2, 3, 3], offsets[0, 1, 0, 0] = float("nan"), float("inf")
    leaves = [tensor.detach().to(DEVICE).requires_grad_() for tensor in (x, offsets)]
    out = resample(*leaves, 2, backend="triton")
    grads = torch.autograd.grad(out.sum(), leaves)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, offsets)]
    expected = torch.autograd.grad(resample(*leaves, 2, backend="torch").sum(), leaves)
    for value, wanted in zip(grads, expected, strict=True):
        assert bool(wanted.isnan().any())
        torch.testing.assert_close(value.cpu(), wanted, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("window", "dilation"), [(3, 5), (3, 2**62), (7, 2), (9, 1)])
def test_windows_beyond_the_map(window: int, dilation: int) -> None:
    x = torch.randn(1, 3, 2, 3)
    cotangent = torch.randn(1, window**2 - 1, 2, 3)
    results = []
    for backend, device in (("triton", DEVICE), ("torch", "cpu")):
        leaf = x.to(device).requires_grad_()
        out = local_similarity(leaf, window, dilation, backend=backend)
        (grad,) = torch.autograd.grad(out, leaf, cotangent.to(device))
        results.append((out.detach().cpu(), grad.cpu()))
    for value, wanted in zip(*results, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
