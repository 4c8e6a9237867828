"""The Triton kernels of similarity, normalisation and resampling: rounding, layouts, tiles, what they take of a GPU.

On a GPU where there is one, else in Triton's interpreter, whose rounding to bfloat16 is not a GPU's.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from freqfusion.ops import (
    available_backends,
    explain,
    local_similarity,
    local_similarity_naive,
    normalize_kernels,
    normalize_kernels_naive,
    resample,
    resample_naive,
    use_backend,
)
from support import run_compiling

REASON = available_backends()["triton"]
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "triton is there")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FIRST, LAST = torch.contiguous_format, torch.channels_last
NAN = float("nan")
LIMIT = {F32: 2e-6, F16: 5e-4, BF16: 2e-3}


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def random_map(
    shape: tuple[int, ...], dtype: torch.dtype = F32, layout: torch.memory_format = FIRST, scale: float = 1
) -> Tensor:
    return (scale * torch.randn(shape)).to(DEVICE, dtype).contiguous(memory_format=layout)


def gradients(operator: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor) -> list[Tensor]:
    """The result and the gradients in all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = operator(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def fast_gradients(
    operator: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor
) -> list[Tensor]:
    with use_backend("triton"):
        return gradients(operator, inputs, cotangent)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm."""
    difference = actual.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().norm().clamp_min(1e-30))


def assert_agrees(
    fast: Callable[..., Tensor],
    naive: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    layout: torch.memory_format,
) -> None:
    """With float64, to rounding; in the dtypes of the inputs and the layout of the first."""
    exact = tuple(tensor.double() for tensor in inputs)
    shape = naive(*exact).shape
    cotangent = random_map(shape, inputs[0].dtype, layout)
    actual = fast_gradients(fast, inputs, cotangent)
    expected = gradients(naive, exact, cotangent)
    for value, wanted, like in zip(actual, expected, (inputs[0], *inputs), strict=True):
        assert value.dtype == like.dtype
        assert error(value, wanted) <= LIMIT[inputs[0].dtype]
    assert actual[0].is_contiguous(memory_format=layout)
    assert actual[1].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("shape", "dilation"),
    [
        ((2, 16, 5, 18), 2),  # aligned in both layouts, several tiles
        ((1, 20, 9, 10), 1),
        ((1, 70, 2, 3), 2),  # several blocks of channels
        ((1, 3, 4, 5), 7),  # wider than the map
    ],
)
def test_similarity(
    shape: tuple[int, ...], dilation: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    assert_agrees(
        lambda x: local_similarity(x, 3, dilation),
        lambda x: local_similarity_naive(x, 3, dilation),
        (random_map(shape, dtype, layout),),
        layout,
    )


def test_similarity_of_larger_windows_keeps_half_precision_exact() -> None:
    assert_agrees(
        lambda x: local_similarity(x, 5, 1),
        lambda x: local_similarity_naive(x, 5, 1),
        (random_map((2, 5, 6, 9), F16, LAST),),
        LAST,
    )


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("size", "kernel_size", "groups", "windowed"),
    [((4, 70), 3, 1, True), ((5, 7), 5, 2, True), ((1, 1), 3, 3, False), ((3, 2), 9, 1, True)],
)
def test_normalisation(
    size: tuple[int, int],
    kernel_size: int,
    groups: int,
    windowed: bool,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    logits = random_map((2, groups * kernel_size**2, *size), dtype, layout, scale=3)
    window = torch.rand(kernel_size, kernel_size, device=DEVICE) + 0.01 if windowed else None
    assert_agrees(
        lambda logits: normalize_kernels(logits, kernel_size, groups, window),
        lambda logits: normalize_kernels_naive(logits, kernel_size, groups, window),
        (logits,),
        layout,
    )


def test_normalisation_of_bad_logits_spoils_their_pixel_alone() -> None:
    logits = random_map((1, 18, 3, 4))
    logits[0, 2, 1, 1], logits[0, 9:, 2, 3] = float("inf"), -float("inf")
    logits[0, 0, 0, 0] = -float("inf")  # a tap that is off
    expected = normalize_kernels_naive(logits, 3, 2)
    assert int(expected.isnan().sum()) == 18
    with use_backend("triton"):
        actual = normalize_kernels(logits, 3, 2)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_a_learnt_window_gets_its_gradient() -> None:
    logits, window = random_map((1, 9, 2, 3)), torch.rand(3, 3, device=DEVICE) + 0.1
    cotangent = random_map((1, 9, 2, 3))
    _, *actual = fast_gradients(
        lambda logits, w: normalize_kernels(logits, 3, 1, w), (logits, window), cotangent
    )
    _, *expected = gradients(
        lambda logits, w: normalize_kernels_naive(logits, 3, 1, w), (logits, window), cotangent
    )
    for value, wanted in zip(actual, expected, strict=True):
        assert error(value, wanted) < 1e-5


def test_a_window_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window is on meta and logits on .*; move them to one device"):
        normalize_kernels(random_map((1, 9, 2, 3)), 3, window=torch.ones(9, device="meta"))


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("channels", "groups", "size", "out_size", "unit", "spread"),
    [
        (16, 2, (9, 10), (5, 12), (4, 5), 0.3),
        (3, 1, (5, 6), (7, 9), None, 40.0),  # to anywhere
        (70, 1, (2, 9), (4, 3), None, 1.0),  # several blocks of channels, a coarser output
        (1, 1, (1, 1), (2, 3), None, 1.0),
    ],
)
def test_resample(
    channels: int,
    groups: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    unit: tuple[int, int] | None,
    spread: float,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    x = random_map((2, channels, *size), dtype, layout)
    # exact in half precision, and never at a whole position, where the derivative in the offsets jumps
    offsets = ((16 * random_map((2, 2 * groups, *out_size), scale=spread)).round() + 0.25) / 16
    assert_agrees(
        lambda x, offsets: resample(x, offsets, groups, unit),
        lambda x, offsets: resample_naive(x, offsets, groups, unit),
        (x, offsets.to(dtype).clamp(-60.25, 60.25)),
        layout,
    )


def test_positions_of_more_tiles_than_one_search_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gather looks for tiles some at a time; here only one does not lie where its neighbours do."""
    from freqfusion.ops.resample import triton as kernels

    monkeypatch.setattr(kernels, "SEARCHED", 2)
    offsets = 0.3 * random_map((1, 2, 13, 26)).clamp(-2, 2) + 0.01
    offsets[0, 0, 5, 12] = 20.0
    offsets[0, 1, 9, 2] = -30.0
    assert_agrees(resample, resample_naive, (random_map((1, 2, 9, 10)), offsets), FIRST)


def test_a_bad_gradient_reaches_the_tiles_that_visit_its_own() -> None:
    for layout in (FIRST, LAST):
        x, grad = random_map((1, 2, 24, 24), layout=layout), random_map((1, 2, 24, 24), layout=layout)
        offsets = torch.zeros(1, 2, 24, 24, device=DEVICE)
        grad[0, 1, 2, 3] = NAN
        _, grad_x, grad_offsets = fast_gradients(resample, (x, offsets), grad)
        assert bool(grad_x[0, 1, 2, 3].isnan())
        assert not bool(grad_x[0, 0].isnan().any())
        assert not bool(grad_x[0, 1, 16:].isnan().any() or grad_x[0, 1, :, 16:].isnan().any())
        expected = torch.zeros(24, 24, dtype=torch.bool)
        expected[2, 3] = True
        assert torch.equal(grad_offsets[0, 0].isnan().cpu(), expected)


def test_a_bad_value_reaches_the_gradients_of_its_neighbours_alone() -> None:
    for layout in (FIRST, LAST):
        x = random_map((1, 3, 9, 12), layout=layout)
        x[0, 1, 4, 5] = NAN
        _, grad = fast_gradients(local_similarity, (x,), random_map((1, 8, 9, 12)))
        reached = torch.zeros(9, 12, dtype=torch.bool)
        reached[2:7:2, 3:8:2] = True
        for reduced in (grad[0].isnan().any(dim=0), grad[0].isnan().all(dim=0)):  # in all of their channels
            assert torch.equal(reduced.cpu(), reached)


STRIDED = {
    "sliced": lambda x: x.repeat_interleave(2, dim=1).repeat_interleave(3, dim=3)[:, ::2, :, ::3],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last in a wider one": lambda x: torch.cat((x, x), 1).contiguous(memory_format=LAST)[
        :, : x.shape[1]
    ],
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("name", list(STRIDED))
def test_any_strides(name: str) -> None:
    strided = STRIDED[name]
    for operator, shapes in (
        (lambda x: local_similarity(x, dilation=1), ((1, 8, 3, 4),)),
        (lambda x: normalize_kernels(x, 3), ((2, 9, 2, 4),)),
        (resample, ((1, 8, 3, 4), (1, 2, 2, 4))),
    ):
        inputs = tuple(random_map(shape) for shape in shapes)
        out = operator(*inputs)
        grad = random_map(tuple(out.shape))
        for given in (grad, grad[:1, :1, :1, :1].expand(grad.shape)):  # as from a sum
            expected = fast_gradients(operator, inputs, given.contiguous())
            actual = fast_gradients(operator, tuple(map(strided, inputs)), given)
            for value, wanted in zip(actual, expected, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_places_beyond_32_bit(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results with 64-bit places, which maps of more than 2**31 values get."""
    from freqfusion.ops._triton.tiles import is_wide
    from freqfusion.ops.local_similarity import triton as similarity
    from freqfusion.ops.normalize_kernels import triton as normalisation
    from freqfusion.ops.resample import triton as sampling

    assert is_wide(torch.empty(1, 2**16, 2**8, 2**8, device="meta"))
    assert not is_wide(torch.empty(64, 2**14, 2**8, 2**8, device="meta"))
    x, logits, offsets = (
        random_map((1, 8, 3, 4), layout=layout),
        random_map((1, 9, 3, 4)),
        random_map((1, 2, 3, 4)),
    )
    grad = random_map((1, 8, 3, 4), layout=layout)

    def run() -> list[Tensor]:
        return [
            *fast_gradients(local_similarity, (x,), grad),
            *fast_gradients(lambda logits: normalize_kernels(logits, 3), (logits,), logits),
            *fast_gradients(resample, (x, offsets), grad),
        ]

    expected = run()
    for module in (similarity, normalisation, sampling):
        monkeypatch.setattr(module, "is_wide", lambda *maps: True)
    for value, wanted in zip(run(), expected, strict=True):
        assert torch.equal(value, wanted)


ALLOWED = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"),
    *("to", "_to_copy", "copy_", "contiguous", "clone", "detach", "detach_", "expand", "as_strided"),
    *("view", "view_as", "reshape", "flatten", "unsqueeze"),
}
"""Operators of torch that allocate, copy and view."""


def test_no_operator_of_torch_adds_in_any_order() -> None:
    """What the kernels leave to torch is to allocate, copy and view; nothing that a GPU may do in another order.

    And to find minima of integers, which are the same in any order: see test_directed_resample.py.
    """
    x, logits = random_map((1, 8, 3, 4), layout=LAST), random_map((1, 9, 3, 4))
    offsets, grad = random_map((1, 2, 3, 4)), random_map((1, 8, 3, 4))
    for operator, inputs, cotangent in (
        (local_similarity, (x,), grad),
        (lambda logits: normalize_kernels(logits, 3), (logits,), logits),
        (resample, (x, offsets), grad),
    ):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            fast_gradients(operator, inputs, cotangent)
        names = {event.name for event in profiled.events() or ()}
        minima = {"amin", "slice", "fill_"} if operator is resample else set()
        assert "aten::empty" in names
        assert {
            name.removeprefix("aten::") for name in names if name.startswith("aten::")
        } <= ALLOWED | minima


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_deterministic_algorithms_are_enough() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for layout in (FIRST, LAST):
            for dtype in (F32, BF16):
                x, grad = (random_map((2, 64, 50, 84), dtype, layout) for _ in range(2))
                offsets = random_map((2, 8, 50, 84), dtype)
                found = [
                    fast_gradients(lambda x, offsets: resample(x, offsets, 4), (x, offsets), grad)
                    for _ in range(2)
                ]
                assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_rounding_to_bfloat16(layout: torch.memory_format) -> None:
    for operator, shapes in (
        (local_similarity, ((2, 64, 50, 84),)),
        (lambda logits: normalize_kernels(logits, 5), ((2, 25, 50, 84),)),
        (lambda x, offsets: resample(x, offsets, 4), ((2, 64, 50, 84), (2, 8, 50, 84))),
    ):
        inputs = tuple(random_map(shape, BF16, layout) for shape in shapes)
        if len(inputs) == 2:
            inputs = inputs[0], (((16 * inputs[1].float()).round().clamp(-48, 48) + 0.25) / 16).to(BF16)
        exact = tuple(tensor.double() for tensor in inputs)
        with use_backend("torch"):
            cotangent = random_map(tuple(operator(*exact).shape), BF16, layout)
            expected = gradients(operator, exact, cotangent)
        for value, wanted in zip(fast_gradients(operator, inputs, cotangent), expected, strict=True):
            assert error(value, wanted) <= LIMIT[BF16]


def test_explains_which_kernels_serve() -> None:
    x, offsets = random_map((1, 8, 3, 4)), random_map((1, 4, 3, 4))
    last, odd = x.contiguous(memory_format=LAST), random_map((1, 6, 3, 4), layout=LAST)
    with use_backend("triton"):
        assert explain("resample", last, offsets, groups=2).kernels == "channels side by side"
        assert "do not lie side by side" in explain("resample", x, offsets, groups=2).kernels
        assert "not a multiple of 4" in explain("resample", odd, offsets, groups=2).kernels
        assert explain("local_similarity", x).kernels.startswith("window 3x3: tiles of rows;")
        assert explain("local_similarity", last).kernels.startswith("window 3x3: channels side by side;")
        large = torch.zeros(1, 1, 1, 1, device=DEVICE).expand(1, 4097, 1, 1)
        assert explain("normalize_kernels", large).cannot["triton"] == "there are more than 4096 channels"


USUAL = ("local_similarity 3x3 64x200x336", "normalize_kernels 5x5 200x336", "resample 256x200x336 in 4")

COMPILE = """
import json, sys
from freqfusion.ops._backends import implementation
from freqfusion.ops._triton.registry import compile_case

capability, *wanted = sys.argv[1:]
found = []
for operator in ("local_similarity", "normalize_kernels", "resample"):
    for case in implementation(operator, "triton").cases():
        if not wanted or any(case.name.startswith(name) for name in wanted):
            found += [usage._asdict() for usage in compile_case(case, int(capability))]
print(json.dumps(found))
"""

SIZES = """
import json, sys
import torch
from freqfusion.ops.local_similarity import triton as local_similarity
from freqfusion.ops.normalize_kernels import triton as normalize_kernels
from freqfusion.ops.resample import triton as resample
from freqfusion.ops._triton.registry import Case, compile_case

keys = []
for height, width in ((16, 32), (25, 42)):
    def run():
        x, taps, moves = (
            torch.empty((2, channels, height, width), dtype=torch.float16, memory_format=getattr(torch, sys.argv[1]))
            for channels in (64, 25, 8)
        )
        similarity, saved = local_similarity.local_similarity(x, 3, 2, 1e-8, 5)
        local_similarity.local_similarity_backward(x, saved, similarity, 3, 2)
        normalize_kernels.normalize_kernels(taps, torch.ones(25), 25)
        normalize_kernels.normalize_kernels_backward(taps, torch.ones(25), taps, 25)
        resample.resample(x, moves, 4, height, width)
        resample.resample_backward_offsets(x, moves, x, 4, height, width)
        resample.resample_backward_x(moves, x, (height, width), 4, height, width)
    keys += [usage.key for usage in compile_case(Case("", run), 90)]
print(json.dumps(keys))
"""


@pytest.mark.parametrize(
    ("capability", "shared", "cases"),
    [
        ("90", 227, [f"{name} bfloat16 channels_last" for name in USUAL]),
        ("80", 163, [f"{USUAL[-1]} float32 channels_last"]),
        pytest.param("90", 227, [], marks=pytest.mark.slow),
        pytest.param("80", 163, [], marks=pytest.mark.slow),
    ],
)
def test_kernels_fit_a_gpu(capability: str, shared: int, cases: list[str]) -> None:
    found = run_compiling(COMPILE, capability, *cases)
    assert len(found) >= 4
    for usage in found:
        assert usage["stack"] == 0, usage  # no register is spilled
        assert usage["shared"] <= shared * 1024, usage


@pytest.mark.parametrize(
    "layout", ["channels_last", pytest.param("contiguous_format", marks=pytest.mark.slow)]
)
def test_a_second_size_compiles_nothing(layout: str) -> None:
    keys = run_compiling(SIZES, layout)
    assert len(keys) == 16
    assert keys[:8] == keys[8:]
