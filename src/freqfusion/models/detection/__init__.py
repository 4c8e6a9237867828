"""Detectors: Faster R-CNN, Mask R-CNN and Panoptic FPN with a fusion method of choice. Need torchvision."""

from freqfusion.models.detection.build import build_detector
from freqfusion.models.detection.contract import Detector, LibraryDetector
from freqfusion.models.detection.panoptic import PanopticFPN, merge_panoptic
from freqfusion.models.detection.rcnn import RCNN

__all__ = [
    "RCNN",
    "Detector",
    "LibraryDetector",
    "PanopticFPN",
    "build_detector",
    "merge_panoptic",
]
