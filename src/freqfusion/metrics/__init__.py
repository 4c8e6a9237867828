"""Evaluation over a whole set: label maps, detections, panoptic segmentations, and result files for servers.

The modules behind the names load on first use, so that importing this package needs torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from freqfusion._optional import require

if TYPE_CHECKING:
    from freqfusion.metrics.binary import BinaryMetrics
    from freqfusion.metrics.boundary_distance import BoundaryDistance
    from freqfusion.metrics.detection import CocoMetric
    from freqfusion.metrics.functional import boundary_band, boundary_counts, confusion_counts, score_counts
    from freqfusion.metrics.panoptic import PanopticMetrics, panoptic_counts, score_panoptic
    from freqfusion.metrics.results import (
        read_detections,
        write_detections,
        write_panoptic,
        write_panoptic_image,
    )
    from freqfusion.metrics.segmentation import SegmentationMetrics

__all__ = [
    "BinaryMetrics",
    "BoundaryDistance",
    "CocoMetric",
    "PanopticMetrics",
    "SegmentationMetrics",
    "boundary_band",
    "boundary_counts",
    "confusion_counts",
    "panoptic_counts",
    "read_detections",
    "score_counts",
    "score_panoptic",
    "write_detections",
    "write_panoptic",
    "write_panoptic_image",
]

_MODULES = {
    "BinaryMetrics": "binary",
    "BoundaryDistance": "boundary_distance",
    "CocoMetric": "detection",
    "PanopticMetrics": "panoptic",
    "SegmentationMetrics": "segmentation",
    "panoptic_counts": "panoptic",
    "read_detections": "results",
    "score_panoptic": "panoptic",
    "write_detections": "results",
    "write_panoptic": "results",
    "write_panoptic_image": "results",
}
"""Where a name is; the others are in ``functional``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "functional")
    if module in ("binary", "panoptic", "segmentation"):
        require("torchmetrics", "train")
    return getattr(import_module(f"{__name__}.{module}"), name)
