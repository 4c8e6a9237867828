"""Evaluation over a whole set: label maps, detections, panoptic segmentations, features; result files for servers.

The modules behind the names load on first use, so that importing this package needs torch alone.
"""

from typing import TYPE_CHECKING

from freqfusion._optional import lazy

if TYPE_CHECKING:
    from freqfusion.metrics.binary import BinaryMetrics
    from freqfusion.metrics.boundary_distance import BoundaryDistance
    from freqfusion.metrics.detection import CocoMetric
    from freqfusion.metrics.features import FeatureMetrics
    from freqfusion.metrics.functional import boundary_band, boundary_counts, confusion_counts, score_counts
    from freqfusion.metrics.panoptic import panoptic_counts, score_panoptic
    from freqfusion.metrics.results import (
        write_detections,
        write_panoptic,
        write_panoptic_image,
    )
    from freqfusion.metrics.segmentation import SegmentationMetrics

__all__ = [
    "BinaryMetrics",
    "BoundaryDistance",
    "CocoMetric",
    "FeatureMetrics",
    "SegmentationMetrics",
    "boundary_band",
    "boundary_counts",
    "confusion_counts",
    "panoptic_counts",
    "score_counts",
    "score_panoptic",
    "write_detections",
    "write_panoptic",
    "write_panoptic_image",
]

__getattr__ = lazy(
    __name__,
    {
        "binary": "BinaryMetrics",
        "boundary_distance": "BoundaryDistance",
        "detection": "CocoMetric",
        "features": "FeatureMetrics",
        "functional": "boundary_band boundary_counts confusion_counts score_counts",
        "panoptic": "panoptic_counts score_panoptic",
        "results": "write_detections write_panoptic write_panoptic_image",
        "segmentation": "SegmentationMetrics",
    },
    "train",
)
