"""ultralytics: the necks of YOLO and RT-DETR, where an ``Upsample`` is followed by a ``Concat``.

ultralytics is under the AGPL-3.0, so freqfusion does not bring it. This file is imported when one of its models is
met.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from ultralytics.nn.modules.conv import Concat

from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.core import Upgrade, upgrade_, upgrade_again_
from freqfusion.upgrade.hosts import register_host
from freqfusion.upgrade.hosts.ultralytics_yaml import FusionUp, Transferred, register, transfer_weights

__all__ = ["FusionUp", "Transferred", "UpgradeTrainer", "UpgradedConcat", "register", "transfer_weights"]

_SIDE = 256  # of the image whose shapes are followed: a map of stride 128 has more than one pixel then


class _InNetwork(NamedTuple):
    """A ``Concat`` and what comes to it in its network."""

    coarse: int
    """Which of its inputs the layer ``enlarger`` made."""
    enlarger: Any
    channels: Sequence[int]
    """Channels of its inputs; empty if unknown."""
    problem: str = ""


@register_host
class UpgradedConcat(Upgraded, Concat):
    """Concatenation of a fine map and one that an ``nn.Upsample`` before it upsampled by copying pixels.

    ``fusions.i`` joins the two, where ``i`` is the number of the upsampled input: every second pixel of it
    is the coarse map. So all layers keep their places and the network its ``forward``. With all such sites upgraded,
    the sides of an image need not be multiples of the stride any more.
    """

    @staticmethod
    def context(module: Any, parent: nn.Module | None) -> _InNetwork:
        nothing = _InNetwork(-1, None, [])
        if not isinstance(parent, nn.Sequential) or not hasattr(module, "f"):
            return nothing  # not a layer of a network that ultralytics built
        layers = list(parent)
        before = [layers[source if source >= 0 else module.i + source] for source in module.f]
        for i, layer in enumerate(before):
            if isinstance(layer, (nn.Upsample, nn.ConvTranspose2d)):
                return _InNetwork(i, layer, *_input_channels(layers, module))
        return nothing

    @staticmethod
    def points(context: _InNetwork) -> list[FusionPoint]:
        if context.enlarger is None:
            return []
        problem = context.problem
        if isinstance(context.enlarger, nn.ConvTranspose2d):
            problem = "a layer of its own upsamples the coarse map with learned weights"
        elif context.enlarger.mode != "nearest" or context.enlarger.scale_factor != 2:
            problem = f"cannot recover the coarse map from {context.enlarger}"
        elif not problem and len(context.channels) != 2:
            problem = f"{len(context.channels)} maps are joined at once"
        if problem:
            return [FusionPoint(str(context.coarse), 0, 0, skipped=problem)]
        return [
            FusionPoint(
                str(context.coarse), context.channels[1 - context.coarse], context.channels[context.coarse]
            )
        ]

    @staticmethod
    def example(context: _InNetwork) -> tuple[Any, ...]:
        maps = [torch.randn(1, channels, 8, 12) for channels in context.channels]
        maps[context.coarse] = context.enlarger(maps[context.coarse][..., :4, :6])
        return (maps,)

    def forward(self, x: list[Tensor]) -> Tensor:
        ((name, fusion),) = self.fusions.items()
        coarse = int(name)
        enlarged, fine = x[coarse], x[1 - coarse]
        fine, enlarged = fusion(fine, enlarged[..., ::2, ::2])
        return torch.cat((fine, enlarged) if coarse else (enlarged, fine), dim=1)


def _input_channels(layers: Sequence[Any], concat: Any) -> tuple[list[int], str]:
    """Channels of the maps that come to a ``Concat``, or none and why.

    The layers before it are run on shapes alone, with tensors of the device "meta".
    """
    stem = next(module for module in layers[0].modules() if isinstance(module, nn.Conv2d))
    x: Any = torch.empty(1, stem.in_channels, _SIDE, _SIDE, dtype=stem.weight.dtype, device="meta")
    outputs: list[Any] = []
    for layer in layers:
        if isinstance(layer.f, int):
            inputs = x if layer.f == -1 else outputs[layer.f]
        else:
            inputs = [x if i == -1 else outputs[i] for i in layer.f]
        if layer is concat:
            break
        tensors = chain(layer.named_parameters(), layer.named_buffers())
        try:
            with torch.no_grad():
                if isinstance(layer, Concat):
                    x = torch.cat(inputs, dim=1)
                else:
                    x = functional_call(
                        layer, {name: tensor.to("meta") for name, tensor in tensors}, (inputs,)
                    )
        except Exception as error:
            return (
                [],
                f"the maps that come here are unknown, since layer {layer.i} ({layer.type}) says: {error}",
            )
        outputs.append(x)
    return [x.shape[1] for x in inputs], ""


class UpgradeTrainer:
    """Mix-in for a trainer of ultralytics, which otherwise builds the network anew and so loses an upgrade.

    ::

        from ultralytics import YOLO
        from ultralytics.models.yolo.detect import DetectionTrainer

        class Trainer(UpgradeTrainer, DetectionTrainer):
            fusion = "freqfusion"

        YOLO("yolo11n.pt").train(data="coco8.yaml", trainer=Trainer)

    If the network that training starts from is upgraded already, it is upgraded in the same way and keeps its trained
    fusions, whatever is set here.
    """

    fusion: str = "freqfusion"
    init: Literal["identity", "paper"] = "identity"
    options: Mapping[str, Any] = {}
    """Further arguments of the fusion method's constructor."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """The network as the trainer builds it, upgraded; see the trainer of ultralytics for the arguments."""
        model: nn.Module = super().get_model(cfg=cfg, weights=weights, verbose=verbose)  # type: ignore[misc]
        upgrade: Upgrade | None = getattr(weights, "freqfusion_upgrade", None)
        if upgrade is None:
            return upgrade_(model, self.fusion, init=self.init, **self.options)
        upgrade_again_(model, upgrade)
        model.load_state_dict(
            {key: value for key, value in weights.state_dict().items() if ".fusions." in key}, strict=False
        )
        return model
