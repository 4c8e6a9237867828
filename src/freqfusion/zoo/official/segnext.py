"""SegNeXt as mmsegmentation and the FreqFusion release save it; our names are theirs."""

from typing import Any

from freqfusion.data import class_names
from freqfusion.models.mscan import MSCAN_VARIANTS
from freqfusion.zoo.build import build_own
from freqfusion.zoo.official.base import Family, Plan, Shapes, fusion_options

FUSIONS = "decode_head.freqfusions."
RELEASED = {"hamming_window": False, "direction_feat": "sim", "compressed_channels": None}
"""What the head sets its fusions to, where FreqFusion has another default; the ratio decides on the channels."""
CLASSES = {150: class_names.ADE20K, 19: class_names.CITYSCAPES}


def _recognises(shapes: Shapes) -> bool:
    return {
        "backbone.patch_embed1.proj.0.weight",
        "decode_head.hamburger.ham_in.conv.weight",
    } <= shapes.keys()


def _plan(shapes: Shapes) -> Plan:
    stages = range(1, 5)
    widths = tuple(shapes[f"backbone.norm{i}.weight"][0] for i in stages)
    depths = tuple(shapes.count(f"backbone.block{i}.") for i in stages)
    found = (name for name, x in MSCAN_VARIANTS.items() if (x.widths, x.depths) == (widths, depths))
    name = next(found, None)
    if name is None:
        raise ValueError(f"its backbone has the widths {widths} and depths {depths}, as no published one has")
    fused = shapes.count(FUSIONS) > 0
    classes = shapes["decode_head.conv_seg.weight"][0]
    options = _head_options(shapes) if fused else {}
    return Plan(
        f"SegNeXt-{name.upper()}, {'FreqFusion' if fused else 'plain'} head, {classes} classes",
        build_own(
            {"num_classes": classes, "fusion": "freqfusion" if fused else "bilinear", **options},
            f"segnext_{name}",
        ),
        unneeded={r".+\.init_pos": "sub-pixel positions, which follow from the sizes"},
        classes=CLASSES.get(classes),
    )


def _head_options(shapes: Shapes) -> dict[str, Any]:
    """Settings of the released head that its shapes tell."""
    fusions = [f"{FUSIONS}{i}." for i in range(shapes.count(FUSIONS))]
    found = fusion_options(shapes, fusions[0], RELEASED)
    sizes = [
        (
            shapes[fusion + "lr_channel_compressor.weight"][1],
            *shapes[fusion + "hr_channel_compressor.weight"][:2],
        )
        for fusion in fusions
    ]
    ratios = range(1, sum(sizes[0]))
    ratio = next((x for x in ratios if all((lr + hr) // x == width for lr, width, hr in sizes)), None)
    options: dict[str, Any] = {}
    if ratio is not None:
        options["compress_ratio"] = ratio
        found.pop("compressed_channels", None)
    if "feature_resample_group" in found:
        options["feature_resample_group"] = found.pop("feature_resample_group")
    return options | ({"fusion_options": found} if found else {})


FAMILY = Family("SegNeXt T, S, B, L with plain or FreqFusion head (mmsegmentation)", _recognises, _plan)
