"""Architectures and the two contracts of what they give. Reads no file; :func:`freqfusion.create_model` makes them.

The detectors load on first use, since they need torchvision.
"""

from typing import TYPE_CHECKING

from freqfusion._optional import lazy
from freqfusion.models.base import ObjectModel, PixelModel, Segmenter
from freqfusion.models.encoders import SmallEncoder, TimmEncoder
from freqfusion.models.inference import ObjectInference, predict_logits
from freqfusion.models.library import LibrarySegmenter
from freqfusion.models.mscan import MSCAN
from freqfusion.models.segmenter import EncoderDecoder
from freqfusion.models.segnext import SegNeXt

if TYPE_CHECKING:
    from freqfusion.models.detection import RCNN, LibraryDetector, PanopticFPN

__all__ = [
    "MSCAN",
    "RCNN",
    "EncoderDecoder",
    "LibraryDetector",
    "LibrarySegmenter",
    "ObjectInference",
    "ObjectModel",
    "PanopticFPN",
    "PixelModel",
    "SegNeXt",
    "Segmenter",
    "SmallEncoder",
    "TimmEncoder",
    "predict_logits",
]

__getattr__ = lazy(__name__, {"detection": "LibraryDetector PanopticFPN RCNN"}, "vision")
