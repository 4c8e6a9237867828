"""Spectra against waves of known frequency, direct sums and the outputs of the module itself."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from freqfusion import FreqFusion, carafe, create_fusion, resample
from freqfusion.analysis.spectra import (
    fusion_internals,
    high_frequency_share,
    kernel_spectrum,
    radial_power_spectrum,
)
from support import assert_close

INVALID = [
    (torch.ones(1, 2, 4, 4).long(), TypeError, "floating point"),
    (torch.ones(2, 4, 4), ValueError, "4 dimensions"),
    (torch.ones(0, 2, 4, 4), ValueError, "empty"),
    (torch.full((1, 2, 4, 4), math.nan), ValueError, "NaN"),
]


def wave(frequency: float, side: int = 32) -> Tensor:
    return torch.cos(2 * torch.pi * frequency * torch.arange(side)).expand(1, 1, side, side)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 9, 14), (3, 1, 1, 7), (1, 4, 2, 3)])
def test_rings_hold_the_energy(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    spectrum = radial_power_spectrum(x, window=False)
    assert int(spectrum.modes.sum()) == shape[2] * shape[3]
    energy = (x - x.mean((2, 3), keepdim=True)).square().sum((2, 3)).mean()
    assert float((spectrum.power * spectrum.modes).sum()) == pytest.approx(float(energy), rel=1e-5)
    assert spectrum.power[0] == pytest.approx(0, abs=1e-9)
    assert (spectrum.frequency.diff() > 0).all()
    assert spectrum.frequency[-1] <= math.sqrt(0.5)


def test_rings_against_a_direct_sum() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 1, 6, 9, dtype=torch.float64)
    power = np.abs(np.fft.fft2((x - x.mean())[0, 0].numpy())) ** 2 / 54
    rings: dict[int, list[float]] = {}
    for v, u in np.ndindex(6, 9):
        radius = math.hypot(min(v, 6 - v) / 6, min(u, 9 - u) / 9)
        rings.setdefault(round(radius * 9), []).append(power[v, u])
    actual = radial_power_spectrum(x, window=False).power
    assert actual.tolist() == pytest.approx([np.mean(rings[r]) for r in sorted(rings)])


def test_noise_is_flat_and_a_wave_is_a_peak() -> None:
    torch.manual_seed(0)
    noise = radial_power_spectrum(torch.randn(8, 16, 32, 32))
    assert noise.power[2:].tolist() == pytest.approx([1.0] * (len(noise.power) - 2), abs=0.1)
    for frequency in (0.125, 0.3, 0.5):
        spectrum = radial_power_spectrum(wave(frequency))
        assert float(spectrum.frequency[spectrum.power.argmax()]) == pytest.approx(frequency, abs=1 / 32)


def test_window_hides_the_jump_at_the_border() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64)
    fine = [radial_power_spectrum(ramp, window).power[16:].sum() for window in (False, True)]
    assert fine[1] < 1e-3 * fine[0]


def test_one_pixel_and_constant_maps_have_no_power() -> None:
    for x in (torch.ones(1, 2, 1, 1), torch.ones(1, 2, 5, 5)):
        assert not radial_power_spectrum(x).power.any()
        assert high_frequency_share(x)["all"].share is None


@pytest.mark.parametrize("frequency", [0.0625, 0.25, 0.5])
def test_share_of_a_wave_is_what_the_filter_leaves(frequency: float) -> None:
    passed = math.cos(math.pi * frequency) ** 4
    expected = (1 - passed) ** 2 / ((1 - passed) ** 2 + passed**2)
    share = high_frequency_share(wave(frequency, 256))["all"].share
    assert share == pytest.approx(expected, abs=0.02)


def test_detail_at_boundaries_is_found_there() -> None:
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    labels[:, :, 32:] = 1
    step = labels[:, None, ::2, ::2].float()
    energy = high_frequency_share(step, labels, boundary_width=2)
    assert energy["interior"].share < 1e-9 < energy["boundary"].share
    assert energy["all"].high == pytest.approx(energy["interior"].high + energy["boundary"].high)
    assert energy["all"].low == pytest.approx(energy["interior"].low + energy["boundary"].low)
    ignored = high_frequency_share(step, torch.full_like(labels, 255))
    assert [x.share for x in ignored.values()] == [None, None, None]


@pytest.mark.parametrize(("x", "error", "message"), INVALID)
def test_bad_input(x: Tensor, error: type[Exception], message: str) -> None:
    for measure in (radial_power_spectrum, high_frequency_share, lambda kernels: kernel_spectrum(kernels, 1)):
        with pytest.raises(error, match=message):
            measure(x)


@pytest.mark.parametrize("highpass", [False, True])
def test_kernel_response_against_a_direct_sum(highpass: bool) -> None:
    torch.manual_seed(0)
    kernels = torch.rand(2, 2 * 9, 2, 3, dtype=torch.float64)
    spectrum = kernel_spectrum(kernels, 3, highpass=highpass, size=5)
    expected = np.zeros((5, 5))
    for kernel in kernels.view(2, 2, 9, 6).transpose(2, 3).reshape(-1, 3, 3).numpy():
        taps = -kernel if highpass else kernel.copy()
        taps[1, 1] += highpass
        for i, j in np.ndindex(5, 5):
            v, u = spectrum.frequency[i].item(), spectrum.frequency[j].item()
            total = sum(
                taps[a, b] * np.exp(-2j * np.pi * (v * (a - 1) + u * (b - 1))) for a, b in np.ndindex(3, 3)
            )
            expected[i, j] += abs(total) / 24
    assert np.allclose(spectrum.magnitude.numpy(), expected, atol=1e-6)


def test_kernel_response_of_identity() -> None:
    kernels = torch.zeros(1, 25, 3, 3)
    kernels[:, 12] = 1
    assert kernel_spectrum(kernels, 5).magnitude.tolist() == [[1.0] * 33] * 33
    assert not kernel_spectrum(kernels, 5, highpass=True).magnitude.any()
    with pytest.raises(ValueError, match="channels, got 24"):
        kernel_spectrum(kernels[:, 1:], 5)
    with pytest.raises(ValueError, match="must be odd"):
        kernel_spectrum(kernels, 5, size=4)


OPTIONS = [
    {},
    {"comp_feat_upsample": False},
    {"semi_conv": False, "hamming_window": False},
    {"up_group": 2, "padding_mode": "reflect"},
    {"feature_resample": False},
    {"use_high_pass": False},
    {"use_high_pass": False, "comp_feat_upsample": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(8, 12), (9, 11)])
def test_internals_rebuild_the_output(options: dict, size: tuple[int, int]) -> None:
    """Kernels, offsets and detail are those that the module used: applied by hand they give its output."""
    torch.manual_seed(0)
    fusion = FreqFusion(8, 16, compressed_channels=16, **options).double()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(std=0.3)
    hr, lr = torch.randn(2, 8, *size).double(), torch.randn(2, 16, 5, 6).double()
    internals = fusion_internals(fusion, hr, lr)
    groups, padding = fusion.up_group, fusion.padding_mode
    for actual, expected in zip(internals.fused, fusion(hr_feat=hr, lr_feat=lr), strict=True):
        assert actual.equal(expected)
    if options.get("use_high_pass", True):
        detail = hr - carafe(hr, internals.highpass_kernels, 3, groups, padding)
        assert_close("hr", hr + detail, internals.fused.hr_feat, 1e-9)
        assert_close("detail", internals.detail.double(), detail.square().mean(1, keepdim=True).sqrt(), 1e-6)
    else:
        assert internals.highpass_kernels is internals.detail is None
    source = lr if fusion.semi_conv else fusion._interpolate(lr, size)
    assert not any(x.requires_grad for x in (internals.lowpass_kernels, internals.fused.lr_feat))
    smooth = carafe(source, internals.lowpass_kernels, 5, groups, padding)
    if options.get("feature_resample", True):
        assert internals.offsets.shape == (2, 8, *size)
        smooth = resample(smooth, internals.offsets, 4, unit_size=(5, 6))
    else:
        assert internals.offsets is None
    assert_close("lr", smooth, internals.fused.lr_feat, 1e-9)


def test_internals_refuse_other_methods() -> None:
    with pytest.raises(TypeError, match="got CARAFE"):
        fusion_internals(create_fusion("carafe", 8, 8), torch.rand(1, 8, 8, 8), torch.rand(1, 8, 4, 4))
    with pytest.raises(ValueError, match="swapped"):
        fusion_internals(FreqFusion(8, 8), torch.rand(1, 8, 4, 4), torch.rand(1, 8, 8, 8))
