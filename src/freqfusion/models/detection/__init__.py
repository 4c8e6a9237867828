"""Detectors: Faster R-CNN, Mask R-CNN and Panoptic FPN with a fusion method of choice. Need torchvision."""

from collections.abc import Mapping, Sequence
from typing import Any

from freqfusion.decoders import FPN
from freqfusion.decoders.fpn import TopLevel
from freqfusion.models import DETECTORS
from freqfusion.models.detection.backbone import RESNETS, PyramidBackbone, create_encoder
from freqfusion.models.detection.panoptic import PanopticFPN, merge_panoptic
from freqfusion.models.detection.rcnn import RCNN

__all__ = ["RCNN", "PanopticFPN", "create_detector", "list_detectors", "merge_panoptic"]


def list_detectors() -> list[str]:
    """Names of the ready detectors; any ``KIND_NETWORK`` with a network of timm is possible too.

    >>> list_detectors()[:5]
    ['faster_rcnn_r18', 'faster_rcnn_r34', 'faster_rcnn_r50', 'faster_rcnn_r101', 'mask_rcnn_r18']
    """
    return [f"{kind}_{backbone}" for kind in DETECTORS for backbone in RESNETS]


def create_detector(
    name: str,
    num_classes: int,
    fusion: str = "freqfusion",
    *,
    things: Sequence[bool] | None = None,
    channels: int = 256,
    top_level: TopLevel = "pool",
    fusion_options: Mapping[str, Any] | None = None,
    backbone_weights: str | None = None,
    backbone_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> RCNN:
    """Build a detector by name, with fresh weights unless the options say otherwise.

    Args:
        name: ``"KIND_BACKBONE"``: ``faster_rcnn``, ``mask_rcnn`` or ``panoptic_fpn``, and ``r18``, ``r34``, ``r50``,
            ``r101`` (torchvision's residual networks) or a network of timm with maps at the strides 4 to 32.
        num_classes: number of classes K, without background.
        fusion: a name of :func:`freqfusion.fusion.list_fusions`; ``"nearest"`` is the plain pyramid. With
            FreqFusion the compressed maps have a quarter of the pyramid's channels, as published.
        things: for Panoptic FPN, which of the classes are things.
        channels: of the pyramid.
        top_level: the level of stride 64: ``"pool"``, or ``"fused"`` as in the released FreqFusion detectors (see
            :class:`freqfusion.decoders.FPN`). The parameters that the paper counts (+0.3 M) are those of ``"pool"``.
        fusion_options: further arguments of the fusion method.
        backbone_weights: where the backbone starts from. The path or address of a file; for a residual network also
            ``"torchvision:IMAGENET1K_V1"`` (a name of its weights there) or ``"timm:resnet50.a1_in1k"``; ``"timm"``
            for a network of timm. Names are downloaded once; nothing is unless it is asked for.
        backbone_options: ``frozen_stages`` and ``norm_eval`` of a residual network, or arguments of
            ``timm.create_model``.
        **options: further arguments of :class:`RCNN` (and :class:`PanopticFPN`). Images are padded to multiples of
            32, of 64 with ``top_level="fused"``.

    Raises:
        ImportError: for a network of timm where timm is not installed.
        TypeError: for an option that the detector does not have.
        ValueError: for an unknown name, a class count below 1, things that do not fit, or weights that do not.

    >>> import torch
    >>> model = create_detector("faster_rcnn_r18", num_classes=3, channels=32, head_channels=64, min_size=64).eval()
    >>> sorted(model([torch.rand(3, 48, 61)])[0])
    ['boxes', 'labels', 'scores']
    """
    kind = next((kind for kind in DETECTORS if name.startswith(f"{kind}_")), "")
    if not kind:
        raise ValueError(
            f"unknown detector {name!r}; choose one of {', '.join(list_detectors())}, or one of "
            f"{', '.join(DETECTORS)} and a network of timm, such as faster_rcnn_convnext_tiny"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if top_level == "none":
        raise ValueError('a detector has a top level: pool or fused, got "none"')
    if kind == "panoptic_fpn" and (things is None or len(things) != num_classes):
        count = "none" if things is None else len(things)
        raise ValueError(
            f"things must say for each of the {num_classes} classes whether it is one, got {count}"
        )
    encoder: Any = create_encoder(name.removeprefix(f"{kind}_"), backbone_weights, **(backbone_options or {}))
    defaults = {"compressed_channels": channels // 4} if fusion == "freqfusion" else {}
    fpn = FPN(
        encoder.out_channels,
        channels,
        fusion,
        {**defaults, **(fusion_options or {})},
        top_level=top_level,
    )
    options = {"size_divisible": 64 if top_level == "fused" else 32, **options}
    backbone = PyramidBackbone(encoder, fpn)
    if kind == "panoptic_fpn":
        assert things is not None
        model: RCNN = PanopticFPN(backbone, things, **options)
    else:
        model = RCNN(backbone, num_classes, masks=kind == "mask_rcnn", **options)
    model.made_by = (
        name,
        {
            "num_classes": num_classes,
            "fusion": fusion,
            "things": None if things is None else list(things),
            "channels": channels,
            "top_level": top_level,
            "fusion_options": fusion_options,
            "backbone_options": backbone_options,
            **options,
        },
    )
    return model
