"""Published schedules: the optimizer's parameter groups and the learning rate of each step.

Source of SegNeXt's constants: the released SegNeXt and FreqFusion configurations (AdamW 6e-4, backbone 6e-5, betas
0.9/0.999, weight decay 0.01, no decay on normalisation layers, poly of power 1 with 1,500 steps of warm-up); of the
detectors': mmdetection's ``schedule_1x``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from freqfusion.fusion.base import Fusion
from freqfusion.models.base import Model

NORMALISATION = (
    nn.modules.batchnorm._BatchNorm,  # and so InstanceNorm and SyncBatchNorm, its subclasses
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
Settings = TypeVar("Settings")


def settings_in(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """A dataclass of settings from those of its fields that ``values`` has."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})  # type: ignore[arg-type]


def fusion_parameters(network: nn.Module) -> set[nn.Parameter]:
    """The parameters of all fusions in a network."""
    fusions = [module for module in network.modules() if isinstance(module, Fusion)]
    return {parameter for fusion in fusions for parameter in fusion.parameters()}


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW with learning rates of the backbone's and the fusions' own."""

    lr: float
    """Peak learning rate of all but the backbone and the fusions."""
    backbone_lr_factor: float
    """The backbone's learning rate relative to that."""
    betas: Sequence[float]
    """Decay rates of the two moments."""
    weight_decay: float
    """Weight decay of all but normalisation layers, embeddings and tables of positions."""
    fusion_lr_factor: float = 1.0
    """The fusions' learning rate relative to ``lr``."""

    def create(self, network: nn.Module) -> torch.optim.AdamW:
        """The optimizer of the trainable parameters of ``network``."""
        first, second = self.betas
        return torch.optim.AdamW(self.groups(network), lr=self.lr, betas=(first, second))

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Trainable parameters by learning rate (backbone, fusions, the rest) and weight decay (or none).

        Weights and biases of normalisation layers are not decayed, and neither are the embeddings and tables of
        positions that a network names; everything else is, biases included. The published SegNeXt configuration
        selects by name (``"norm"`` in it), which misses the normalisation layers that its stem and head hold in a
        ``Sequential``; here the layer's type decides.

        Returns:
            Groups for ``torch.optim.AdamW``, each with ``name``, ``params``, ``lr`` and ``weight_decay``; empty
            groups are left out.
        """
        groups: dict[str, dict[str, Any]] = {}
        seen: set[nn.Parameter] = set()
        of_fusions = fusion_parameters(network)
        factors = {"backbone": self.backbone_lr_factor, "fusion": self.fusion_lr_factor, "head": 1.0}
        for path, module in network.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad or parameter in seen:
                    continue
                seen.add(parameter)
                full = f"{path}.{name}" if path else name
                part = "fusion" if parameter in of_fusions else "head"
                if isinstance(network, Model) and network.is_backbone(full):
                    part = "backbone"
                kept = isinstance(network, Model) and network.no_weight_decay(full)
                decayed = not isinstance(module, NORMALISATION) and not kept
                group_name = part + ("" if decayed else "_norm")
                group = groups.setdefault(
                    group_name,
                    {
                        "name": group_name,
                        "params": [],
                        "lr": self.lr * factors[part],
                        "weight_decay": self.weight_decay if decayed else 0.0,
                    },
                )
                group["params"].append(parameter)
        return list(groups.values())


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate over a run."""

    warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    warmup_ratio: float = 1.0
    """Share of the learning rate at the first step of the warm-up."""
    poly_power: float = 0.0
    """Power of the decay to zero over the run."""
    milestones: Sequence[float] = ()
    """Shares of the run after which the learning rate is multiplied by ``gamma``, in place of the decay."""
    gamma: float = 0.1

    def factor(self, total_steps: float) -> Callable[[int], float]:
        """The factor on the peak learning rate at each optimiser step, counted from 0.

        ``(1 - step / total_steps) ** poly_power``, or with milestones ``gamma`` to the power of the number of those
        reached; times ``ratio + (1 - ratio) * step / warmup_steps`` during the warm-up (the decay runs on beneath it,
        as in the published runs).

        >>> factor = Schedule(warmup_steps=10, warmup_ratio=0.1, poly_power=1.0).factor(100)
        >>> [round(factor(step), 3) for step in (0, 5, 10, 50, 100)]
        [0.1, 0.522, 0.9, 0.5, 0.0]
        >>> factor = Schedule(milestones=(0.6, 0.8)).factor(100)
        >>> [round(factor(step), 4) for step in (0, 59, 60, 80)]
        [1.0, 1.0, 0.1, 0.01]
        """
        milestones = [round(share * total_steps) for share in self.milestones]

        def factor(step: int) -> float:
            value: float = self.gamma ** sum(step >= milestone for milestone in milestones)
            if not milestones:
                value = max(0.0, 1 - step / total_steps) ** self.poly_power
            if step < self.warmup_steps:
                value *= self.warmup_ratio + (1 - self.warmup_ratio) * step / self.warmup_steps
            return value

        return factor

    def apply(self, optimizer: torch.optim.Optimizer, total_steps: float) -> OptimizerLRSchedulerConfig:
        """The optimizer with this schedule for each of its steps, as Lightning takes them."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
