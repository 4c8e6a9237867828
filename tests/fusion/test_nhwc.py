"""Channels innermost inside the fusion: the same values and gradients, on a CPU by asking for the layout there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from freqfusion import FreqFusion
from freqfusion.fusion import _nhwc
from freqfusion.ops import available_backends, use_backend
from support import assert_close


@pytest.fixture
def nhwc(monkeypatch):
    monkeypatch.setattr(_nhwc, "wanted", lambda x: True)


def values_and_gradients(fusion, hr, lr):
    hr, lr = (x.detach().clone().requires_grad_() for x in (hr, lr))
    _, fine, coarse = fusion(hr, lr)
    torch.manual_seed(3)
    cotangents = [torch.randn(x.shape, dtype=x.dtype) for x in (fine, coarse)]
    leaves = [hr, lr, *fusion.parameters()]
    return [fine, coarse, *torch.autograd.grad((fine, coarse), leaves, cotangents)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction_feat": "sim"},
        {"semi_conv": False},
        {"comp_feat_upsample": False},
    ],
    ids=str,
)
def test_agrees_with_the_inputs_layout(monkeypatch, options, layout):
    torch.manual_seed(0)
    fusion = FreqFusion(6, 4, compressed_channels=16, feature_resample_group=2, **options).double()
    torch.nn.init.normal_(fusion.dysampler.offset.weight, std=0.1)
    hr = torch.randn(2, 6, 9, 13, dtype=torch.float64).contiguous(memory_format=layout)
    lr = torch.randn(2, 4, 5, 7, dtype=torch.float64).contiguous(memory_format=layout)
    expected = values_and_gradients(fusion, hr, lr)
    monkeypatch.setattr(_nhwc, "wanted", lambda x: True)
    found = values_and_gradients(fusion, hr, lr)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"result {index}", one, other, 1e-10)
    for x in found[:2]:
        assert x.is_contiguous(memory_format=layout)
    if layout == torch.contiguous_format:
        assert found[2].is_contiguous()
        assert found[3].is_contiguous()


@pytest.mark.skipif(bool(available_backends()["triton"]), reason="Triton is not there")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiles_in_one_piece_with_the_kernels(nhwc, layout):
    """As on CUDA in half precision: no operator does while it is traced what torch's compiler cannot follow."""
    torch.manual_seed(0)
    fusion = FreqFusion(8, 8, compressed_channels=16, lowpass_kernel=3, feature_resample_group=1).half()
    hr, lr = (
        torch.randn(1, 8, *size).half().contiguous(memory_format=layout).requires_grad_()
        for size in ((4, 6), (2, 3))
    )
    with use_backend("triton"):
        expected = fusion(hr, lr)
        _, fine, coarse = torch.compile(fusion, backend="aot_eager", fullgraph=True)(hr, lr)
        grads = torch.autograd.grad((fine.float().sum() + coarse.float().sum()), (hr, lr))
    assert_close("fine", fine.float(), expected[1].float(), 2e-3)
    assert_close("coarse", coarse.float(), expected[2].float(), 2e-3)
    assert all(bool(grad.isfinite().all()) for grad in grads)


