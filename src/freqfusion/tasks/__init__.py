"""What is trained and judged, one module per task. The names load on first use (extra ``train``)."""

from typing import TYPE_CHECKING

from freqfusion._optional import lazy

if TYPE_CHECKING:
    from freqfusion.tasks.detection import DetectionModule
    from freqfusion.tasks.feature_data import FeatureData
    from freqfusion.tasks.features import FeatureModule
    from freqfusion.tasks.image_data import SegmentationData
    from freqfusion.tasks.mask_classification import MaskClassificationModule
    from freqfusion.tasks.object_data import ObjectData
    from freqfusion.tasks.semantic import SegmentationModule
    from freqfusion.tasks.sharding import FSDP

__all__ = [
    "FSDP",
    "DetectionModule",
    "FeatureData",
    "FeatureModule",
    "MaskClassificationModule",
    "ObjectData",
    "SegmentationData",
    "SegmentationModule",
]

__getattr__ = lazy(
    __name__,
    {
        "detection": "DetectionModule",
        "feature_data": "FeatureData",
        "features": "FeatureModule",
        "image_data": "SegmentationData",
        "mask_classification": "MaskClassificationModule",
        "object_data": "ObjectData",
        "semantic": "SegmentationModule",
        "sharding": "FSDP",
    },
    "train",
)
