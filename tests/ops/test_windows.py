"""Windows and dilations beyond the map: the value of the definition, at no cost."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops import (
    carafe,
    carafe_naive,
    local_similarity,
    local_similarity_naive,
    window_similarity,
    window_similarity_naive,
)

CHANNELS_LAST = torch.channels_last


def by_definition(x: Tensor, window: int, dilation: int) -> Tensor:
    """One pixel and one neighbour at a time."""
    height, width = x.shape[-2:]
    steps = [d * dilation for d in range(-(window // 2), window // 2 + 1)]
    channels = []
    for dy in steps:
        for dx in steps:
            if dy == dx == 0:
                continue
            out = x.new_zeros(x.shape[0], height, width)
            for i in range(max(0, -dy), min(height, height - dy)):
                for j in range(max(0, -dx), min(width, width - dx)):
                    out[:, i, j] = F.cosine_similarity(x[:, :, i, j], x[:, :, i + dy, j + dx], dim=1)
            channels.append(out)
    return torch.stack(channels, dim=1)


@pytest.mark.parametrize(
    ("window", "dilation"),
    [
        (3, 3),
        (3, 4),
        (3, 5),
        (3, 6),
        (3, 7),
        (5, 2),
        (5, 3),
        (7, 2),
        (9, 1),
        (21, 1),
        (21, 3),
        (3, 2**31),
        (5, 2**62),
    ],
)
@pytest.mark.parametrize("size", [(4, 6), (1, 1), (6, 1)])
def test_local_similarity(each_backend: str, size: tuple[int, int], window: int, dilation: int) -> None:
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    expected = by_definition(x, window, dilation)
    cotangent = torch.randn_like(expected)
    functions = [lambda x: local_similarity(x, window, dilation, backend=each_backend)]
    if dilation < 100:
        functions.append(lambda x: local_similarity_naive(x, window, dilation))
    for function in functions:
        for layout in (torch.contiguous_format, CHANNELS_LAST):
            placed = x.detach().contiguous(memory_format=layout).requires_grad_()
            out = function(placed)
            assert torch.allclose(out, expected)
            (grad,) = torch.autograd.grad(out, placed, cotangent)
            if expected.requires_grad:
                (wanted,) = torch.autograd.grad(expected, x, cotangent, retain_graph=True)
                assert torch.allclose(grad, wanted)
            else:  # no neighbour at all
                assert not bool(grad.any())


def test_second_derivative_of_a_window_beyond_the_map(each_backend: str) -> None:
    x = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return local_similarity(x, 7, 2, backend=each_backend)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("kernel", [3, 5, 9, 11, 13, 25])
@pytest.mark.parametrize("size", [(2, 3), (1, 1), (5, 4)])
def test_window_similarity(each_backend: str, size: tuple[int, int], kernel: int) -> None:
    height, width = 2 * size[0], 2 * size[1]
    query = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    radius = kernel // 2
    padded = F.pad(key, [radius] * 4)
    expected = torch.stack(
        [
            (query * F.interpolate(padded[..., dy : dy + size[0], dx : dx + size[1]], (height, width))).sum(1)
            for dy in range(kernel)
            for dx in range(kernel)
        ],
        dim=1,
    )
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (query, key), cotangent)
    for function in (window_similarity, window_similarity_naive):
        out = function(query, key, kernel)
        assert torch.allclose(out, expected)
        for grad, want in zip(torch.autograd.grad(out, (query, key), cotangent), wanted, strict=True):
            assert torch.allclose(grad, want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("kernel", [5, 7, 11, 25])
@pytest.mark.parametrize("size", [(2, 3), (1, 1), (3, 3)])
def test_carafe(
    each_backend: str, size: tuple[int, int], kernel: int, padding: str, layout: torch.memory_format
) -> None:
    x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    kernels = torch.randn(2, 2 * kernel**2, 2 * size[0], 5, dtype=torch.float64, requires_grad=True)
    out = carafe(x, kernels, kernel, 2, padding, each_backend)
    expected = carafe_naive(x, kernels, kernel, 2, padding)
    assert torch.allclose(out, expected)
    cotangent = torch.randn_like(expected)
    for grad, want in zip(
        torch.autograd.grad(out, (x, kernels), cotangent),
        torch.autograd.grad(expected, (x, kernels), cotangent),
        strict=True,
    ):
        assert torch.allclose(grad, want)


SCRIPT = """
import resource
import torch
from freqfusion.ops import carafe, local_similarity, local_similarity_naive, use_backend, window_similarity
x = torch.randn(1, 64, 16, 16, requires_grad=True)
query = torch.randn(1, 64, 32, 32)
with use_backend({backend!r}):
    local_similarity(x).sum().backward()  # what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for dilation in (17, 10_000, 2**31, 2**62, 2**70):
        local_similarity(x, 3, dilation).sum().backward()
        local_similarity(x, 5, dilation).sum().backward()
        local_similarity_naive(x, 3, dilation).sum().backward()
    local_similarity(x, 101, 2**31).sum().backward()
    window_similarity(query, x, 101).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_what_lies_beyond_the_map_costs_nothing(each_backend: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(backend=each_backend)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 600, "MB"  # the last result and its gradient are 40 MB each


@pytest.mark.parametrize("side", [2**15 + 1, 2**31 + 1, 2**62 + 1])
def test_absurd_windows_are_refused(side: int) -> None:
    x = torch.zeros(1, 4, 3, 3)
    for call in (
        lambda: local_similarity(x, side),
        lambda: window_similarity(x, x, side),
        lambda: carafe(x, torch.zeros(1, 9, 3, 3), side),
    ):
        with pytest.raises(ValueError, match=f"must be at most 32767, got {side}"):
            call()
