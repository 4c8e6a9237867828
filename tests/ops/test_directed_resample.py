"""Sampling where two resolutions say: the composed form, and Triton's kernels against float64."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from freqfusion.ops import available_backends, explain, resample, resample_naive, use_backend
from freqfusion.ops._checks import layout as layout_of
from freqfusion.ops.resample.directed import directed_offsets, directed_resample

REASON = available_backends()["triton"]
triton = pytest.mark.skipif(bool(REASON), reason=REASON or "triton is there")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16 = torch.float32, torch.float16
FIRST, LAST = torch.contiguous_format, torch.channels_last
LIMIT = {F32: 2e-6, F16: 5e-4}
UNIT = (2, 3)
Maps = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def maps(
    channels: int,
    groups: int,
    coarse: tuple[int, int],
    fine: tuple[int, int] | None = None,
    dtype: torch.dtype = F32,
    layout: torch.memory_format = FIRST,
) -> Maps:
    """The map to read, of the fine size, and the predictions for it."""
    fine = fine or (2 * coarse[0], 2 * coarse[1])
    x, of_fine, of_coarse = (
        torch.randn(2, n, *size).to(DEVICE, dtype).contiguous(memory_format=layout).requires_grad_()
        for n, size in ((channels, fine), (4 * groups, fine), (16 * groups, coarse))
    )
    return x, of_fine, of_coarse


def gradients(run: Callable[[], Tensor], inputs: Maps) -> list[Tensor]:
    """The result and its gradients."""
    out = run()
    torch.manual_seed(1)
    cotangent = torch.randn(out.shape).to(out.device, out.dtype).contiguous(memory_format=layout_of(out))
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def fast(inputs: Maps, groups: int) -> list[Tensor]:
    with use_backend("triton"):
        return gradients(lambda: directed_resample(*inputs, groups, UNIT), inputs)


def slow(inputs: Maps, groups: int) -> list[Tensor]:
    """Written out, in float64."""
    x, fine, coarse = exact = tuple(tensor.detach().cpu().double().requires_grad_() for tensor in inputs)
    predicted = fine + torch.nn.functional.pixel_shuffle(coarse, 2)
    half = 2 * groups
    offsets = predicted[:, :half] / (1 + (-predicted[:, half:]).exp())
    return gradients(lambda: resample_naive(x, offsets, groups, UNIT), (exact[0], exact[1], exact[2]))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30))


@triton
@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("channels", "groups", "coarse"),
    [(16, 2, (2, 5)), (70, 1, (1, 3)), (3, 3, (1, 1)), (8, 1, (3, 9))],
)
def test_agrees_with_float64(
    channels: int, groups: int, coarse: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    inputs = maps(channels, groups, coarse, None, dtype, layout)
    actual, expected = fast(inputs, groups), slow(inputs, groups)
    for value, wanted, like in zip(actual, expected, (inputs[0], *inputs), strict=True):
        assert value.dtype == dtype
        assert value.is_contiguous(memory_format=FIRST if like.is_contiguous() else LAST)
        assert error(value, wanted) <= LIMIT[dtype]


@triton
@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("channels", "groups", "coarse"), [(16, 2, (2, 5)), (70, 1, (1, 4)), (64, 1, (3, 9)), (6, 3, (2, 2))]
)
def test_a_result_in_another_layout(
    channels: int, groups: int, coarse: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Its gradient too; the gradients of the maps lie as these do."""
    inputs = maps(channels, groups, coarse, None, dtype, layout)
    other = FIRST if layout == LAST else LAST
    with use_backend("triton"):
        actual = gradients(lambda: directed_resample(*inputs, groups, UNIT, other == LAST), inputs)
    formats = (other, layout, layout, layout)
    for value, wanted, memory in zip(actual, slow(inputs, groups), formats, strict=True):
        assert value.is_contiguous(memory_format=memory)
        assert error(value, wanted) <= LIMIT[dtype]


