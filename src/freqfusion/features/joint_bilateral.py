"""Joint bilateral upsampling, without weights: kernels from the distance in space and in colour."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from freqfusion.features._strips import interpolate
from freqfusion.features.base import FeatureUpsampler, Size
from freqfusion.ops import carafe, normalize_kernels, window_similarity
from freqfusion.ops._checks import accumulation_dtype, checked_options


class JointBilateralFeatures(FeatureUpsampler):
    """Averages the coarse pixels around each fine one by their distance and the likeness of their colours.

    A weight is ``exp(-d**2 / (2 * sigma_spatial**2) - c**2 / (2 * sigma_range**2))``: ``d`` is the distance between
    the fine pixel and the coarse one, ``c`` that between the fine colour and the mean colour of the coarse pixel.
    Weights sum to one over the window, so the result stays within the range of the features. With
    ``chunk``, as many channels are filtered at a time as take the memory of so many rows.

    Args:
        sigma_range: deviation of the colours, which are in [0, 1]; small keeps edges, large smooths.
        sigma_spatial: deviation of the positions, in coarse pixels.
        radius: of the window, in coarse pixels.

    Raises:
        ValueError: for deviations that are not positive.

    Source: Kopf et al., "Joint Bilateral Upsampling", SIGGRAPH 2007.

    >>> features = torch.tensor([[[[0.0, 1.0]]]])
    >>> image = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).expand(1, 3, 1, 6)
    >>> JointBilateralFeatures()(features, image)[0, 0, 0].round(decimals=3)
    tensor([0., 0., 0., 1., 1., 1.])
    """

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    @checked_options
    def __init__(self, sigma_range: float = 0.1, sigma_spatial: float = 1.0, radius: int = 2) -> None:
        super().__init__()
        for name, sigma in (("sigma_range", sigma_range), ("sigma_spatial", sigma_spatial)):
            if not (isinstance(sigma, float | int) and 0 < sigma < math.inf):
                raise ValueError(f"{name} must be a positive number, got {sigma!r}")
        self.sigma_range, self.sigma_spatial, self.radius = sigma_range, sigma_spatial, radius
        self.kernel_size = 2 * radius + 1

    def upsample(self, features: Tensor, image: Tensor, size: Size, chunk: int | None) -> Tensor:
        kernels = self.kernels(image, (features.shape[2], features.shape[3]), size)
        if chunk is None or chunk >= size[0]:
            return carafe(features, kernels, self.kernel_size)
        out = features.new_empty(*features.shape[:2], *size)
        channels = max(1, features.shape[1] * chunk // size[0])
        for part, to in zip(features.split(channels, 1), out.split(channels, 1), strict=True):
            to.copy_(carafe(part, kernels, self.kernel_size))
        return out

    def kernels(self, image: Tensor, coarse: Size, size: Size) -> Tensor:
        """Weights ``(B, kernel_size**2, H, W)`` at ``size``, of the taps around each pixel's coarse parent."""
        image = image.to(accumulation_dtype(image))
        fine = interpolate(image, size, mode="bilinear", antialias=True)
        mean = F.adaptive_avg_pool2d(image, coarse)
        # of -|fine - mean|^2 / 2 the part that differs between the taps is an inner product
        query = torch.cat([fine, torch.ones_like(fine[:, :1])], 1) / self.sigma_range**2
        key = torch.cat([mean, -mean.square().sum(1, keepdim=True) / 2], 1)
        logits = window_similarity(query, key, self.kernel_size)
        rows, columns = (
            self._distances(few, many).to(logits) for few, many in zip(coarse, size, strict=True)
        )
        near = rows[:, None, :, None] + columns[None, :, None]
        logits = logits + near.flatten(0, 1)
        return normalize_kernels(logits, self.kernel_size)

    def _distances(self, few: int, many: int) -> Tensor:
        """Logits ``(kernel_size, many)`` along an axis; far below all others for taps outside it."""
        index = torch.arange(many, device="cpu")  # not every device has doubles
        taps = index * few // many + torch.arange(-self.radius, self.radius + 1, device="cpu")[:, None]
        distance = taps - ((index + 0.5) * few / many - 0.5)
        logits = -(distance.double() ** 2) / (2 * self.sigma_spatial**2)
        return logits.masked_fill((taps < 0) | (taps >= few), -1e9)
