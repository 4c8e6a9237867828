"""nnU-Net v2: the decoders of its U-Nets (package ``dynamic_network_architectures``), for images and volumes.

They upsample by transposed convolutions with the strides of the plan; :mod:`freqfusion.upgrade.learned` says what
becomes of those. ``TRAINERS`` is the folder with ``nnUNetTrainerFreqFusion``, for nnU-Net's variable
``nnUNet_extTrainer``::

    export nnUNet_extTrainer=$(python -m freqfusion.upgrade.hosts.nnunet)
    nnUNetv2_train DATASET 3d_fullres FOLD -tr nnUNetTrainerFreqFusion
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__" and find_spec("dynamic_network_architectures") is None:
    raise SystemExit("nnU-Net is not installed in this environment. Run: python -m pip install nnunetv2")

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.building_blocks.unet_residual_decoder import UNetResDecoder
from torch import Tensor, nn

from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host
from freqfusion.upgrade.learned import averaged, fitted

TRAINERS = Path(__file__).parent / "nnunet_trainers"


def _points(module: Any) -> list[FusionPoint]:
    points = []
    for i, conv in enumerate(module.transpconvs):
        dims = len(conv.stride)
        skipped = ""
        if not isinstance(conv, nn.ConvTranspose2d | nn.ConvTranspose3d):
            skipped = f"fusions are for 2D and 3D, this is a {type(conv).__name__}"
        elif set(conv.stride) == {1}:
            skipped = "both maps have the same size"
        channels = conv.out_channels
        points.append(FusionPoint(str(i), channels, channels, "learned", skipped=skipped, spatial_dims=dims))
    return points


def _example(module: Any) -> tuple[list[Tensor]]:
    dims = len(module.transpconvs[0].stride)
    sizes = [torch.tensor([1] * (dims - 1) + [2])]  # as small as norms take: plans enlarge up to 128 times
    for conv in module.transpconvs:
        sizes.append(sizes[-1] * torch.tensor(conv.stride))
    channels = [module.transpconvs[0].in_channels, *(conv.out_channels for conv in module.transpconvs)]
    maps = [torch.randn(1, width, *size.tolist()) for width, size in zip(channels, sizes, strict=True)]
    return (maps[::-1],)


def _forward(module: Any, skips: list[Tensor]) -> Tensor | list[Tensor]:
    """As the host's, finest scores first; with ``deep_supervision`` those of all levels."""
    x, scores = skips[-1], []
    for i, (up, stage, head) in enumerate(
        zip(module.transpconvs, module.stages, module.seg_layers, strict=True)
    ):
        fine, enlarged = skips[-(i + 2)], up(x)
        coarse = averaged(enlarged, x.shape[2:])
        fine, x = module.fusions[str(i)](fine, coarse, partial(fitted, enlarged, fine.shape[2:]))
        x = stage(torch.cat((x, fine), dim=1))
        if module.deep_supervision or i == len(module.stages) - 1:
            scores.append(head(x))
    return scores[::-1] if module.deep_supervision else scores[0]


@register_host
class UpgradedUNetDecoder(Upgraded, UNetDecoder):
    """``fusions.i`` joins what ``transpconvs[i]`` upsamples with the encoder's map, in PlainConvUNet and others."""

    points = staticmethod(_points)
    example = staticmethod(_example)
    forward = _forward


@register_host
class UpgradedUNetResDecoder(Upgraded, UNetResDecoder):
    """``fusions.i`` joins what ``transpconvs[i]`` upsamples with the encoder's map, in ResidualUNet."""

    points = staticmethod(_points)
    example = staticmethod(_example)
    forward = _forward


if __name__ == "__main__":
    print(TRAINERS)
