"""SegNeXt as mmsegmentation and the FreqFusion release save it; our names are theirs."""

from freqfusion.checkpoints.official.base import Family, Plan, Shapes
from freqfusion.data import class_names
from freqfusion.models import create_model
from freqfusion.models.mscan import MSCAN_VARIANTS

FUSION = "decode_head.freqfusions.0"
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
    fused = any(key.startswith(FUSION) for key in shapes)
    classes = shapes["decode_head.conv_seg.weight"][0]
    options = _head_options(shapes) if fused else {}
    return Plan(
        f"SegNeXt-{name.upper()}, {'FreqFusion' if fused else 'plain'} head, {classes} classes",
        create_model(f"segnext_{name}", classes, "freqfusion" if fused else "bilinear", **options),
        unneeded={r".+\.init_pos": "sub-pixel positions, which follow from the sizes"},
        classes=CLASSES.get(classes),
    )


def _head_options(shapes: Shapes) -> dict[str, int]:
    """Settings of the released head that its shapes tell."""
    compressed, hr_channels = shapes[f"{FUSION}.hr_channel_compressor.weight"][:2]
    lr_channels = shapes[f"{FUSION}.lr_channel_compressor.weight"][1]
    offsets = shapes[f"{FUSION}.dysampler.offset.weight"][0]  # x and y of four sub-pixels for each group
    return {
        "compress_ratio": (hr_channels + lr_channels) // compressed,
        "feature_resample_group": offsets // 8,
    }


FAMILY = Family("SegNeXt T, S, B, L with plain or FreqFusion head (mmsegmentation)", _recognises, _plan)
