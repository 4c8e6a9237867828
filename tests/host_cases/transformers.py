from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    ConvNextConfig,
    Data2VecVisionConfig,
    Data2VecVisionForSemanticSegmentation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DFineConfig,
    DFineForObjectDetection,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    HGNetV2Config,
    PromptDepthAnythingConfig,
    PromptDepthAnythingForDepthEstimation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)

from host_cases import HostCase

INIT = {"initializer_range": 0.2}  # so that random features do not vanish
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, **INIT}
PATCHES = {"patch_size": 8, "image_size": 64}
STAGES = ["stage2", "stage3", "stage4"]
NECK = {"neck_hidden_sizes": [8, 8, 16], "reassemble_factors": [2, 1, 0.5], "fusion_hidden_size": 16, **INIT}


def upernet(backbone: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "pool_scales": [1, 2], "num_labels": 4}
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone, use_auxiliary_head=False, **sizes, **INIT)
    )


def convnext() -> ConvNextConfig:
    return ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1], out_features=STAGES, **INIT)


def dinov2(**options: Any) -> Dinov2Config:
    return Dinov2Config(**VIT, **PATCHES, mlp_ratio=1, out_features=STAGES, **options)


def tokens() -> Dinov2Config:
    return dinov2(reshape_hidden_states=False)


def beit(model: type[nn.Module], config: type[Any]) -> nn.Module:
    options = {"out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 8, "num_labels": 4}
    return model(config(**VIT, **PATCHES, **options))


def segformer() -> nn.Module:
    sizes = {"hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16, "num_labels": 4}
    ones = {key: [1, 1, 1, 1] for key in ("depths", "num_attention_heads", "mlp_ratios")}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **ones, **INIT))


def dpt_depth() -> nn.Module:
    return DPTForDepthEstimation(DPTConfig(backbone_config=tokens(), **NECK))


def dpt_semantic() -> nn.Module:
    config = DPTConfig(**(VIT | PATCHES | NECK), backbone_out_indices=[1, 2, 3], num_labels=4)
    return DPTForSemanticSegmentation(config)


def depth_anything(model: type[nn.Module], config: type[Any]) -> nn.Module:
    sizes = {"patch_size": 8, "reassemble_hidden_size": 16, "head_hidden_size": 8}
    return model(config(backbone_config=tokens(), **sizes, **NECK))


def zoedepth() -> nn.Module:
    names = ["stage1", *STAGES]  # its head takes four levels and no other number
    backbone = BeitConfig(**VIT, **PATCHES, out_features=names, reshape_hidden_states=False)
    neck = NECK | {"neck_hidden_sizes": [8, 8, 16, 16], "reassemble_factors": [4, 2, 1, 0.5]}
    sizes = {"num_relative_features": 8, "bottleneck_features": 16, "bin_embedding_dim": 8}
    bins = {"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}
    config = ZoeDepthConfig(
        backbone_config=backbone, num_attractors=[4, 4, 2, 1], bin_configurations=[bins], **sizes, **neck
    )
    return ZoeDepthForDepthEstimation(config)


FIXED: dict[str, Any] = {"size": (64, 64), "odd_size": None, "limit": "is invalid for input"}
"""Of a host that takes the configured size alone."""


@torch.no_grad()
def sizes_of_beit() -> dict[str, Any]:
    """It takes any size in newer transformers; in 5.0 and before the configured one alone."""
    try:
        beit(BeitForSemanticSegmentation, BeitConfig).eval()(torch.zeros(1, 3, 64, 96))
    except RuntimeError:
        return FIXED
    return {}


def hybrid() -> dict[str, Any]:
    """Options of RT-DETR's relatives."""
    widths = {"encoder_hidden_dim": 16, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 2}
    channels = {"encoder_in_channels": [8, 16, 24], "decoder_in_channels": [16, 16, 16]}
    return {**widths, **heads, **channels, "num_queries": 5, "num_denoising": 0, "num_labels": 3, **INIT}


def rt_detr(model: type[nn.Module], config: type[Any]) -> nn.Module:
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=STAGES,
    )
    return model(config(backbone_config=backbone, **hybrid()))


def d_fine() -> nn.Module:
    ones = {f"stage_{key}": [1, 1, 1, 1] for key in ("num_blocks", "numb_of_layers")}
    backbone = HGNetV2Config(
        hidden_sizes=[8, 8, 16, 24],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 16, 24],
        out_features=STAGES,
        **ones,
    )
    return DFineForObjectDetection(DFineConfig(backbone_config=backbone, depth_mult=0.34, **hybrid()))


def call_with_prompt(model: nn.Module, image: Tensor) -> Any:
    return model(image, prompt_depth=image[:, :1, ::4, ::4])


CASES = [
    HostCase(
        "UperNetForSemanticSegmentation",
        lambda: upernet(convnext()),
        compiles="decode_head",
        pickles=False,
        sites=2,
    ),
    HostCase(
        "BeitForSemanticSegmentation",
        lambda: beit(BeitForSemanticSegmentation, BeitConfig),
        **sizes_of_beit(),
        compiles="decode_head",
        sites=3,
    ),
    HostCase(
        "Data2VecVisionForSemanticSegmentation",
        lambda: beit(Data2VecVisionForSemanticSegmentation, Data2VecVisionConfig),
        **FIXED,
        compiles="decode_head",
        sites=3,
    ),
    HostCase("SegformerForSemanticSegmentation", segformer, sites=3),
    HostCase("DPTForDepthEstimation", dpt_depth, compiles="neck", pickles=False, sites=2),
    HostCase(
        "DPTForSemanticSegmentation", dpt_semantic, size=(64, 64), odd_size=(61, 61), compiles="neck", sites=2
    ),
    HostCase("ZoeDepthForDepthEstimation", zoedepth, compiles="neck", pickles=False, sites=3),
    HostCase(
        "DepthAnythingForDepthEstimation",
        lambda: depth_anything(DepthAnythingForDepthEstimation, DepthAnythingConfig),
        compiles="neck",
        pickles=False,
        sites=2,
    ),
    HostCase(
        "PromptDepthAnythingForDepthEstimation",
        lambda: depth_anything(PromptDepthAnythingForDepthEstimation, PromptDepthAnythingConfig),
        call_with_prompt,
        compiles="neck",
        pickles=False,
        sites=2,
    ),
    HostCase(
        "RTDetrForObjectDetection",
        lambda: rt_detr(RTDetrForObjectDetection, RTDetrConfig),
        odd_size=None,
        limit="Sizes of tensors must match",
        compiles="model.encoder.fpn_blocks.0",
        sites=2,
    ),
    HostCase(
        "RTDetrV2ForObjectDetection",
        lambda: rt_detr(RTDetrV2ForObjectDetection, RTDetrV2Config),
        odd_size=None,
        limit="Sizes of tensors must match",
        compiles="model.encoder.fpn_blocks.0",
        sites=2,
    ),
    HostCase(
        "DFineForObjectDetection",
        d_fine,
        odd_size=None,
        limit="Sizes of tensors must match",
        compiles="model.encoder.fpn_blocks.0",
        sites=2,
    ),
]
