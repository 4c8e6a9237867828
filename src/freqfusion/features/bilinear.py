"""Bilinear interpolation, which no image guides."""

from torch import Tensor

from freqfusion.features.base import FeatureUpsampler, Size
from freqfusion.ops.resize import resize


class BilinearFeatures(FeatureUpsampler):
    """Interpolates between the centres of the coarse pixels; the image only gives the size."""

    def upsample(self, features: Tensor, image: Tensor, size: Size, chunk: int | None) -> Tensor:
        return resize(features, size, "bilinear")
