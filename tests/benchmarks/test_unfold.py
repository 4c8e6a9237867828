"""The peer computes what we compute, in float64, gradients included."""

import copy

import pytest
import torch

from freqfusion import FreqFusion, create_model
from freqfusion.benchmarks import unfold
from freqfusion.benchmarks.unfold import UnfoldFreqFusion, UnfoldOffsetGenerator, unfold_
from freqfusion.ops import carafe, use_backend
from support import assert_close

SIZES = [((4, 5), (8, 10)), ((5, 4), (9, 7)), ((1, 1), (1, 1)), ((1, 1), (2, 2)), ((3, 6), (3, 6))]


def gradients(outputs, leaves):
    torch.manual_seed(1)
    cotangents = [torch.randn_like(x) for x in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)


def assert_equal(name, actual, expected):
    """To rounding; some results are zero but for that."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(("coarse", "fine"), SIZES)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize(("kernel_size", "groups"), [(5, 1), (3, 2)])
def test_carafe(coarse, fine, padding_mode, kernel_size, groups):
    x = torch.randn(2, 6, *coarse, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(2, groups * kernel_size**2, *fine, dtype=torch.float64, requires_grad=True)
    ours = carafe(x, kernels, kernel_size, groups, padding_mode)
    peer = unfold.carafe(x, kernels, kernel_size, groups, padding_mode)
    assert_close("output", peer, ours, 1e-13)
    for name, one, other in zip(
        ("x", "kernels"), gradients([peer], [x, kernels]), gradients([ours], [x, kernels]), strict=True
    ):
        assert_close(f"gradient of {name}", one, other, 1e-13)


@pytest.mark.parametrize(("coarse", "fine"), SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction_feat": "sim", "hamming_window": False},
        {"padding_mode": "reflect", "hr_residual": False},
        {"use_high_pass": False, "up_group": 2},
        {"semi_conv": False},
        {"comp_feat_upsample": False, "feature_resample": False},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_freqfusion(coarse, fine, options):
    # the official initialisation moves samples far; all weights matter
    ours = FreqFusion(
        8, 12, compressed_channels=16, init="official", **{"feature_resample_group": 2, **options}
    )
    ours = ours.double()
    peer = unfold_(copy.deepcopy(ours))
    assert isinstance(peer, UnfoldFreqFusion)
    hr_feat = torch.randn(2, 8, *fine, dtype=torch.float64, requires_grad=True)
    lr_feat = torch.randn(2, 12, *coarse, dtype=torch.float64, requires_grad=True)
    with use_backend("torch"):
        results = [module(hr_feat, lr_feat) for module in (peer, ours)]
    for name, one, other in zip(results[0]._fields, *results, strict=True):
        assert_equal(name, one, other)
    found = [
        gradients(result[1:], [hr_feat, lr_feat, *module.parameters()])
        for result, module in zip(results, (peer, ours), strict=True)
    ]
    names = ["hr_feat", "lr_feat", *(name for name, _ in ours.named_parameters())]
    for name, one, other in zip(names, *found, strict=True):
        if other is None:
            assert one is None, name
        else:
            assert_equal(f"gradient of {name}", one, other)


def test_every_fusion_of_a_network_turns_into_the_peer():
    model = create_model("fpn_small", 3).double().eval()
    peer = unfold_(copy.deepcopy(model))
    kinds = [type(part) for part in peer.modules()]
    assert FreqFusion not in kinds
    assert kinds.count(UnfoldFreqFusion) == kinds.count(UnfoldOffsetGenerator) == 3
    assert not any(isinstance(part, UnfoldFreqFusion) for part in model.modules())
    image = torch.randn(1, 3, 37, 50, dtype=torch.float64)
    with torch.no_grad(), use_backend("torch"):
        assert_close("logits", peer(image), model(image), 1e-11)
