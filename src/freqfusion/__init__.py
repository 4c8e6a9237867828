"""Frequency-aware feature fusion (FreqFusion, TPAMI 2024) for dense prediction."""

from freqfusion.fusion import (
    FreqFusion,
    FusedFeatures,
    Fusion,
    create_fusion,
    describe_fusions,
    list_fusions,
    register_fusion,
)
from freqfusion.ops import carafe, local_similarity, normalize_kernels, resample, window_similarity

__version__ = "0.1.0"

__all__ = [
    "FreqFusion",
    "FusedFeatures",
    "Fusion",
    "carafe",
    "create_fusion",
    "describe_fusions",
    "list_fusions",
    "local_similarity",
    "normalize_kernels",
    "register_fusion",
    "resample",
    "window_similarity",
]
