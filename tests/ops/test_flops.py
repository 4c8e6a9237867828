"""FLOPs of the registered operators, as torch's counter adds them up."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import freqfusion.ops._flops  # noqa: F401  registers the formulas
from freqfusion.ops import available_backends, carafe, use_backend, window_similarity
from freqfusion.ops.convolution.op import convolution


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("shape", "fine", "kernel_size", "groups"),
    [
        ((2, 6, 4, 5), (8, 10), 5, 1),
        ((1, 6, 14, 17), (27, 33), 3, 2),
        ((3, 4, 1, 1), (1, 1), 3, 1),
        ((0, 4, 2, 2), (4, 4), 3, 1),
    ],
)
def test_reassembly_and_both_derivatives(device, shape, fine, kernel_size, groups):
    batch, channels = shape[:2]
    x = torch.ones(shape, device=device, requires_grad=True)
    kernels = torch.ones(batch, groups * kernel_size**2, *fine, device=device, requires_grad=True)
    # every output value is a sum of kernel_size**2 products
    expected = 2 * batch * channels * fine[0] * fine[1] * kernel_size**2
    for first, second, wanted in ((x, kernels.detach(), 1), (x.detach(), kernels, 1), (x, kernels, 2)):
        with FlopCounterMode(display=False) as counter:
            out = carafe(first, second, kernel_size, groups)
            assert counter.get_total_flops() == expected
            out.backward(torch.ones_like(out))
            assert counter.get_total_flops() == (1 + wanted) * expected


def test_reassembly_agrees_with_the_matrix_product_that_it_is():
    """One kernel for all pixels of one channel: the product of unfolded windows with a vector of weights."""
    x, weights = torch.rand(1, 1, 6, 7), torch.rand(9, 1)
    with FlopCounterMode(display=False) as product:
        expected = F.unfold(x, 3, padding=1).mT @ weights
    with FlopCounterMode(display=False) as reassembly:
        out = carafe(x, weights.reshape(1, 9, 1, 1).expand(1, 9, 6, 7), 3)
    torch.testing.assert_close(out.flatten(), expected.flatten())
    assert reassembly.get_total_flops() == product.get_total_flops() == 2 * 9 * 42


def test_from_logits_counts_as_the_reassembly_and_both_derivatives():
    x, logits = (torch.ones(2, n, 4, 5, device="meta", requires_grad=True) for n in (6, 9))
    with FlopCounterMode(display=False) as counter:
        out, _ = torch.ops.freqfusion.carafe_from_logits(x, logits, None, None, 3, 1, False, 2, False)
        assert counter.get_total_flops() == 2 * 2 * 6 * 20 * 9
        out.backward(torch.ones_like(out))
    assert counter.get_total_flops() == 3 * 2 * 2 * 6 * 20 * 9


def test_window_similarity_counts_its_inner_products():
    query, key = torch.rand(2, 8, 6, 4), torch.rand(2, 8, 3, 2)
    with FlopCounterMode(display=False) as counter:
        window_similarity(query, key, 5)
    assert counter.get_total_flops() == 2 * 2 * 8 * 6 * 4 * 25


def test_importing_the_package_leaves_the_counter_out():
    code = "import sys, freqfusion; print('torch.utils.flop_counter' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.skipif(bool(available_backends()["triton"]), reason="Triton is not there")
def test_our_convolution_counts_as_torchs() -> None:
    x = torch.randn(2, 8, 5, 4).half().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(3, 8, 3, 3).half().requires_grad_(), torch.zeros(3).half().requires_grad_()
    counts = []
    for backend in ("triton", "torch"):
        with use_backend(backend), FlopCounterMode(display=False) as forward:
            out = convolution(x, weight, bias)[0]
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(out, (x, weight), out)
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] == 2 * 8 * 9 * 3 * 2 * 5 * 4
