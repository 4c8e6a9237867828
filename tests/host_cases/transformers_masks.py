from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DetrConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
)

from host_cases import HostCase

STAGES = ["stage1", "stage2", "stage3", "stage4"]
ONES = [1, 1, 1, 1]
HEADS = {"num_attention_heads": 2, "hidden_dim": 32, "encoder_layers": 1, "dropout": 0.0}
FORWARD = {"encoder_feedforward_dim": 16, "dim_feedforward": 16, "num_queries": 4, "num_labels": 3}


def resnet() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 24], depths=ONES, layer_type="basic", out_features=STAGES
    )


def swin() -> SwinConfig:
    return SwinConfig(
        image_size=64, embed_dim=8, depths=ONES, num_heads=ONES, window_size=4, out_features=STAGES
    )


def mask2former() -> nn.Module:
    widths = {"feature_size": 32, "mask_feature_size": 16}
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin(), decoder_layers=2, **widths, **HEADS, **FORWARD)
    )


def oneformer() -> nn.Module:
    widths = {"conv_dim": 32, "mask_dim": 32, "task_seq_len": 6}  # conv_dim must be hidden_dim
    layers = {"decoder_layers": 3, "query_dec_layers": 1}
    return OneFormerForUniversalSegmentation(
        OneFormerConfig(backbone_config=resnet(), **widths, **layers, **HEADS, **FORWARD)
    )


def maskformer() -> nn.Module:
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    decoder = DetrConfig(
        d_model=32, num_queries=4, encoder_layers=1, decoder_layers=1, dropout=0.0, **ffn, **heads
    )
    return MaskFormerForInstanceSegmentation(
        MaskFormerConfig(
            backbone_config=resnet(),
            decoder_config=decoder,
            fpn_feature_size=32,
            mask_feature_size=16,
            num_labels=3,
        )
    )


def call_with_task(model: nn.Module, image: Tensor) -> Any:
    return model(image, task_inputs=torch.arange(6.0).expand(len(image), 6))


DECODER = "model.pixel_level_module.decoder"
CASES = [
    HostCase(
        "Mask2FormerForUniversalSegmentation",
        mask2former,
        compiles=DECODER,
        pickles=False,
        sites=3,
    ),
    HostCase("OneFormerForUniversalSegmentation", oneformer, call_with_task, compiles=DECODER),
    HostCase("MaskFormerForInstanceSegmentation", maskformer, compiles=DECODER, sites=3),
]
