"""Stateless tensor operators that the fusion methods are built from."""

from freqfusion.ops._backends import Explanation, available_backends, explain, use_backend
from freqfusion.ops.carafe import carafe, carafe_naive
from freqfusion.ops.local_similarity import local_similarity, local_similarity_naive
from freqfusion.ops.normalize_kernels import normalize_kernels, normalize_kernels_naive
from freqfusion.ops.resample import resample, resample_naive
from freqfusion.ops.window_similarity import window_similarity, window_similarity_naive

__all__ = [
    "Explanation",
    "available_backends",
    "carafe",
    "carafe_naive",
    "explain",
    "local_similarity",
    "local_similarity_naive",
    "normalize_kernels",
    "normalize_kernels_naive",
    "resample",
    "resample_naive",
    "use_backend",
    "window_similarity",
    "window_similarity_naive",
]
