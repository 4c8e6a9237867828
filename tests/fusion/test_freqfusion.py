"""FreqFusion beyond the released code: sizes, initialisation, precision, compilation, export, wrong input."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from freqfusion import FreqFusion, carafe
from freqfusion.fusion.freqfusion import OffsetGenerator
from support import GOLDEN, assert_close, load_golden, relative_error

SAMPLER_META, SAMPLER_ARRAYS = load_golden("ops_sampler_a")


def shake(module: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """Random weights large enough that every branch matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale, generator=generator)
    return module


def random_maps(
    hr_size: tuple[int, int], lr_size: tuple[int, int], channels: tuple[int, int] = (8, 12), batch: int = 2
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hr = torch.randn(batch, channels[0], *hr_size, generator=generator)
    return hr, torch.randn(batch, channels[1], *lr_size, generator=generator)


@pytest.mark.parametrize("case", SAMPLER_META["cases"], ids=lambda case: case["prefix"].strip("/"))
def test_offset_generator_golden(case: dict) -> None:
    prefix = case["prefix"]
    arrays = {
        key.removeprefix(prefix): value for key, value in SAMPLER_ARRAYS.items() if key.startswith(prefix)
    }
    module = OffsetGenerator(direction_feat=case["direction_feat"], **case["kwargs"]).double()
    state = {
        key.split("/", 1)[1]: value for key, value in arrays.items() if key.startswith(("param/", "buffer/"))
    }
    assert "init_pos" in state
    module.load_state_dict(state, strict=True)
    inputs = [arrays[f"in/{name}"].clone().requires_grad_() for name in ("hr_x", "lr_x", "feat2sample")]
    offsets = module.offsets(*inputs[:2])
    coarse = torch.nn.functional.pixel_unshuffle(offsets, 2) + state["init_pos"]
    assert_close("offset", coarse, arrays["mid/offset"], 1e-9)
    out = module(*inputs)
    assert_close("out", out, arrays["out"], 1e-9)
    out.backward(arrays["cot"])
    for name, tensor in zip(("hr_x", "lr_x", "feat2sample"), inputs, strict=True):
        assert tensor.grad is not None
        assert_close(f"grad {name}", tensor.grad, arrays[f"grad/{name}"], 1e-9)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert_close(f"grad {name}", parameter.grad, arrays[f"grad/param/{name}"], 1e-9)


@pytest.mark.parametrize(
    ("hr_size", "lr_size"),
    [
        ((27, 33), (14, 17)),
        ((27, 33), (13, 16)),
        ((16, 12), (4, 3)),
        ((6, 7), (6, 7)),
        ((3, 5), (1, 1)),
        ((1, 1), (1, 1)),
        ((9, 20), (5, 3)),
    ],
)
@pytest.mark.parametrize("semi_conv", [True, False])
def test_any_size(hr_size: tuple[int, int], lr_size: tuple[int, int], semi_conv: bool) -> None:
    module = shake(FreqFusion(8, 12, compressed_channels=16, semi_conv=semi_conv))
    hr, lr = (tensor.requires_grad_() for tensor in random_maps(hr_size, lr_size))
    kernels, fused_hr, fused_lr = module(hr_feat=hr, lr_feat=lr)
    assert kernels.shape == (2, 25, *hr_size)
    assert fused_hr.shape == (2, 8, *hr_size)
    assert fused_lr.shape == (2, 12, *hr_size)
    (fused_hr.square().sum() + fused_lr.square().sum()).backward()
    for tensor in (fused_hr, fused_lr, hr.grad, lr.grad):
        assert tensor is not None
        assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("options", [{}, {"semi_conv": False}, {"comp_feat_upsample": False}], ids=str)
def test_odd_size_equals_exact_doubling_inside(options: dict) -> None:
    """A fine map with its last row and column cut off fuses as the whole one does, away from the cut.

    Both read the same windows, since floor(I * 28 / 55) = floor(I / 2); the filters reach a few pixels.
    """
    module = shake(FreqFusion(8, 12, compressed_channels=16, feature_resample=False, **options), 0.2).double()
    hr, lr = (tensor.double() for tensor in random_maps((56, 68), (28, 34)))
    exact = module(hr, lr)
    odd = module(hr[:, :, :55, :67], lr)
    assert all(row * 28 // 55 == row // 2 for row in range(55))
    rows, columns = 55 - 10, 67 - 10
    for name, whole, part in (("hr", exact.hr_feat, odd.hr_feat), ("lr", exact.lr_feat, odd.lr_feat)):
        assert_close(name, part[..., :rows, :columns], whole[..., :rows, :columns], 1e-12)


def test_ratio_one_keeps_positions() -> None:
    module = shake(FreqFusion(8, 12, compressed_channels=16, feature_resample=False)).double()
    hr, lr = (tensor.double() for tensor in random_maps((6, 7), (6, 7)))
    kernels, _, fused = module(hr, lr)
    centre_only = torch.zeros_like(kernels)
    centre_only[:, 12] = 1
    assert torch.equal(carafe(lr, centre_only, 5), lr)
    assert_close("lr", fused, carafe(lr, kernels, 5), 1e-12)


@settings(max_examples=25, deadline=None)
@given(
    hr_channels=st.sampled_from([4, 8, 12]),
    lr_channels=st.sampled_from([4, 8, 16]),
    group=st.sampled_from([1, 2, 4]),
    up_group=st.sampled_from([1, 2]),
    kernels=st.sampled_from([(3, 3), (5, 3), (7, 5)]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ratio=st.floats(0.2, 1.0),
    direction=st.sampled_from(["sim", "sim_concat"]),
    init=st.sampled_from(["paper", "official"]),
)
def test_random_configurations(
    hr_channels: int,
    lr_channels: int,
    group: int,
    up_group: int,
    kernels: tuple[int, int],
    size: tuple[int, int],
    ratio: float,
    direction: str,
    init: str,
) -> None:
    module = FreqFusion(
        hr_channels,
        lr_channels,
        compressed_channels=8,
        feature_resample_group=group,
        up_group=up_group,
        lowpass_kernel=kernels[0],
        highpass_kernel=kernels[1],
        direction_feat=direction,  # type: ignore[arg-type]
        init=init,  # type: ignore[arg-type]
    )
    lr_size = (max(1, math.floor(size[0] * ratio)), max(1, math.floor(size[1] * ratio)))
    hr, lr = random_maps(size, lr_size, (hr_channels, lr_channels))
    lowpass, fused_hr, fused_lr = module(hr, lr)
    assert fused_hr.shape == hr.shape
    assert fused_lr.shape == (2, lr_channels, *size)
    sums = lowpass.unflatten(1, (up_group, -1)).sum(2)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    (fused_hr.sum() + fused_lr.sum()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_initial_offsets() -> None:
    """Ours start near zero; the released constructor's Xavier pass makes them large."""
    hr, lr = random_maps((16, 16), (8, 8), (64, 64))

    def largest_offset(init: str) -> float:
        torch.manual_seed(0)
        module = FreqFusion(64, 64, init=init)  # type: ignore[arg-type]
        assert module.dysampler is not None
        hr_compressed, lr_compressed = module.hr_channel_compressor(hr), module.lr_channel_compressor(lr)
        return float(module.dysampler.offsets(hr_compressed, lr_compressed).detach().abs().max())

    assert largest_offset("paper") < 0.2
    assert largest_offset("official") > 1


def test_official_initialisation_follows_the_released_distribution() -> None:
    rule = json.loads((GOLDEN / "init_rule.json").read_text())
    torch.manual_seed(0)
    module = FreqFusion(256, 256, init="official")
    parameters = dict(module.named_parameters())
    assert parameters.keys() == rule["params"].keys()
    for name, expected in rule["params"].items():
        value = parameters[name].detach()
        if expected["rule"] == "constant":
            assert torch.equal(value, torch.full_like(value, expected["value"])), name
            continue
        assert abs(float(value.std()) / expected["measured_std"] - 1) < 0.1, name
        if expected["bound"] is not None:
            assert float(value.abs().max()) <= expected["bound"] + 1e-6, name


def test_parameter_count_of_an_fpn_site() -> None:
    module = FreqFusion(256, 256, feature_resample_norm=False)
    assert sum(parameter.numel() for parameter in module.parameters()) == 104_434


@pytest.mark.parametrize("options", [{}, {"direction_feat": "sim"}, {"use_high_pass": False}], ids=str)
def test_gradcheck(options: dict) -> None:
    module = shake(FreqFusion(4, 4, compressed_channels=8, feature_resample_group=2, **options)).double()
    hr, lr = (tensor.double().requires_grad_() for tensor in random_maps((4, 5), (2, 3), (4, 4), 1))
    assert torch.autograd.gradcheck(lambda hr, lr: module(hr, lr)[1:], (hr, lr), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr_size", [(16, 20), (15, 19)])
def test_autocast(dtype: torch.dtype, lr_size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = FreqFusion(32, 32)
    hr, lr = (tensor.requires_grad_() for tensor in random_maps((32, 40), lr_size, (32, 32)))
    expected = module(hr, lr)
    with torch.autocast("cpu", dtype):
        actual = module(hr, lr)
    for name, half, full in zip(("kernel", "hr", "lr"), actual, expected, strict=True):
        assert relative_error(half.float(), full.detach()) < 2e-2, name
    (actual.hr_feat.sum() + actual.lr_feat.sum()).backward()
    assert hr.grad is not None
    assert bool(torch.isfinite(hr.grad).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whole_module_in_one_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = FreqFusion(16, 16)
    hr, lr = random_maps((12, 14), (6, 7), (16, 16))
    expected = module(hr, lr)
    actual = module.to(dtype)(hr.to(dtype), lr.to(dtype))
    for half, full in zip(actual, expected, strict=True):
        assert half.dtype == dtype
        assert relative_error(half, full.detach()) < 3e-2


def test_layouts_and_empty_batch() -> None:
    module = shake(FreqFusion(8, 12, compressed_channels=16))
    hr, lr = random_maps((27, 33), (14, 17))
    expected = module(hr, lr)
    last = module(*(tensor.contiguous(memory_format=torch.channels_last) for tensor in (hr, lr)))
    strided = module(hr.transpose(2, 3).contiguous().transpose(2, 3), lr.repeat(1, 2, 1, 1)[:, :12])
    for other in (last, strided):
        for actual, reference in zip(other, expected, strict=True):
            assert relative_error(actual, reference.detach()) < 1e-4
    empty = module(hr[:0], lr[:0])
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 25, 27, 33), (0, 8, 27, 33), (0, 12, 27, 33)]


def test_checkpointing_gives_the_same_gradients() -> None:
    plain = shake(FreqFusion(8, 12, compressed_channels=16))
    saving = FreqFusion(8, 12, compressed_channels=16, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    hr, lr = random_maps((8, 10), (4, 5))
    kept: dict[str, int] = {}
    for name, module in (("plain", plain), ("saving", saving)):
        kept[name] = 0

        def pack(tensor: Tensor, name: str = name) -> Tensor:
            kept[name] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(hr, lr)
        (out.hr_feat.square().sum() + out.lr_feat.square().sum()).backward()
    assert kept["saving"] < kept["plain"] / 3
    for (name, left), right in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert left.grad is not None
        assert right.grad is not None
        assert torch.allclose(left.grad, right.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("odd", [0, 1])
def test_compiles_once_for_all_sizes(odd: int) -> None:
    torch._dynamo.reset()
    module = FreqFusion(8, 12, compressed_channels=16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    compilations = set()
    for size in ((9, 10), (6, 13), (14, 10)):  # none equals a channel count: such sizes would share a symbol
        hr, lr = random_maps((2 * size[0] - odd, 2 * size[1] - odd), size)
        hr.requires_grad_()
        out = compiled(hr, lr)
        for actual, expected in zip(out, module(hr, lr), strict=True):
            assert relative_error(actual, expected) < 1e-4
        (out.hr_feat.sum() + out.lr_feat.sum()).backward()
        assert hr.grad is not None
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


@pytest.mark.parametrize(("hr_size", "lr_size"), [((16, 20), (8, 10)), ((15, 19), (8, 10))])
def test_exports(hr_size: tuple[int, int], lr_size: tuple[int, int]) -> None:
    module = FreqFusion(8, 12, compressed_channels=16).eval()
    hr, lr = random_maps(hr_size, lr_size)
    exported = torch.export.export(module, (hr, lr))
    assert not [node for node in exported.graph.nodes if "freqfusion" in str(node.target)]
    for actual, expected in zip(exported.module()(hr, lr), module(hr, lr), strict=True):
        assert relative_error(actual.detach(), expected.detach()) < 1e-5


def test_official_readme_usage() -> None:
    """The concatenating example of the official README, with its names and calls."""
    c = 8
    x1, x2, x3, x4 = (torch.randn(2, c, 64 // 2**i, 64 // 2**i) for i in range(4))
    ff1 = FreqFusion(hr_channels=c, lr_channels=c)
    ff2 = FreqFusion(hr_channels=c, lr_channels=2 * c)
    ff3 = FreqFusion(hr_channels=c, lr_channels=3 * c)
    _, x3, x4_up = ff1(hr_feat=x3, lr_feat=x4)
    _, x2, x34_up = ff2(hr_feat=x2, lr_feat=torch.cat([x3, x4_up], dim=1))
    _, x1, x234_up = ff3(hr_feat=x1, lr_feat=torch.cat([x2, x34_up], dim=1))
    assert torch.cat([x1, x234_up], dim=1).shape == (2, 4 * c, 64, 64)


HR, LR = torch.zeros(1, 8, 6, 6), torch.zeros(1, 12, 3, 3)


@pytest.mark.parametrize(
    ("hr", "lr", "error", "message"),
    [
        (HR[0], LR, ValueError, r"hr_feat must have 4 dimensions \(B, C, H, W\), got 3"),
        (
            HR,
            LR[:, :8],
            ValueError,
            "lr_feat has 8 channels, this FreqFusion was built for 12.*lr_channels=8",
        ),
        (HR.int(), LR, TypeError, r"hr_feat must be floating point, got torch.int32.*\.float\(\)"),
        (HR, LR.to("meta"), ValueError, "hr_feat is on cpu and lr_feat on meta"),
        (HR, LR.expand(2, -1, -1, -1), ValueError, "batch sizes differ: hr_feat has 1, lr_feat has 2"),
        (HR[..., :2, :2], LR, ValueError, "lr_feat of size .* is larger than hr_feat.*swapped"),
        (HR, LR[..., :0], ValueError, "empty side"),
    ],
)
def test_wrong_input(hr: Tensor, lr: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FreqFusion(8, 12, compressed_channels=16)(hr_feat=hr, lr_feat=lr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowpass_kernel": 4}, "lowpass_kernel must be odd"),
        ({"encoder_kernel": 2}, "encoder_kernel must be odd"),
        ({"feature_resample_group": 5}, "groups must divide the channels of lr_feat .*5 groups for 12"),
        ({"up_group": 3}, "groups must divide the channels of hr_feat"),
        ({"compressed_channels": 52}, "multiple of 8 or switch the normalisation off"),
        ({"scale_factor": 2}, "scale_factor must be one of"),
        ({"use_low_pass": False}, "use_low_pass must be one of"),
        ({"padding_mode": "wrap"}, "padding_mode must be one of"),
        ({"direction_feat": "cos"}, "direction_feat must be"),
        ({"init": "zero"}, "init must be one of"),
        ({"upsample_mode": "bicubic"}, "upsample_mode must be one of"),
        ({"hr_channels": 0}, "hr_channels must be at least 1, got 0"),
    ],
    ids=str,
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreqFusion(**{"hr_channels": 8, "lr_channels": 12, "compressed_channels": 16, **options})


def test_state_dict_of_other_settings_does_not_load() -> None:
    with_window, without = FreqFusion(8, 12), FreqFusion(8, 12, hamming_window=False)
    with pytest.raises(RuntimeError, match="hamming_lowpass"):
        without.load_state_dict(with_window.state_dict())
