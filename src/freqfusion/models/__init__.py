"""Networks with a fusion method of choice: SegNeXt, decoders on any timm backbone, and detectors."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from freqfusion._optional import require
from freqfusion.models.base import Segmenter
from freqfusion.models.encoders import SmallEncoder, TimmEncoder
from freqfusion.models.inference import predict_logits
from freqfusion.models.mscan import MSCAN
from freqfusion.models.segmenter import DECODERS, EncoderDecoder, build_segmenter
from freqfusion.models.segnext import SegNeXt
from freqfusion.weights.files import load_backbone_weights

if TYPE_CHECKING:
    from freqfusion.models.detection import RCNN, PanopticFPN, create_detector, list_detectors

DETECTORS = ("faster_rcnn", "mask_rcnn", "panoptic_fpn")
"""The kinds of :func:`freqfusion.models.detection.create_detector`, with which its names begin."""

__all__ = [
    "DETECTORS",
    "MSCAN",
    "RCNN",
    "EncoderDecoder",
    "PanopticFPN",
    "SegNeXt",
    "Segmenter",
    "TimmEncoder",
    "build_segmenter",
    "create_detector",
    "create_model",
    "list_detectors",
    "list_models",
    "load_backbone_weights",
    "predict_logits",
]


def __getattr__(
    name: str,
) -> Any:  # the detectors need torchvision, which is imported when they are asked for
    if name not in ("RCNN", "PanopticFPN", "create_detector", "list_detectors"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("torchvision", "vision")
    return getattr(require(f"{__name__}.detection", "vision"), name)


def _fpn_small(
    num_classes: int, fusion: str, *, channels: int = 48, fusion_options: Mapping[str, Any] | None = None
) -> EncoderDecoder:
    defaults = {"compressed_channels": 16} if fusion == "freqfusion" else {}
    options = {**defaults, **(fusion_options or {})}
    return EncoderDecoder(SmallEncoder(), num_classes, fusion, channels=channels, fusion_options=options)


_BUILDERS: dict[str, Callable[..., Segmenter]] = {
    "segnext_t": partial(SegNeXt, "t"),
    "segnext_s": partial(SegNeXt, "s"),
    "segnext_b": partial(SegNeXt, "b"),
    "segnext_l": partial(SegNeXt, "l"),
    "fpn_small": _fpn_small,
    "fpn_resnet18": partial(build_segmenter, "resnet18", channels=64),
}


def list_models() -> list[str]:
    """Names of the ready networks; :func:`create_model` also puts others together from two names.

    >>> list_models()
    ['segnext_t', 'segnext_s', 'segnext_b', 'segnext_l', 'fpn_small', 'fpn_resnet18']
    """
    return list(_BUILDERS)


def create_model(name: str, num_classes: int, fusion: str = "freqfusion", **options: Any) -> Segmenter:
    """Build a segmentation network by name, with fresh weights unless the options say otherwise.

    Args:
        name: a name of :func:`list_models`, or ``"DECODER_BACKBONE"``: a decoder of :func:`build_segmenter`
            and a network of timm, such as ``"unet_convnext_tiny"``.
        num_classes: number of classes K, at least 1.
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        **options: further arguments of the network (:class:`SegNeXt` or :func:`build_segmenter`). ``fpn_small``
            takes ``channels`` and ``fusion_options`` alone; with FreqFusion it has 16 compressed channels unless
            told otherwise.

    Raises:
        ImportError: for a network of timm where timm is not installed.
        TypeError: for an option that the network does not have.
        ValueError: for an unknown name or a class count below 1.

    >>> import torch
    >>> model = create_model("fpn_small", num_classes=5, fusion="bilinear")
    >>> model(torch.zeros(2, 3, 33, 47)).shape
    torch.Size([2, 5, 33, 47])
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if name in _BUILDERS:
        model = _BUILDERS[name](num_classes=num_classes, fusion=fusion, **options)
        kept = {key: value for key, value in options.items() if key != "pretrained"}
        model.made_by = (name, {"num_classes": num_classes, "fusion": fusion, **kept})
        return model
    decoder, _, backbone = name.partition("_")
    if decoder not in DECODERS or not backbone:
        raise ValueError(
            f"unknown model {name!r}; choose one of {', '.join(_BUILDERS)}, or a decoder ({', '.join(DECODERS)}) "
            "and a network of timm, such as unet_convnext_tiny (detectors: freqfusion.models.list_detectors; "
            "Mask2Former, SegFormer, UPerNet: freqfusion.models.library.list_hosts)"
        )
    return build_segmenter(backbone, decoder, fusion, num_classes=num_classes, **options)
