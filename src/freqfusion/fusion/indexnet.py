"""IndexNet: upsampling weighted by index maps predicted from the fine map."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.ops._checks import checked_options
from freqfusion.ops.resize import crop, resize, shuffle

Kind = Literal["holistic", "depthwise_o2o", "depthwise_m2o"]


class IndexNet(Fusion):
    """Nearest upsampling of the coarse map times a map in (0, 1) predicted from the fine map, which passes.

    The index map is a sigmoid and not normalised, so the result is about half the coarse map at the start.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map; the depthwise kinds need them equal.
        kind: ``"holistic"``: one map for all channels; ``"depthwise_o2o"``, ``"depthwise_m2o"``: one a
            channel, predicted from that channel or from all.
        use_nonlinear: a second convolution after batch norm and ReLU6; otherwise one convolution.
        use_context: kernels of 4 x 4 rather than 2 x 2.

    Raises:
        ValueError: for an unknown kind, or unequal channels of a depthwise kind.

    Source: Lu et al., "Indices Matter: Learning to Index for Deep Image Matting", ICCV 2019; the
    holistic non-linear block with context is the variant whose size the upsampling papers report.
    """

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        kind: Kind = "holistic",
        use_nonlinear: bool = True,
        use_context: bool = True,
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
        self.holistic = kind == "holistic"
        if not self.holistic and hr_channels != lr_channels:
            raise ValueError(
                f"kind={kind!r} predicts one map per channel and needs hr_channels == lr_channels, got "
                f'{hr_channels} and {lr_channels}; use kind="holistic"'
            )

        def block(width: int, out_channels: int, groups: int = 1) -> nn.Sequential:
            size, padding = (4, 1) if use_context else (2, 0)
            first = width if use_nonlinear else out_channels
            layers: list[nn.Module] = [
                nn.Conv2d(hr_channels, first, size, stride=2, padding=padding, groups=groups, bias=False)
            ]
            if use_nonlinear:
                layers += [nn.BatchNorm2d(width), nn.ReLU6()]
                layers.append(nn.Conv2d(width, out_channels, 1, groups=groups, bias=False))
            return nn.Sequential(*layers)

        if self.holistic:
            # the authors' linear block is the bare convolution
            whole = block(2 * hr_channels, 4)
            self.indexnet = whole if use_nonlinear else whole[0]
        else:
            groups = hr_channels if kind == "depthwise_o2o" else 1
            for number in range(1, 5):
                setattr(self, f"indexnet{number}", block(hr_channels, hr_channels, groups))

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        height, width = hr_feat.shape[-2:]
        guide = F.pad(hr_feat, (0, width % 2, 0, height % 2))  # so that x2 covers an odd side
        if self.holistic:
            index = self.indexnet(guide)
        else:
            maps = [self.get_submodule(f"indexnet{number}")(guide) for number in range(1, 5)]
            index = torch.stack(maps, dim=2).flatten(1, 2)
        index = crop(shuffle(index.sigmoid(), 2), (height, width))
        return FusedFeatures(None, hr_feat, index * resize(lr_feat, (height, width), "nearest"))
