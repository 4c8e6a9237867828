"""Arguments of a wrong type: one message for all, and never torch's schema."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from freqfusion import ops
from freqfusion.analysis.spectra import kernel_spectrum
from freqfusion.ops import carafe, explain, local_similarity, normalize_kernels, resample, window_similarity

X, KERNELS, OFFSETS = torch.zeros(1, 4, 3, 3), torch.zeros(1, 9, 6, 6), torch.zeros(1, 2, 6, 6)

NUMBERS: dict[str, Callable[[Any], Any]] = {
    "carafe kernel_size": lambda v: carafe(X, KERNELS, v),
    "carafe groups": lambda v: carafe(X, KERNELS, 3, v),
    "local_similarity window": lambda v: local_similarity(X, v),
    "local_similarity dilation": lambda v: local_similarity(X, 3, v),
    "normalize_kernels kernel_size": lambda v: normalize_kernels(KERNELS, v),
    "normalize_kernels groups": lambda v: normalize_kernels(KERNELS, 3, v),
    "resample groups": lambda v: resample(X, OFFSETS, v),
    "resample unit_size[0]": lambda v: resample(X, OFFSETS, 1, (v, 3)),
    "resample unit_size[1]": lambda v: resample(X, OFFSETS, 1, (3, v)),
    "window_similarity kernel_size": lambda v: window_similarity(X, X, v),
    "kernel_spectrum kernel_size": lambda v: kernel_spectrum(KERNELS, v),
    "kernel_spectrum size": lambda v: kernel_spectrum(KERNELS, 3, size=v),
}
WRONG = [
    1.0,
    3.5,
    float("nan"),
    True,
    "3",
    None,
    [3],
    torch.tensor(3),
    np.float64(3),
    np.bool_(True),
    np.ones(1),
]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("call", NUMBERS)
def test_whole_numbers(call: str, value: object) -> None:
    name = call.split()[1].replace("[", r"\[").replace("]", r"\]")
    kind = type(value).__name__
    with pytest.raises(
        TypeError, match=rf"^{name} must be a whole number, got .* of type {kind}; pass an int$"
    ):
        NUMBERS[call](value)


@pytest.mark.parametrize("value", [np.int64(1), np.uint8(1)], ids=repr)
@pytest.mark.parametrize("call", [call for call in NUMBERS if call.endswith(("groups", "dilation", "]"))])
def test_integers_of_numpy(call: str, value: int) -> None:
    assert torch.equal(NUMBERS[call](value), NUMBERS[call](1))


def test_window_sides_of_numpy() -> None:
    assert torch.equal(carafe(X + 1, KERNELS + 1, np.int32(3)), carafe(X + 1, KERNELS + 1, 3))
    assert local_similarity(X, np.int64(5)).shape == (1, 24, 3, 3)


@pytest.mark.parametrize("value", [3, 3.0, "33", (3,), (3, 3, 3), torch.tensor([3, 3])], ids=repr)
def test_unit_size(value: Any) -> None:
    with pytest.raises(
        TypeError, match=r"unit_size must be \(height, width\) or None, got .*; pass two ints"
    ):
        resample(X, OFFSETS, 1, value)


def test_unit_size_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"unit_size\[1\] must be at least 1, got 0"):
        resample(X, OFFSETS, 1, (3, 0))


@pytest.mark.parametrize(
    "value", [None, 3, "x", [[1.0]], np.zeros((1, 4, 3, 3))], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda v: carafe(v, KERNELS, 3)),
        ("kernels", lambda v: carafe(X, v, 3)),
        ("x", local_similarity),
        ("logits", lambda v: normalize_kernels(v, 3)),
        ("x", lambda v: resample(v, OFFSETS)),
        ("offsets", lambda v: resample(X, v)),
        ("query", lambda v: window_similarity(v, X, 3)),
        ("key", lambda v: window_similarity(X, v, 3)),
        ("a tensor", lambda v: explain("local_similarity", v)),
    ],
)
def test_tensors(name: str, call: Callable[[Any], Any], value: object) -> None:
    expected = (
        rf"^{name} must be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor\(\)$"
    )
    with pytest.raises(TypeError, match=expected):
        call(value)


def test_window_of_kernels_is_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"window must be a torch.Tensor, got list"):
        normalize_kernels(KERNELS, 3, window=[1.0] * 9)  # type: ignore[arg-type]


def test_explain_knows_the_operators() -> None:
    with pytest.raises(ValueError, match="unknown operator 'caraffe'; choose one of: carafe, "):
        explain("caraffe", X, KERNELS)
    with pytest.raises(ValueError, match="carafe takes 2 tensors, got 1"):
        explain("carafe", X)
    with pytest.raises(ValueError, match=r"a tensor has an empty side: shape \(1, 4, 0, 3\)"):
        explain("carafe", X[:, :, :0], KERNELS)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_an_empty_map_cannot_be_read(backend: str) -> None:
    with pytest.raises(ValueError, match=r"x has an empty side: shape \(1, 4, 0, 3\)"):
        resample(X[:, :, :0], OFFSETS, backend=backend)
    with pytest.raises(ValueError, match="key has an empty side"):
        window_similarity(X, X[..., :0], 3)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_oracles_take_empty_batches(dims: int) -> None:
    coarse, fine = [3] * dims, [6] * dims
    x = torch.zeros(0, 4, *coarse)
    assert ops.carafe_naive(x, torch.zeros(0, 3**dims, *fine), 3).shape == (0, 4, *fine)
    assert ops.resample_naive(x, torch.zeros(0, dims, *fine)).shape == (0, 4, *fine)
    assert ops.local_similarity_naive(x).shape == (0, 3**dims - 1, *coarse)
    assert ops.normalize_kernels_naive(torch.zeros(0, 3**dims, *fine), 3).shape == (0, 3**dims, *fine)
