"""Evaluation of label maps: mean IoU, accuracies, boundary IoU and boundary distances over a whole set.

The modules behind the names load on first use, so that importing this package needs torch alone.
"""

from typing import TYPE_CHECKING, Any

from freqfusion._optional import require

if TYPE_CHECKING:
    from freqfusion.metrics.boundary_distance import BoundaryDistance
    from freqfusion.metrics.functional import boundary_band, boundary_counts, confusion_counts, score_counts
    from freqfusion.metrics.segmentation import SegmentationMetrics

__all__ = [
    "BoundaryDistance",
    "SegmentationMetrics",
    "boundary_band",
    "boundary_counts",
    "confusion_counts",
    "score_counts",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "SegmentationMetrics":
        require("torchmetrics", "train")
        from freqfusion.metrics.segmentation import SegmentationMetrics

        return SegmentationMetrics
    if name == "BoundaryDistance":
        from freqfusion.metrics.boundary_distance import BoundaryDistance

        return BoundaryDistance
    from freqfusion.metrics import functional

    return getattr(functional, name)
