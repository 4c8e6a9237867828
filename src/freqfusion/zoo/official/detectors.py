"""Detectors of the FreqFusion release, which builds on mmdetection 2.28, and the plain ones of mmdetection."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from freqfusion._optional import require
from freqfusion.data import class_names
from freqfusion.weights.fill import Renaming
from freqfusion.zoo.build import build_own
from freqfusion.zoo.official.base import Family, Plan, Shapes, fusion_options

BACKBONES = {(2, 2): "r18", (4, 6): "r34", (4, 6, 1): "r50", (4, 23, 1): "r101"}
"""By the number of blocks in the second and third stage; 1 stands for bottleneck blocks."""
FUSION = "neck.alignment."
CLASSES = {(80, 0): class_names.COCO_THINGS, (80, 53): class_names.COCO_PANOPTIC}
"""By the numbers of things and stuff."""

_NAMES = Renaming(
    {
        "backbone.": "backbone.body.",
        "neck.lateral_convs.{}.conv.{}": "backbone.fpn.laterals.{}.{}",
        "neck.fpn_convs.{}.conv.{}": "backbone.fpn.outputs.{}.{}",
        "rpn_head.rpn_conv.": "rpn.head.conv.0.0.",
        "rpn_head.rpn_cls.": "rpn.head.cls_logits.",
        "rpn_head.rpn_reg.": "rpn.head.bbox_pred.",
        "roi_head.bbox_head.shared_fcs.0.": "roi_heads.box_head.fc6.",
        "roi_head.bbox_head.shared_fcs.1.": "roi_heads.box_head.fc7.",
        "roi_head.bbox_head.fc_cls.": "roi_heads.box_predictor.cls_score.",
        "roi_head.bbox_head.fc_reg.": "roi_heads.box_predictor.bbox_pred.",
        "roi_head.mask_head.convs.{}.conv.{}": "roi_heads.mask_head.{}.0.{}",
        "roi_head.mask_head.upsample.": "roi_heads.mask_predictor.0.",
        "roi_head.mask_head.conv_logits.": "roi_heads.mask_predictor.2.",
        "semantic_head.conv_upsample_layers.{}.conv.{}.conv.{}": "semantic_branch.levels.{}.{}.0.{}",
        "semantic_head.conv_upsample_layers.{}.conv.{}.gn.{}": "semantic_branch.levels.{}.{}.1.{}",
        "semantic_head.conv_logits.": "semantic_branch.logits.",
    }
)


def own_keys(official_key: str, fusions: int = 4) -> Sequence[str]:
    """The name in a network of :func:`freqfusion.create_model` of a released tensor; none if unknown.

    Args:
        official_key: the tensor's name.
        fusions: how many the pyramid has. The released one counts them from the finest level, ours from the coarsest.

    >>> own_keys("neck.alignment.3.content_encoder.bias")
    ('backbone.fpn.fusions.0.content_encoder.bias',)
    """
    found = re.fullmatch(rf"{re.escape(FUSION)}(\d+)\.(.+)", official_key)
    if found:
        return (f"backbone.fpn.fusions.{fusions - 1 - int(found[1])}.{found[2]}",)
    return _NAMES.own_keys(official_key)


def _recognises(shapes: Shapes) -> bool:
    return {"neck.lateral_convs.0.conv.weight", "rpn_head.rpn_conv.weight"} <= shapes.keys()


def _plan(shapes: Shapes) -> Plan:
    require("torchvision", "vision")

    depths = tuple(shapes.count(f"backbone.layer{stage}.") for stage in (2, 3))
    bottleneck = "backbone.layer1.0.conv3.weight" in shapes
    backbone = BACKBONES.get((*depths, 1) if bottleneck else depths)
    if backbone is None:
        raise ValueError(
            f"its ResNet has {depths} blocks in the second and third stage, as no published one has"
        )
    things = shapes["roi_head.bbox_head.fc_cls.weight"][0] - 1  # the last is background
    panoptic = "semantic_head.conv_logits.weight" in shapes
    masks = "roi_head.mask_head.conv_logits.weight" in shapes
    kind = "panoptic_fpn" if panoptic else "mask_rcnn" if masks else "faster_rcnn"
    fusions = shapes.count(FUSION)
    channels = shapes["neck.lateral_convs.0.conv.weight"][0]
    options: dict[str, Any] = {
        "channels": channels,
        "head_channels": shapes["roi_head.bbox_head.shared_fcs.0.weight"][0],
        "top_level": "fused" if "neck.lateral_convs.4.conv.weight" in shapes else "pool",
    }
    stuff = 0
    if panoptic:
        classes, options["semantic_channels"] = shapes["semantic_head.conv_logits.weight"][:2]
        stuff = classes - 1  # the last is all things
        options["things"] = [True] * things + [False] * stuff
    if fusions:
        usual = {"compressed_channels": channels // 4}
        options["fusion_options"] = fusion_options(shapes, f"{FUSION}0.", usual)
    pyramid = "FreqFusion" if fusions else "plain"
    return Plan(
        f"{_TITLES[kind]}, {_TITLES[backbone]}, {pyramid} pyramid, {things + stuff} classes",
        build_own(
            {"num_classes": things + stuff, "fusion": "freqfusion" if fusions else "nearest", **options},
            f"{kind}_{backbone}",
        ),
        partial(own_keys, fusions=fusions),
        unneeded={r".+\.init_pos": "sub-pixel positions, which follow from the sizes"},
        classes=CLASSES.get((things, stuff)),
    )


_TITLES = {
    "faster_rcnn": "Faster R-CNN",
    "mask_rcnn": "Mask R-CNN",
    "panoptic_fpn": "Panoptic FPN",
    "r18": "ResNet-18",
    "r34": "ResNet-34",
    "r50": "ResNet-50",
    "r101": "ResNet-101",
}

FAMILY = Family(
    "Faster R-CNN, Mask R-CNN, Panoptic FPN with a PyTorch-style ResNet, plain or FreqFusion pyramid (mmdetection)",
    _recognises,
    _plan,
)
