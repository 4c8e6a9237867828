"""Backbones of the detectors: a residual network, or any of timm, under a feature pyramid."""

from collections import OrderedDict
from typing import Any

import torchvision
from torch import Tensor, nn

from freqfusion.decoders import FPN
from freqfusion.models.encoders import RESNETS, TimmEncoder


class ResNetEncoder(nn.Module):
    """The four stages of a torchvision residual network; parameter names are torchvision's.

    Args:
        name: ``"resnet18"``, ``"resnet34"``, ``"resnet50"`` or ``"resnet101"``.
        frozen_stages: how many stages keep their weights and statistics in training, the stem counting as one
            with the first stage. The published detectors, which start from ImageNet, freeze 1.
        norm_eval: use the batch norms' running statistics in training and leave them as they are, as the published
            detectors do. For training from scratch leave it off.

    Raises:
        ValueError: for a number of stages outside 0 to 4.

    Source: He et al., CVPR 2016; stride in the 3x3 convolution, as torchvision has it and mmdetection's "pytorch"
    style.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, name: str, frozen_stages: int = 0, norm_eval: bool = False) -> None:
        super().__init__()
        if not 0 <= frozen_stages <= 4:
            raise ValueError(f"frozen_stages must be from 0 to 4, got {frozen_stages}")
        network: Any = torchvision.models.get_model(name, weights=None)
        for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(part, getattr(network, part))
        width = network.fc.in_features
        self.out_channels = (width // 8, width // 4, width // 2, width)
        self.name = name
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        for module in self._frozen():
            module.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        if not self.frozen_stages:
            return []
        stages = [self.get_submodule(f"layer{i + 1}") for i in range(self.frozen_stages)]
        return [self.get_submodule("conv1"), self.get_submodule("bn1"), *stages]

    def train(self, mode: bool = True) -> "ResNetEncoder":
        """As every module's, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self.modules() if self.norm_eval else []:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """``(B, 3, H, W)`` to maps ``(B, out_channels[i], H_i, W_i)`` at the strides 4, 8, 16 and 32."""
        x = image
        maps = []
        for name, module in self.named_children():
            x = module(x)
            if name.startswith("layer"):
                maps.append(x)
        return maps


class PyramidBackbone(nn.Module):
    """An encoder and a feature pyramid, as torchvision's detectors take them.

    Args:
        body: the encoder.
        fpn: the pyramid on the encoder's maps.
    """

    def __init__(self, body: nn.Module, fpn: FPN) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels = fpn.out_channels

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """``(B, 3, H, W)`` to pyramid levels ``"0"`` (finest), ``"1"``, ..., each ``(B, C, H_i, W_i)``."""
        return OrderedDict((str(i), x) for i, x in enumerate(self.fpn(self.body(images))))


def create_encoder(name: str, **options: Any) -> nn.Module:
    """An encoder with fresh weights by name.

    Args:
        name: ``"r18"``, ``"r34"``, ``"r50"``, ``"r101"``, or a network of timm with maps at the strides 4 to 32.
        **options: of :class:`ResNetEncoder`, or of ``timm.create_model``.

    Raises:
        ImportError: for a network of timm where timm is not installed.
        ValueError: for an unknown name or other strides.
    """
    if name in RESNETS:
        return ResNetEncoder(RESNETS[name], **options)
    encoder = TimmEncoder(name, options=options)
    if encoder.strides != ResNetEncoder.strides:
        raise ValueError(
            f"{name!r} gives maps at the strides {encoder.strides}, the detectors need {ResNetEncoder.strides}"
        )
    return encoder
