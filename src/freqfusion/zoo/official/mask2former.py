"""Mask2Former as detectron2 saves it, plain or with the FreqFusion release's pixel decoder; ours is transformers'."""

import math
from functools import cache
from typing import Any

from torch import Tensor, nn

from freqfusion._optional import require
from freqfusion.data import class_names
from freqfusion.fusion.freqfusion import OffsetGenerator
from freqfusion.upgrade import Upgrade, upgrade_
from freqfusion.weights.backbones import STAGES, Rows, swin_rows
from freqfusion.weights.fill import Renaming, reason_for
from freqfusion.zoo.official.base import Family, Plan, Shapes, fusion_options

PIXEL_DECODER = "sem_seg_head.pixel_decoder."
PREDICTOR = "sem_seg_head.predictor."
ENCODER = "model.pixel_level_module.encoder."
DECODER = "model.pixel_level_module.decoder."
TRANSFORMER = "model.transformer_module."
SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "Swin-T",
    (96, (2, 2, 18, 2)): "Swin-S",
    (128, (2, 2, 18, 2)): "Swin-B",
    (192, (2, 2, 18, 2)): "Swin-L",
}
"""By width of the first stage and depths."""
POINTS_OF_FUSION = ("in_16", "in_8", "out_4")
"""Slots of the upgraded pixel decoder, in the order of the release's ``freqfusions``."""
CLASSES = {
    150: class_names.ADE20K,
    133: class_names.COCO_PANOPTIC,
    80: class_names.COCO_THINGS,
    19: class_names.CITYSCAPES,
}
DROP_PATH = 0.3
"""Rate of stochastic depth in all published Swin configurations."""
FUSIONS = PIXEL_DECODER + "freqfusions."
RELEASED = {"hamming_window": False, "feature_resample_norm": False}
"""What the upgrade sets the fusions to, where FreqFusion has another default."""
POINTS = 4
"""That a head of the deformable attention samples on a level."""

UNNEEDED = {
    r".+\.relative_position_index": "positions in a window, which follow from its size",
    r".+\.init_pos": "sub-pixel positions, which follow from the sizes",
    r".+\.num_batches_tracked": "counts of training steps, without effect",
    r"pixel_(mean|std)": "mean and deviation of the images, which are normalised before",
}
NOT_OFFICIAL = {
    r".+\.num_batches_tracked": "the official backbone's batch norm is frozen and counts nothing",
    r".+\.encoder\.swin\.layernorm\..+": "after the last stage, where a backbone has no use for it",
}
KEPT = {
    **NOT_OFFICIAL,
    r".+\.relative_position_index": UNNEEDED[r".+\.relative_position_index"],
    r"criterion\.empty_weight": "a constant, which a file for inference may lack",
}


def _backbone_rows(old_swin: bool) -> Rows:
    """Renaming of a Swin, for transformers 5 or earlier."""
    return {
        f"backbone.{official}": tuple(ENCODER + own for own in ((owns,) if isinstance(owns, str) else owns))
        for official, owns in swin_rows(old_swin).items()
    }


def _resnet_rows() -> Rows:
    parts = {"backbone.stem.conv1.": ENCODER + "embedder.embedder."}
    for i in range(4):
        unit, own_unit = f"backbone.res{i + 2}.{{}}.", f"{ENCODER}encoder.stages.{i}.layers.{{}}."
        parts[unit + "shortcut."] = own_unit + "shortcut."
        for j in range(3):
            parts[f"{unit}conv{j + 1}."] = f"{own_unit}layer.{j}."
    norms: Rows = {part + "norm.{}": own + "normalization.{}" for part, own in parts.items()}
    return norms | {part + "{}": own + "convolution.{}" for part, own in parts.items()}


def _pixel_decoder_rows() -> Rows:
    layer, own_layer = PIXEL_DECODER + "transformer.encoder.layers.{}.", DECODER + "encoder.layers.{}."
    rows: Rows = {
        PIXEL_DECODER + "input_proj.": DECODER + "input_projections.",
        PIXEL_DECODER + "transformer.level_embed": DECODER + "level_embed",
        PIXEL_DECODER + "mask_features.": DECODER + "mask_projection.",
        layer + "self_attn.": own_layer + "self_attn.",
        layer + "norm1.": own_layer + "self_attn_layer_norm.",
        layer + "norm2.": own_layer + "final_layer_norm.",
        layer + "linear{}.": own_layer + "fc{}.",
    }
    for name in ("adapter", "layer"):
        rows[PIXEL_DECODER + name + "_{}.norm.{}"] = DECODER + name + "_{}.1.{}"
        rows[PIXEL_DECODER + name + "_{}.{}"] = DECODER + name + "_{}.0.{}"
    for i, point in enumerate(POINTS_OF_FUSION):
        rows[f"{PIXEL_DECODER}freqfusions.{i}."] = f"{DECODER}fusions.{point}.fusion."
    return rows


