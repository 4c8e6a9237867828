"""Window similarity: the oracle, derivatives, dtypes, wrong input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freqfusion.ops import window_similarity, window_similarity_naive

pytestmark = pytest.mark.usefixtures("each_backend")


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    extra=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    kernel=st.sampled_from([1, 3, 5]),
    padding=st.sampled_from(["zeros", "reflect"]),
)
def test_equals_naive(size: tuple[int, int], extra: tuple[int, int], kernel: int, padding: str) -> None:
    key = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 3, size[0] + extra[0], size[1] + extra[1], dtype=torch.float64, requires_grad=True)
    out, oracle = (
        function(query, key, kernel, padding) for function in (window_similarity, window_similarity_naive)
    )
    torch.testing.assert_close(out, oracle)
    cotangent = torch.randn_like(oracle)
    for actual, expected in zip(
        torch.autograd.grad(out, (query, key), cotangent),
        torch.autograd.grad(oracle, (query, key), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_gradcheck_to_second_order() -> None:
    key = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    query = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: window_similarity(q, k, 3), (query, key))
    assert torch.autograd.gradgradcheck(lambda q, k: window_similarity(q, k, 3), (query, key))


def test_half_precision_and_empty_batch() -> None:
    query, key = torch.randn(1, 32, 6, 8).bfloat16(), torch.randn(1, 32, 3, 4).bfloat16()
    out = window_similarity(query, key, 5)
    assert out.dtype == torch.bfloat16
    exact = window_similarity(query.double(), key.double(), 5)
    assert float((out.double() - exact).abs().max() / exact.abs().max()) < 2**-8
    assert window_similarity(query[:0], key[:0], 5).shape == (0, 25, 6, 8)


def test_wrong_input() -> None:
    query, key = torch.zeros(1, 4, 6, 6), torch.zeros(1, 4, 3, 3)
    with pytest.raises(ValueError, match="equal channels, got 4 and 2"):
        window_similarity(query, key[:, :2], 3)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        window_similarity(query, key, 4)
    with pytest.raises(ValueError, match="padding_mode must be"):
        window_similarity(query, key, 3, "edge")
    with pytest.raises(TypeError, match="query must be floating point"):
        window_similarity(query.long(), key, 3)