@triton
def test_a_map_of_another_size_and_dtype() -> None:
    """The coarse map itself, as without the low-pass; and in float32 with predictions in half precision."""
    _, fine, coarse = maps(4, 2, (3, 4), dtype=F16, layout=LAST)
    x = torch.randn(2, 4, 3, 4, device=DEVICE, requires_grad=True)
    inputs = (x, fine, coarse)
    for value, wanted, like in zip(fast(inputs, 2), slow(inputs, 2), (x, *inputs), strict=True):
        assert value.dtype == like.dtype
        assert error(value, wanted) <= LIMIT[like.dtype]


@pytest.mark.parametrize(
    ("fine", "backend"),
    [((6, 8), "torch"), *(pytest.param(size, "triton", marks=triton) for size in ((5, 7), (7, 11), (3, 4)))],
)
def test_elsewhere_it_is_composed(fine: tuple[int, int], backend: str) -> None:
    """Without kernels of its own; and at another size than twice the coarse one, of the nearest prediction."""
    x, of_fine, of_coarse = maps(4, 2, (3, 4), fine)
    shuffled = torch.nn.functional.pixel_shuffle(of_coarse, 2)
    direction, magnitude = (torch.nn.functional.interpolate(shuffled, fine) + of_fine).chunk(2, 1)
    offsets = direction * magnitude.sigmoid()
    assert torch.equal(directed_offsets(of_fine, of_coarse), offsets)
    with use_backend(backend):
        actual = directed_resample(x, of_fine, of_coarse, 2, UNIT)
        assert torch.equal(actual, resample(x, offsets, 2, UNIT))
        assert directed_resample(x, of_fine, of_coarse, 2, UNIT, True).is_contiguous(memory_format=LAST)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda x: x.repeat_interleave(2, dim=1).repeat_interleave(3, dim=3)[:, ::2, :, ::3],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last in a wider one": lambda x: torch.cat((x, x), 1).contiguous(memory_format=LAST)[
        :, : x.shape[1]
    ],
}


