"""Grouped bilinear sampling: the oracle, identity, units, precision, wrong input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freqfusion.ops import resample, resample_naive
from support import assert_close

pytestmark = pytest.mark.usefixtures("each_backend")


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    out_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    unit=st.sampled_from([None, (3, 4)]),
)
def test_equals_naive(
    groups: int, size: tuple[int, int], out_size: tuple[int, int], unit: tuple[int, int] | None
) -> None:
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    offsets = 2 * torch.randn(2, 2 * groups, *out_size, dtype=torch.float64)
    out, oracle = (function(x, offsets, groups, unit) for function in (resample, resample_naive))
    assert torch.allclose(out, oracle, rtol=1e-9, atol=1e-11)
    cotangent = torch.randn_like(oracle)
    actual, expected = (torch.autograd.grad(value, x, cotangent)[0] for value in (out, oracle))
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [(1, 1), (5, 8), (27, 33)])
def test_zero_offsets_are_the_identity(size: tuple[int, int]) -> None:
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    out = resample(x, torch.zeros(2, 8, *size, dtype=torch.float64), groups=4, unit_size=(3, 4))
    assert_close("out", out, x, 1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_result_lies_as_the_map(layout: torch.memory_format) -> None:
    x = torch.randn(2, 8, 5, 7).contiguous(memory_format=layout)
    assert resample(x, torch.randn(2, 4, 9, 13), 2).is_contiguous(memory_format=layout)


def test_zero_offsets_interpolate() -> None:
    x = torch.randn(1, 2, 5, 7, dtype=torch.float64)
    out = resample(x, torch.zeros(1, 2, 10, 14, dtype=torch.float64))
    expected = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert_close("out", out, expected, 1e-12)


def test_units_order_and_groups() -> None:
    x = torch.arange(12.0).reshape(1, 1, 3, 4).repeat(1, 2, 1, 1)
    offsets = torch.zeros(1, 4, 3, 4)
    offsets[:, 1] = 1  # x displacement of the second group: one pixel to the right
    right = resample(x, offsets, groups=2)
    assert torch.allclose(right[:, 0], x[:, 0], atol=1e-5)
    assert torch.allclose(right[:, 1, :, :-1], x[:, 1, :, 1:], atol=1e-5)
    assert torch.allclose(right[:, 1, :, -1], x[:, 1, :, -1], atol=1e-5)  # the border is repeated
    down = torch.zeros(1, 4, 3, 4)
    down[:, 2] = 0.5  # y displacement of the first group, in pixels of a grid of half the rows
    moved = resample(x, down, groups=2, unit_size=(1, 4))
    assert torch.allclose(moved[0, 0, 0], x[0, 0, 1:3].mean(0), atol=1e-5)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    offsets = (0.3 + 0.1 * torch.rand(1, 4, 6, 8, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, o: resample(x, o, 2, (3, 4)), (x, offsets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_are_float32_in_half_precision(dtype: torch.dtype) -> None:
    """On a 400-pixel row a bfloat16 position would be off by up to two pixels."""
    x = torch.arange(400.0).reshape(1, 1, 1, 400).to(dtype)
    out = resample(x, torch.zeros(1, 2, 1, 400, dtype=dtype))
    assert out.dtype == dtype
    assert torch.allclose(out.float(), x.float(), atol=1e-2)


def test_layouts_and_empty_batch() -> None:
    x, offsets = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 10, 12)
    expected = resample(x, offsets, 2)
    assert torch.equal(resample(x.contiguous(memory_format=torch.channels_last), offsets, 2), expected)
    assert torch.equal(resample(x.transpose(2, 3).contiguous().transpose(2, 3), offsets, 2), expected)
    assert resample(torch.zeros(0, 4, 5, 6), torch.zeros(0, 4, 10, 12), 2).shape == (0, 4, 10, 12)


def test_wrong_input() -> None:
    x, offsets = torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 6, 6)
    with pytest.raises(ValueError, match=r"offsets must have 2 \* groups = 2 channels, got 4"):
        resample(x, offsets)
    with pytest.raises(ValueError, match="groups must divide the channels of x, got 3"):
        resample(x, offsets, 3)
    with pytest.raises(ValueError, match="batch sizes differ"):
        resample(x, offsets.expand(2, -1, -1, -1), 2)
    with pytest.raises(TypeError, match="offsets must be floating point"):
        resample(x, offsets.long(), 2)
