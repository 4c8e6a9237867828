"""Stateless tensor operators that the fusion methods are built from."""

from freqfusion.ops.carafe import carafe, carafe_naive
from freqfusion.ops.local_similarity import local_similarity, local_similarity_naive
from freqfusion.ops.normalize_kernels import normalize_kernels, normalize_kernels_naive
from freqfusion.ops.resample import resample, resample_naive
from freqfusion.ops.window_similarity import window_similarity, window_similarity_naive

__all__ = [
    "carafe",
    "carafe_naive",
    "local_similarity",
    "local_similarity_naive",
    "normalize_kernels",
    "normalize_kernels_naive",
    "resample",
    "resample_naive",
    "window_similarity",
    "window_similarity_naive",
]