@triton
@pytest.mark.parametrize("name", list(STRIDED))
def test_any_strides(name: str) -> None:
    inputs = maps(8, 2, (2, 4))
    x, fine, coarse = (STRIDED[name](tensor.detach()).requires_grad_() for tensor in inputs)
    for value, wanted in zip(fast((x, fine, coarse), 2), fast(inputs, 2), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@triton
@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_places_beyond_32_bit(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    from freqfusion.ops.resample import triton as kernels

    inputs = maps(8, 2, (2, 4), layout=layout)
    expected = fast(inputs, 2)
    monkeypatch.setattr(kernels, "is_wide", lambda *maps: True)
    for value, wanted in zip(fast(inputs, 2), expected, strict=True):
        assert torch.equal(value, wanted)


@triton
@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_nothing_outside_is_read(layout: torch.memory_format) -> None:
    def surrounded(x: Tensor) -> Tensor:
        around = torch.full([size + 2 for size in x.shape], float("nan"), device=DEVICE)
        inside = around.contiguous(memory_format=layout)[1:-1, 1:-1, 1:-1, 1:-1]
        return inside.copy_(x.detach()).requires_grad_()

    x, fine, coarse = (surrounded(tensor) for tensor in maps(4, 2, (2, 3)))
    assert all(bool(value.isfinite().all()) for value in fast((x, fine, coarse), 2))


@triton
def test_a_bad_prediction_spoils_its_positions() -> None:
    """Of a coarse pixel one sub-pixel, of its group; its own gradient and that of the pixels beside the place."""
    x, fine, coarse = maps(4, 2, (3, 4))
    coarse.data[1, 4 * 1 + 2, 1, 2] = float("nan")  # along x, second group, lower left
    out, in_x, in_fine, in_coarse = fast((x, fine, coarse), 2)
    spoilt = torch.zeros(2, 4, 6, 8, dtype=torch.bool)
    spoilt[1, 2:, 3, 4] = True
    assert torch.equal(out.isnan().cpu(), spoilt)
    assert bool(in_x[:, :2].isfinite().all())
    assert bool(in_fine[1, [1, 3, 5, 7], 3, 4].isnan().any())
    in_fine[1, :, 3, 4] = 0
    assert bool(in_fine.isfinite().all())
    assert bool(in_coarse[1, 6, 1, 2].isnan())


@triton
def test_what_is_left_to_torch_adds_nothing() -> None:
    """It allocates, views and takes minima of integers, so nothing depends on an order."""
    inputs, amin = maps(8, 2, (2, 4), layout=LAST), Tensor.amin
    minima: list[torch.dtype] = []

    def noted(x: Tensor, axis: int) -> Tensor:
        minima.append(x.dtype)
        return amin(x, axis)

    with use_backend("triton"):
        out = directed_resample(*inputs, 2, UNIT)
        cotangent = torch.randn(out.shape, device=DEVICE).contiguous(memory_format=LAST)
        with (
            profile(activities=[ProfilerActivity.CPU]) as profiled,
            mock.patch.object(Tensor, "amin", noted),
        ):
            torch.autograd.grad(out, inputs, cotangent)
    names = {event.name for event in profiled.events() or () if event.name.startswith("aten::")}
    allowed = ("empty", "empty_like", "empty_strided", "new_empty", "copy_", "detach", "set_")
    views_and_minima = ("slice", "as_strided", "amin", "fill_")
    assert "aten::empty" in names
    assert names <= {f"aten::{name}" for name in (*allowed, *views_and_minima)}
    assert minima == [torch.int32]


@triton
def test_second_derivatives() -> None:
    inputs = maps(2, 1, (2, 3))

    def twice(run: Callable[[], Tensor]) -> list[Tensor]:
        out = run()
        torch.manual_seed(1)
        grad = torch.randn(out.shape, device=DEVICE, requires_grad=True)
        first = torch.autograd.grad(out, inputs, grad, create_graph=True)
        total = sum((value * torch.randn_like(value)).sum() for value in first)
        return list(torch.autograd.grad(total, (*inputs, grad)))

    with use_backend("triton"):
        found = twice(lambda: directed_resample(*inputs, 1, UNIT))
    expected = twice(lambda: resample_naive(inputs[0], directed_offsets(*inputs[1:]), 1, UNIT))
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-4)


@triton
def test_opcheck() -> None:
    x, fine, coarse = maps(4, 2, (1, 2), layout=LAST)
    operators = torch.ops.freqfusion
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    grad = torch.randn(x.shape, device=DEVICE, requires_grad=True)
    for operator, tensors in (
        (operators.directed_resample, (x, fine, coarse, 2, UNIT, True)),
        (operators.directed_resample, (x, fine, coarse, 2, UNIT, False)),
        (operators.directed_resample_backward, (x.detach(), fine.detach(), coarse.detach(), grad, 2, UNIT)),
    ):
        results = torch.library.opcheck(operator.default, tensors, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=triton)])
def test_wrong_maps_are_refused(backend: str) -> None:
    """A kernel would read beyond them."""
    x, fine, coarse = maps(4, 2, (3, 4))
    with use_backend(backend):
        for wrong, groups, message in (
            ((x, fine[:, :7], coarse), 2, "fine must have 8 channels for 2 groups, got 7"),
            ((x, fine, coarse[:, :16]), 2, "coarse must have 32 channels for 2 groups, got 16"),
            ((x, fine, coarse), 3, "groups"),
            ((x, fine[:1], coarse), 2, "batch"),
            ((x, fine, coarse[:1]), 2, "batch"),
            ((x[..., :0], fine, coarse), 2, "empty"),
        ):
            with pytest.raises(ValueError, match=message):
                directed_resample(*wrong, groups, UNIT)
        with pytest.raises(TypeError, match="fine"):
            directed_resample(x, fine.long(), coarse, 2, UNIT)


@triton
def test_explains_what_it_cannot() -> None:
    x, fine, coarse = maps(4, 2, (3, 4))
    with use_backend("triton"):
        assert explain("directed_resample", x, fine, coarse).backend == "triton"
        odd = explain("directed_resample", x, fine[..., :7], coarse)
    assert odd.backend == "torch"
    assert "twice the sides" in odd.cannot["triton"]
