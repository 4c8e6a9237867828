"""Segmentation networks with a fusion method of choice: SegNeXt, and FPN networks."""

from collections.abc import Callable
from functools import partial
from typing import Any

from freqfusion.models.base import Segmenter
from freqfusion.models.fpn_segmenter import FPNSegmenter
from freqfusion.models.inference import predict_logits
from freqfusion.models.mscan import MSCAN
from freqfusion.models.segnext import SegNeXt
from freqfusion.models.weights import load_backbone_weights

__all__ = [
    "MSCAN",
    "FPNSegmenter",
    "SegNeXt",
    "Segmenter",
    "create_model",
    "list_models",
    "load_backbone_weights",
    "predict_logits",
]

_BUILDERS: dict[str, Callable[..., Segmenter]] = {
    "segnext_t": partial(SegNeXt, "t"),
    "segnext_s": partial(SegNeXt, "s"),
    "segnext_b": partial(SegNeXt, "b"),
    "segnext_l": partial(SegNeXt, "l"),
    "fpn_small": FPNSegmenter,
    "fpn_resnet18": partial(FPNSegmenter, encoder="resnet18", channels=64),
}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows.

    >>> list_models()
    ['segnext_t', 'segnext_s', 'segnext_b', 'segnext_l', 'fpn_small', 'fpn_resnet18']
    """
    return list(_BUILDERS)


def create_model(name: str, num_classes: int, fusion: str = "freqfusion", **options: Any) -> Segmenter:
    """Build a segmentation network with fresh weights.

    Args:
        name: a name of :func:`list_models`.
        num_classes: number of classes K, at least 1.
        fusion: a name of :func:`freqfusion.fusion.list_fusions`.
        **options: further arguments of the network (:class:`SegNeXt` or :class:`FPNSegmenter`).

    Raises:
        ImportError: for ``fpn_resnet18`` where timm is not installed.
        TypeError: for an option that the network does not have.
        ValueError: for an unknown name or a class count below 1.

    >>> import torch
    >>> model = create_model("fpn_small", num_classes=5, fusion="bilinear")
    >>> model(torch.zeros(2, 3, 33, 47)).shape
    torch.Size([2, 5, 33, 47])
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(_BUILDERS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return _BUILDERS[name](num_classes, fusion, **options)