def _predictor_rows() -> Rows:
    layer = TRANSFORMER + "decoder.layers.{}."
    self_attention = PREDICTOR + "transformer_self_attention_layers.{}."
    cross_attention = PREDICTOR + "transformer_cross_attention_layers.{}."
    feedforward = PREDICTOR + "transformer_ffn_layers.{}."
    return {
        self_attention + "self_attn.in_proj_{}": tuple(layer + f"self_attn.{x}_proj." + "{}" for x in "qkv"),
        self_attention + "self_attn.out_proj.": layer + "self_attn.out_proj.",
        self_attention + "norm.": layer + "self_attn_layer_norm.",
        cross_attention + "multihead_attn.": layer + "cross_attn.",
        cross_attention + "norm.": layer + "cross_attn_layer_norm.",
        feedforward + "linear{}.": layer + "fc{}.",
        feedforward + "norm.": layer + "final_layer_norm.",
        PREDICTOR + "decoder_norm.": TRANSFORMER + "decoder.layernorm.",
        PREDICTOR + "query_feat.": TRANSFORMER + "queries_features.",
        PREDICTOR + "query_embed.": TRANSFORMER + "queries_embedder.",
        PREDICTOR + "level_embed.": TRANSFORMER + "level_embed.",
        PREDICTOR + "mask_embed.layers.{}.{}": TRANSFORMER + "decoder.mask_predictor.mask_embedder.{}.0.{}",
        PREDICTOR + "class_embed.": "class_predictor.",
        "criterion.empty_weight": "criterion.empty_weight",
    }


@cache
def _names(old_swin: bool) -> Renaming:
    return Renaming(_backbone_rows(old_swin) | _resnet_rows() | _pixel_decoder_rows() | _predictor_rows())


def _names_of(model: nn.Module) -> Renaming:
    return _names(any(".attention.self.query." in key for key in model.state_dict()))


def _current(key: str) -> str:
    """The present name of a key of Mask2Former's first version, which its code still reads."""
    if key.startswith("sem_seg_head.") and not key.startswith((PIXEL_DECODER, PREDICTOR)):
        return key.replace("sem_seg_head.", PIXEL_DECODER, 1)
    return key.replace("static_query", "query_feat")


def _recognises(shapes: Shapes) -> bool:
    keys = set(map(_current, shapes))
    return {PREDICTOR + "query_feat.weight", PIXEL_DECODER + "transformer.level_embed"} <= keys


