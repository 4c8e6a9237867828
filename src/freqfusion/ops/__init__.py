"""Stateless tensor operators that the fusion methods are built from."""

from freqfusion.ops._backends import Explanation, available_backends, explain, use_backend
from freqfusion.ops.carafe import logits as _logits  # noqa: F401  enters its operator
from freqfusion.ops.carafe.naive import carafe_naive
from freqfusion.ops.carafe.op import carafe
from freqfusion.ops.convolution import op as _convolution  # noqa: F401  enters its operator
from freqfusion.ops.local_similarity.naive import local_similarity_naive
from freqfusion.ops.local_similarity.op import local_similarity
from freqfusion.ops.normalize_kernels.naive import normalize_kernels_naive
from freqfusion.ops.normalize_kernels.op import normalize_kernels
from freqfusion.ops.normalized_similarity import op as _normalized  # noqa: F401  enters its operator
from freqfusion.ops.resample import directed as _directed  # noqa: F401  enters its operator
from freqfusion.ops.resample.naive import resample_naive
from freqfusion.ops.resample.op import resample
from freqfusion.ops.window_similarity.naive import window_similarity_naive
from freqfusion.ops.window_similarity.op import window_similarity

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