class Computing(TorchDispatchMode):
    """Counts operators that compute: neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(value.alias_info is not None for value in function._schema.returns)
        allocates = "empty" in function._schema.name or "_unsafe_view" in function._schema.name
        self.count += not (views or allocates)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(bool(available_backends()["triton"]), reason="Triton is not there")
def test_a_forward_pass_is_at_most_twenty_operators(nhwc):
    """On a GPU a small one waits for each of them."""
    fusion = FreqFusion(16, 16).half().to(memory_format=torch.channels_last)
    hr, lr = (
        torch.randn(1, 16, *size).half().contiguous(memory_format=torch.channels_last)
        for size in ((4, 6), (2, 3))
    )
    with use_backend("triton"), Computing() as computing:
        fusion(hr, lr)
    assert 10 < computing.count <= 20


@pytest.mark.skipif(bool(available_backends()["triton"]), reason="Triton is not there")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_sums_of_its_normalisations_come_from_convolutions(nhwc, monkeypatch, layout):
    """Those of both maps; not if another map was put in the place of theirs."""
    from freqfusion.ops.normalized_similarity import triton

    torch.manual_seed(0)
    taken, take = [], triton._summed
    monkeypatch.setattr(triton, "_summed", lambda x: taken.append(x.shape) or take(x))
    fusion = FreqFusion(16, 16, compressed_channels=16, feature_resample_group=2).half()
    torch.nn.init.normal_(fusion.dysampler.hr_offset.weight, std=0.3)
    hr, lr = (torch.randn(1, 16, *size).half().contiguous(memory_format=layout) for size in ((6, 8), (3, 4)))
    with use_backend("triton"):
        found = fusion(hr, lr)[2]
        assert taken == []
        generator = fusion.dysampler
        monkeypatch.setattr(generator, "takes_sums", False)
        assert_close("coarse", found.float(), fusion(hr, lr)[2].float(), 2e-3)
        assert len(taken) == 2
        monkeypatch.setattr(generator, "takes_sums", True)
        generator.register_forward_pre_hook(lambda module, inputs: (-2 * inputs[0], *inputs[1:]))
        found = fusion(hr, lr)[2]
        assert len(taken) == 3
        monkeypatch.setattr(generator, "takes_sums", False)
        assert_close("coarse", found.float(), fusion(hr, lr)[2].float(), 2e-3)


@pytest.mark.skipif(bool(available_backends()["triton"]), reason="Triton is not there")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(6, 10), (5, 9)])
def test_the_map_that_is_moved_has_its_channels_innermost(nhwc, monkeypatch, layout, size):
    """Where the kernels compute at twice the size; results and gradients lie as the inputs all the same."""
    torch.manual_seed(0)
    fusion = FreqFusion(16, 16, compressed_channels=16, feature_resample_group=2).half()
    torch.nn.init.normal_(fusion.dysampler.hr_offset.weight, std=0.1)
    hr = torch.randn(2, 16, *size).half().contiguous(memory_format=layout)
    lr = torch.randn(2, 16, 3, 5).half().contiguous(memory_format=layout)
    moved = []
    fusion.dysampler.register_forward_pre_hook(lambda module, inputs: moved.append(inputs[2]))
    with use_backend("triton"):
        found = values_and_gradients(fusion, hr, lr)
    innermost = layout == torch.channels_last or size == (6, 10)
    assert moved[0].is_contiguous(memory_format=torch.channels_last if innermost else torch.contiguous_format)
    for x in found[:4]:
        assert x.is_contiguous(memory_format=layout)
    monkeypatch.setattr(_nhwc, "wanted", lambda x: False)
    with use_backend("torch"):
        expected = values_and_gradients(fusion.float(), hr.float(), lr.float())
    for name, one, other in zip(("fine", "coarse", "in hr", "in lr"), found, expected, strict=False):
        assert float((one.float() - other).norm() / other.norm()) < 5e-3, name


def test_narrow_maps_have_their_channels_innermost(nhwc):
    fusion = FreqFusion(6, 4, compressed_channels=16, feature_resample_group=2)
    seen = {}
    for name in ("content_encoder", "content_encoder2", "dysampler.norm_hr"):
        fusion.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0]})
        )
    fusion(torch.randn(2, 6, 9, 13), torch.randn(2, 4, 5, 7))
    assert set(seen) == {"content_encoder", "content_encoder2", "dysampler.norm_hr"}
    for name, x in seen.items():
        assert x.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compression_has_two_derivatives(layout):
    convolution = torch.nn.Conv2d(3, 4, 1).double()
    x = torch.randn(2, 3, 2, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    found = _nhwc.compress(convolution, x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close("value", found, convolution(x), 1e-12)
    assert torch.autograd.gradgradcheck(lambda x: _nhwc.compress(convolution, x), (x,))


def test_not_on_a_cpu():
    assert not _nhwc.wanted(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16))
