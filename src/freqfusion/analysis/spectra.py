"""The frequency view: what a fusion does to the spectrum of the features, and with which kernels and offsets."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.analysis.similarity import check_inputs, resize_labels
from freqfusion.fusion import FreqFusion, FusedFeatures, Fusion
from freqfusion.metrics.boundary_distance import distance_to_boundary
from freqfusion.ops._checks import check_kernel_size, check_map, check_taps

_CHUNK = 2**24
"""Numbers in the largest temporary array."""


class RadialSpectrum(NamedTuple):
    """Power by distance from frequency zero."""

    frequency: Tensor
    """``(R,)`` float64, mean of each ring, cycles per pixel of the map; the largest possible is ``sqrt(0.5)``."""
    power: Tensor
    """``(R,)`` float64, mean over the ring, the channels and the images."""
    modes: Tensor
    """``(R,)`` int64, frequencies in each ring."""


def radial_power_spectrum(features: Tensor, window: bool = True) -> RadialSpectrum:
    """Power spectrum of feature maps, averaged over images, channels and directions.

    The mean of each map is taken away. Then, with ``window``, each map is multiplied by a Hann window of mean square
    one: the discrete Fourier transform takes the map as periodic, and without a window the jumps from one border to
    the other would look like fine detail. ``sum(power * modes)`` is the sum of squares of what is transformed, over
    an image and channel (Parseval). Rings are ``1 / max(H, W)`` wide.

    Args:
        features: ``(B, C, H, W)``, floating point, finite; not empty.
        window: multiply by the Hann window.

    Raises:
        TypeError: for integer tensors.
        ValueError: for another rank, empty maps or values that are not finite.

    Example:
        >>> wave = torch.cos(2 * torch.pi * 8 / 32 * torch.arange(32.0)).expand(1, 1, 32, 32)
        >>> spectrum = radial_power_spectrum(wave, window=False)
        >>> round(float(spectrum.frequency[spectrum.power.argmax()]), 2)
        0.25
    """
    x = _checked(features)
    height, width = x.shape[-2:]
    x = x - x.mean((2, 3), keepdim=True)
    if window:
        lines = [torch.hann_window(side + 2, periodic=False)[1:-1].to(x) for side in (height, width)]
        hann = torch.outer(*lines)
        x = x * (hann / hann.square().mean().sqrt())
    power = torch.fft.fft2(x, norm="ortho").abs().double().square().mean((0, 1)).cpu()
    along = [torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width)]
    radius = torch.hypot(along[0][:, None], along[1]).flatten()
    ring = (radius * max(height, width)).round().long()
    modes = torch.bincount(ring)
    filled = modes > 0
    sums = [torch.bincount(ring, values)[filled] for values in (radius, power.flatten())]
    modes = modes[filled]
    return RadialSpectrum(sums[0] / modes, sums[1] / modes, modes)


class Energy(NamedTuple):
    """Energy of a region. Those of several batches may be added field by field."""

    high: float
    """Sum of squares of the detail, ``x - lowpass(x)``."""
    low: float
    """Sum of squares of the rest, ``lowpass(x) - mean(x)``."""

    @property
    def share(self) -> float | None:
        """``high / (high + low)``, 0 to 1; None where there is no energy: an empty region or constant features."""
        total = self.high + self.low
        return self.high / total if total else None


def high_frequency_share(
    features: Tensor, labels: Tensor | None = None, boundary_width: int = 1, ignore_index: int = 255
) -> dict[str, Energy]:
    """Share of the high frequencies in the energy of features, inside objects and at their boundaries.

    The low-pass is the binomial filter ``[1, 4, 6, 4, 1] / 16`` along both axes, border pixels repeated; it lets
    a wave of f cycles per pixel through at ``cos(pi f)**4``, one half at 0.18. The mean is that of each map. All
    is measured on the grid of the features, to which the labels are brought by nearest interpolation.

    Args:
        features: ``(B, C, h, w)``, floating point, finite.
        labels: ``(B, H, W)``, integers from 0, or ``ignore_index``; without them all pixels are one region.
        boundary_width: pixels of the feature map within this chessboard distance of another class are boundary.
        ignore_index: the label of pixels without truth, which are in no region.

    Returns:
        By region: ``"all"``, and with labels ``"interior"`` and ``"boundary"``.

    Raises:
        TypeError: for features that are not floating point, or labels that are.
        ValueError: for wrong shapes, labels of another size of image, or values that are not finite.

    Example:
        >>> stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 1, 16, 16)
        >>> round(high_frequency_share(stripes)["all"].share, 2)
        0.97
    """
    x = _checked(features)
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).to(x) / 16
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 5, 5)
    smooth = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=x.shape[1])
    high = (x - smooth).double().square().sum(1)
    low = (smooth - x.mean((2, 3), keepdim=True)).double().square().sum(1)
    if labels is None:
        return {"all": Energy(float(high.sum()), float(low.sum()))}
    check_inputs([features], labels, 2**24, ignore_index)
    masks = _regions(labels.to(x.device), x.shape[-2:], boundary_width, ignore_index)
    return {region: Energy(float(high[mask].sum()), float(low[mask].sum())) for region, mask in masks.items()}


class KernelSpectrum(NamedTuple):
    """Frequency response of kernels."""

    frequency: Tensor
    """``(n,)`` float32 from -0.5 to 0.5 along both axes, cycles per pixel of the map that the kernels filter."""
    magnitude: Tensor
    """``(n, n)`` float32, rows vertical frequency; mean over all kernels of the absolute response."""


def kernel_spectrum(
    kernels: Tensor, kernel_size: int, highpass: bool = False, size: int = 33
) -> KernelSpectrum:
    """Mean magnitude of the frequency response of reassembly kernels, as in Fig. 5 of the FreqFusion paper.

    Args:
        kernels: ``(B, groups * kernel_size**2, H, W)``, floating point, for example
            ``FusedFeatures.lowpass_kernel``.
        kernel_size: their odd side.
        highpass: of the filter "identity minus kernel", what the high-pass kernels are used as.
        size: n, odd, so that frequency zero is in the middle.

    Raises:
        TypeError: for integer tensors.
        ValueError: for wrong shapes or sizes, no kernels, or values that are not finite.

    Example:
        >>> box = torch.full((1, 9, 4, 4), 1 / 9)
        >>> spectrum = kernel_spectrum(box, kernel_size=3, size=3)
        >>> [[round(value, 3) for value in row] for row in spectrum.magnitude.tolist()]
        [[0.111, 0.333, 0.111], [0.333, 1.0, 0.333], [0.111, 0.333, 0.111]]
    """
    kernel_size = check_kernel_size("kernel_size", kernel_size)
    size = check_kernel_size("size", size)
    taps = kernel_size * kernel_size
    x = _checked(kernels, "kernels")
    groups, left = divmod(x.shape[1], taps)
    check_taps("kernels", x.shape[1], kernel_size, groups + bool(left))
    x = x.view(x.shape[0], groups, taps, -1).transpose(2, 3).reshape(-1, taps)
    if highpass:
        x = F.one_hot(torch.tensor(taps // 2), taps).to(x) - x
    frequency = torch.linspace(-0.5, 0.5, size, dtype=torch.float64)
    place = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    phase = -2 * torch.pi * torch.outer(place, frequency)
    wave = torch.polar(torch.ones_like(phase), phase)  # (k, n)
    waves = torch.einsum("ai,bj->abij", wave, wave).reshape(taps, size * size)
    real, imaginary = waves.real.to(x), waves.imag.to(x)
    total = torch.zeros(size * size, dtype=torch.float64)
    for part in x.split(max(1, _CHUNK // (size * size))):
        total += torch.hypot(part @ real, part @ imaginary).sum(0).cpu()
    return KernelSpectrum(frequency.float(), (total / len(x)).float().view(size, size))


class FusionInternals(NamedTuple):
    """What a FreqFusion module computes on its way; detached."""

    fused: FusedFeatures
    """What the module returns."""
    lowpass_kernels: Tensor
    """``(B, up_group * lowpass_kernel**2, H, W)``, positive, sum one; of each fine pixel, on the coarse map."""
    highpass_kernels: Tensor | None
    """``(B, up_group * highpass_kernel**2, H, W)``, positive, sum one; on the fine map, whose detail is
    what they leave: ``hr_feat - carafe(hr_feat, highpass_kernels)``. None if the high-pass filter is off."""
    offsets: Tensor | None
    """``(B, 2 * groups, H, W)`` in coarse pixels: along x of each group, then along y. None without the generator."""
    detail: Tensor | None
    """``(B, 1, H, W)``: by how much the high-pass filter changes each pixel of the fine map, root mean square over
    the channels. None if it is off."""


@torch.no_grad()
def fusion_internals(fusion: Fusion, hr_feat: Tensor, lr_feat: Tensor) -> FusionInternals:
    """Run a FreqFusion module and return its kernels, offsets and added detail.

    :func:`freqfusion.analysis.record.record_features` records ``hr_feat`` and ``lr_feat`` of a model's sites.

    Args:
        fusion: a :class:`~freqfusion.FreqFusion`.
        hr_feat: ``(B, hr_channels, H, W)``.
        lr_feat: ``(B, lr_channels, h, w)``.

    Raises:
        TypeError: for another fusion method.
        ValueError: for inputs that the module refuses.

    Example:
        >>> fusion = FreqFusion(hr_channels=8, lr_channels=16)
        >>> internals = fusion_internals(fusion, torch.rand(1, 8, 9, 12), torch.rand(1, 16, 5, 6))
        >>> tuple(internals.offsets.shape), tuple(internals.detail.shape)
        ((1, 8, 9, 12), (1, 1, 9, 12))
    """
    if not isinstance(fusion, FreqFusion):
        raise TypeError(
            f"only FreqFusion has low-pass and high-pass kernels and offsets, got {type(fusion).__name__}; the "
            "kernels of other methods are in the lowpass_kernel that they return"
        )
    fused = fusion(hr_feat=hr_feat, lr_feat=lr_feat)
    hr, lr, _, logits = fusion.predict(hr_feat, lr_feat)
    highpass = detail = offsets = None
    if logits is not None:
        highpass = fusion._normalise(logits, fusion.highpass_kernel, fusion.hamming_highpass)
        detail = (fused.hr_feat - hr_feat).float().square().mean(1, keepdim=True).sqrt()
    if fusion.dysampler is not None:
        offsets = fusion.dysampler.offsets(hr, lr)
    assert fused.lowpass_kernel is not None
    return FusionInternals(fused, fused.lowpass_kernel, highpass, offsets, detail)


def _checked(x: Tensor, name: str = "features") -> Tensor:
    """``x`` without gradient, at least float32; from MPS, which has no float64, on the CPU."""
    check_map(name, x)
    if 0 in x.shape:
        raise ValueError(f"{name} of shape {tuple(x.shape)} are empty: there is nothing to measure")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} hold NaN or infinite values; find out where the network produces them")
    x = x.detach().cpu() if x.device.type == "mps" else x.detach()
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _regions(
    labels: Tensor, size: tuple[int, ...], boundary_width: int, ignore_index: int
) -> dict[str, Tensor]:
    """Masks ``(B, h, w)`` of all pixels with a class, those inside objects and those at boundaries."""
    labels = resize_labels(labels.long(), size)
    near = distance_to_boundary(labels, boundary_width, ignore_index) <= boundary_width
    kept = labels != ignore_index
    return {"all": kept, "interior": kept & ~near, "boundary": near}
