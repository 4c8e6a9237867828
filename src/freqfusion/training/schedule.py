"""The published SegNeXt schedule: AdamW's parameter groups and the learning rate of each step.

Source of the constants: the released SegNeXt and FreqFusion configurations (AdamW 6e-5, betas 0.9/0.999,
weight decay 0.01, head x10, no decay on normalisation layers, poly of power 1 with 1,500 steps of warm-up).
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

NORMALISATION = (
    nn.modules.batchnorm._BatchNorm,  # and so InstanceNorm and SyncBatchNorm, its subclasses
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def parameter_groups(
    network: nn.Module, lr: float, weight_decay: float, head_lr_factor: float
) -> list[dict[str, Any]]:
    """Split trainable parameters by learning rate (below ``decode_head`` or not) and weight decay (or none).

    Weights and biases of normalisation layers are not decayed; everything else is, biases included. The
    published configuration selects by name (``"norm"`` in it), which misses the normalisation layers that
    its stem and head hold in a ``Sequential``; here the layer's type decides.

    Returns:
        Groups for ``torch.optim.AdamW``, each with ``name``, ``params``, ``lr`` and ``weight_decay``; empty
        groups are left out.
    """
    groups: dict[str, dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for path, module in network.named_modules():
        head = path.partition(".")[0] == "decode_head"
        decayed = not isinstance(module, NORMALISATION)
        name = ("head" if head else "backbone") + ("" if decayed else "_norm")
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            group = groups.setdefault(
                name,
                {
                    "name": name,
                    "params": [],
                    "lr": lr * (head_lr_factor if head else 1.0),
                    "weight_decay": weight_decay if decayed else 0.0,
                },
            )
            group["params"].append(parameter)
    return list(groups.values())


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