def _plan(shapes: Shapes) -> Plan:
    transformers = require("transformers", "hosts")
    shapes = Shapes({_current(key): shape for key, shape in shapes.items()})
    backbone, backbone_config = _backbone(shapes)
    classes = shapes[PREDICTOR + "class_embed.weight"][0] - 1  # the last is "no object"
    queries, width = shapes[PREDICTOR + "query_feat.weight"]
    levels, feature_size = shapes[PIXEL_DECODER + "transformer.level_embed"]
    layer = PIXEL_DECODER + "transformer.encoder.layers."
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config,
        num_labels=classes,
        num_queries=queries,
        feature_size=feature_size,
        mask_feature_size=shapes[PIXEL_DECODER + "mask_features.weight"][0],
        hidden_dim=width,
        encoder_layers=shapes.count(layer),
        encoder_feedforward_dim=shapes[layer + "0.linear1.weight"][0],
        decoder_layers=shapes.count(PREDICTOR + "transformer_ffn_layers.") + 1,  # one more set of predictions
        dim_feedforward=shapes[PREDICTOR + "transformer_ffn_layers.0.linear1.weight"][0],
        num_attention_heads=shapes[layer + "0.self_attn.attention_weights.weight"][0] // (levels * POINTS),
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    fused = [point for i, point in enumerate(POINTS_OF_FUSION) if shapes.count(f"{FUSIONS}{i}.")]
    if fused:
        usual = {**RELEASED, "compressed_channels": feature_size // 4}
        found = fusion_options(shapes, f"{FUSIONS}{POINTS_OF_FUSION.index(fused[0])}.", usual)
        upgrade_(
            model,
            "freqfusion",
            filter_fn=lambda site: site.path.rpartition(".")[2] in fused,
            init="paper",
            verify=False,
            **found,
        )
    decoder = "FreqFusion" if fused else "plain"
    names = _names_of(model)
    return Plan(
        f"Mask2Former, {backbone} backbone, {decoder} pixel decoder, {classes} classes, {queries} queries",
        model,
        lambda key: names.own_keys(_current(key)),
        UNNEEDED,
        KEPT,
        CLASSES.get(classes),
    )


def _backbone(shapes: Shapes) -> tuple[str, Any]:
    """Name and configuration."""
    transformers = require("transformers", "hosts")
    if "backbone.stem.conv1.weight" in shapes:
        stages = [f"backbone.res{i}." for i in range(2, 6)]
        depths = [shapes.count(stage) for stage in stages]
        layers = 3 if "backbone.res2.0.conv3.weight" in shapes else 2
        config = transformers.ResNetConfig(
            embedding_size=shapes["backbone.stem.conv1.weight"][0],
            hidden_sizes=[shapes[f"{stage}0.conv{layers}.weight"][0] for stage in stages],
            layer_type="bottleneck" if layers == 3 else "basic",
            depths=depths,
            out_features=STAGES,
        )
        return f"ResNet-{layers * sum(depths) + 2}", config
    width, _, patch, _ = shapes["backbone.patch_embed.proj.weight"]
    stages = [f"backbone.layers.{i}.blocks." for i in range(shapes.count("backbone.layers."))]
    depths = [shapes.count(stage) for stage in stages]
    tables = [shapes[stage + "0.attn.relative_position_bias_table"] for stage in stages]
    config = transformers.SwinConfig(
        embed_dim=width,
        patch_size=patch,
        depths=depths,
        num_heads=[heads for _, heads in tables],
        mlp_ratio=shapes[stages[0] + "0.mlp.fc1.weight"][0] / width,
        qkv_bias=stages[0] + "0.attn.qkv.bias" in shapes,
        window_size=(math.isqrt(tables[0][0]) + 1) // 2,  # offsets from -(w - 1) to w - 1 on both sides
        drop_path_rate=DROP_PATH,
        out_features=STAGES,
    )
    return SWINS.get((width, tuple(depths)), f"Swin (width {width}, depths {depths})"), config


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under detectron2's names of a Mask2Former, for the original code or the FreqFusion release.

    Args:
        model: transformers' ``Mask2FormerForUniversalSegmentation`` with a ResNet or Swin backbone; plain, or
            upgraded with ``"freqfusion"`` and ``init="paper"``.

    Returns:
        Every entry that their models have, on the model's device. Tensors that are the same in both share memory.

    Raises:
        ValueError: for another model or another upgrade.
    """
    upgrade: Upgrade | None = getattr(model, "freqfusion_upgrade", None)
    released = ("freqfusion", "paper", len(POINTS_OF_FUSION))
    if upgrade is not None and (upgrade.fusion, upgrade.init, len(upgrade.sites)) != released:
        raise ValueError(
            f"the release's pixel decoder has FreqFusion at its three points and no gates; this model has "
            f"{upgrade.fusion!r} at {len(upgrade.sites)} with init={upgrade.init!r}"
        )
    state = {key: value for key, value in model.state_dict().items() if not reason_for(key, NOT_OFFICIAL)}
    for name, buffer in model.named_buffers():
        if name.endswith(".relative_position_index"):
            side = math.isqrt(buffer.numel())
            state[name] = buffer.view(side, side)
    for name, module in model.named_modules():
        if isinstance(module, OffsetGenerator):
            state[f"{name}.init_pos"] = _initial_positions(module)
    return _names_of(model).official_state(state)


def _initial_positions(sampler: OffsetGenerator) -> Tensor:
    """Where the 2 x 2 sub-pixels of a coarse pixel lie: x for every group, then y; ``(1, 8 * groups, 1, 1)``."""
    x, y = [-0.25, 0.25, -0.25, 0.25], [-0.25, -0.25, 0.25, 0.25]
    return sampler.offset.weight.new_tensor(sampler.groups * x + sampler.groups * y).view(1, -1, 1, 1)


FAMILY = Family(
    "Mask2Former with ResNet-50, ResNet-101 or Swin-T, S, B, L, plain or FreqFusion pixel decoder (detectron2)",
    _recognises,
    _plan,
)
