"""Published schedules: AdamW's parameter groups and the learning rate of each step.

Source of SegNeXt's constants: the released SegNeXt and FreqFusion configurations (AdamW 6e-5, betas 0.9/0.999,
weight decay 0.01, head x10, no decay on normalisation layers, poly of power 1 with 1,500 steps of warm-up).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from freqfusion.models.library import HostSegmenter

NORMALISATION = (
    nn.modules.batchnorm._BatchNorm,  # and so InstanceNorm and SyncBatchNorm, its subclasses
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def parameter_groups(
    network: nn.Module, lr: float, weight_decay: float, head_lr_factor: float
) -> list[dict[str, Any]]:
    """Split trainable parameters by learning rate (of the backbone or not) and weight decay (or none).

    A network of this package has its head below ``decode_head``; models of other libraries say which parameters are
    their backbone's (:class:`~freqfusion.models.library.HostSegmenter`).

    Weights and biases of normalisation layers are not decayed, and neither are the embeddings and tables of positions
    that another library's model names; everything else is, biases included. The published SegNeXt configuration
    selects by name (``"norm"`` in it), which misses the normalisation layers that its stem and head hold in a
    ``Sequential``; here the layer's type decides.

    Returns:
        Groups for ``torch.optim.AdamW``, each with ``name``, ``params``, ``lr`` and ``weight_decay``; empty
        groups are left out.
    """
    groups: dict[str, dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    host = network if isinstance(network, HostSegmenter) else None
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            full = f"{path}.{name}" if path else name
            head = not host.is_backbone(full) if host else path.partition(".")[0] == "decode_head"
            decayed = not isinstance(module, NORMALISATION) and not (host and host.no_weight_decay(full))
            group_name = ("head" if head else "backbone") + ("" if decayed else "_norm")
            group = groups.setdefault(
                group_name,
                {
                    "name": group_name,
                    "params": [],
                    "lr": lr * (head_lr_factor if head else 1.0),
                    "weight_decay": weight_decay if decayed else 0.0,
                },
            )
            group["params"].append(parameter)
    return list(groups.values())


def adamw_with_schedule(
    network: nn.Module,
    total_steps: int,
    *,
    lr: float,
    head_lr_factor: float,
    betas: tuple[float, float],
    weight_decay: float,
    poly_power: float,
    warmup_steps: int,
    warmup_ratio: float,
    milestones: Sequence[float] = (),
) -> OptimizerLRSchedulerConfig:
    """AdamW on :func:`parameter_groups`, and its schedule for each optimiser step, as Lightning takes them.

    Args:
        network: whose trainable parameters are optimised.
        total_steps: length of the run.
        lr: peak learning rate of the backbone.
        head_lr_factor: that of the rest, relative to it.
        betas: decay rates of the two moments.
        weight_decay: of parameters that are decayed.
        poly_power: of the decay to zero.
        warmup_steps: of linear warm-up.
        warmup_ratio: share of the learning rate at its first step.
        milestones: shares of the run after which the learning rate falls to a tenth, in place of the decay.
    """
    groups = parameter_groups(network, lr, weight_decay, head_lr_factor)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas)
    if milestones:
        steps = [round(share * total_steps) for share in milestones]
        factor = steps_with_warmup(steps, 0.1, warmup_steps, warmup_ratio)
    else:
        factor = poly_with_warmup(total_steps, poly_power, warmup_steps, warmup_ratio)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def poly_with_warmup(
    total_steps: int, power: float = 1.0, warmup_steps: int = 1500, warmup_ratio: float = 1e-6
) -> Callable[[int], float]:
    """The factor on the base learning rate at each optimiser step, counted from 0.

    ``(1 - step / total_steps) ** power``, times ``ratio + (1 - ratio) * step / warmup_steps`` during the
    warm-up (the poly decay runs on beneath the warm-up, as in the published runs).

    >>> factor = poly_with_warmup(total_steps=100, warmup_steps=10, warmup_ratio=0.1)
    >>> [round(factor(step), 3) for step in (0, 5, 10, 50, 100)]
    [0.1, 0.522, 0.9, 0.5, 0.0]
    """

    def factor(step: int) -> float:
        poly = max(0.0, 1 - step / total_steps) ** power
        if step >= warmup_steps:
            return poly
        return poly * (warmup_ratio + (1 - warmup_ratio) * step / warmup_steps)

    return factor


def steps_with_warmup(
    milestones: Sequence[int], gamma: float = 0.1, warmup_steps: int = 500, warmup_ratio: float = 1e-3
) -> Callable[[int], float]:
    """The factor on the base learning rate at each optimiser step, counted from 0, of the detectors' schedule.

    ``gamma`` to the power of the number of milestones reached, times ``ratio + (1 - ratio) * step / warmup_steps``
    during the warm-up (mmdetection's ``schedule_1x``).

    >>> factor = steps_with_warmup([60, 80], warmup_steps=10, warmup_ratio=0.0)
    >>> [round(factor(step), 4) for step in (0, 5, 10, 59, 60, 80)]
    [0.0, 0.5, 1.0, 1.0, 0.1, 0.01]
    """

    def factor(step: int) -> float:
        reached: float = gamma ** sum(step >= milestone for milestone in milestones)
        if step >= warmup_steps:
            return reached
        return reached * (warmup_ratio + (1 - warmup_ratio) * step / warmup_steps)

    return factor
