"""Detectors made of a backbone, a pyramid and heads."""

from collections.abc import Mapping, Sequence
from typing import Any

from freqfusion.decoders import FPN
from freqfusion.decoders.fpn import TopLevel
from freqfusion.models.detection.backbone import PyramidBackbone, create_encoder
from freqfusion.models.detection.panoptic import PanopticFPN
from freqfusion.models.detection.rcnn import RCNN


def build_detector(
    kind: str,
    backbone: str,
    num_classes: int,
    fusion: str = "freqfusion",
    *,
    things: Sequence[bool] | None = None,
    channels: int = 256,
    top_level: TopLevel = "pool",
    fusion_options: Mapping[str, Any] | None = None,
    backbone_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> RCNN:
    """A detector with fresh weights.

    Args:
        kind: ``faster_rcnn``, ``mask_rcnn`` or ``panoptic_fpn``.
        backbone: ``r18``, ``r34``, ``r50``, ``r101`` (torchvision's residual networks) or a network of timm with maps
            at the strides 4 to 32.
        num_classes: number of classes K, without background.
        fusion: a name of :func:`freqfusion.list_fusions`; ``"nearest"`` is the plain pyramid. With
            FreqFusion the compressed maps have a quarter of the pyramid's channels, as published.
        things: for each class whether it is a thing; Panoptic FPN needs it.
        channels: of the pyramid.
        top_level: the level of stride 64: ``"pool"``, or ``"fused"`` as in the released FreqFusion detectors (see
            :class:`freqfusion.decoders.FPN`). The parameters that the paper counts (+0.3 M) are those of ``"pool"``.
        fusion_options: further arguments of the fusion method.
        backbone_options: ``frozen_stages`` and ``norm_eval`` of a residual network, or arguments of
            ``timm.create_model``.
        **options: further arguments of :class:`RCNN` (and :class:`PanopticFPN`). Images are padded to multiples of
            32, of 64 with ``top_level="fused"``.

    Raises:
        ImportError: for a network of timm where timm is not installed.
        TypeError: for an option that the detector does not have.
        ValueError: for things that do not fit, an unknown backbone or fusion.
    """
    if top_level == "none":
        raise ValueError('a detector has a top level: pool or fused, got "none"')
    if kind == "panoptic_fpn" and (things is None or len(things) != num_classes):
        count = "none" if things is None else len(things)
        raise ValueError(
            f"things must say for each of the {num_classes} classes whether it is one, got {count}"
        )
    encoder: Any = create_encoder(backbone, **(backbone_options or {}))
    defaults = {"compressed_channels": channels // 4} if fusion == "freqfusion" else {}
    fpn = FPN(
        encoder.out_channels,
        channels,
        fusion,
        {**defaults, **(fusion_options or {})},
        top_level=top_level,
    )
    options = {"size_divisible": 64 if top_level == "fused" else 32, **options}
    pyramid = PyramidBackbone(encoder, fpn)
    if kind == "panoptic_fpn":
        assert things is not None
        return PanopticFPN(pyramid, things, **options)
    return RCNN(pyramid, num_classes, masks=kind == "mask_rcnn", **options)
