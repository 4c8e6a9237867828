"""Training and judging on Lightning: the only floor that knows it.

Nothing heavy is imported until one of the names below is used (extra ``train``).
"""

from typing import TYPE_CHECKING

from freqfusion._optional import lazy

if TYPE_CHECKING:
    from freqfusion.training.checkpoints import load_checkpoint
    from freqfusion.training.data import SegmentationData
    from freqfusion.training.detection import DetectionModule
    from freqfusion.training.masks import MaskModule
    from freqfusion.training.module import SegmentationModule
    from freqfusion.training.objects import ObjectData
    from freqfusion.training.run import create_trainer
    from freqfusion.training.sharded import FSDP

__all__ = [
    "FSDP",
    "DetectionModule",
    "MaskModule",
    "ObjectData",
    "SegmentationData",
    "SegmentationModule",
    "create_trainer",
    "load_checkpoint",
]

_HOMES = {
    "FSDP": "sharded",
    "MaskModule": "masks",
    "DetectionModule": "detection",
    "ObjectData": "objects",
    "SegmentationData": "data",
    "SegmentationModule": "module",
    "create_trainer": "run",
    "load_checkpoint": "checkpoints",
}

__getattr__ = lazy(__name__, _HOMES, "lightning")
