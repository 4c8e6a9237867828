"""DySample: upsampling by learned sampling positions."""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from freqfusion.fusion.base import FusedFeatures, Fusion, convolution
from freqfusion.ops import resample
from freqfusion.ops._checks import check_groups, checked_options
from freqfusion.ops.resize import resize, shuffle

Style = Literal["lp", "pl"]


class DySample(Fusion):
    """Samples the coarse map bilinearly at predicted positions; the fine map passes unchanged.

    With zero offsets this is bilinear upsampling, from which training starts. The variants of the paper:
    DySample (``"lp"``, 4 groups), DySample-S (``"pl"``, 8 groups), each with ``dyscope=True`` for the ``+``.
    The authors' constant ``init_pos`` is accepted in a state dict and dropped.

    Args:
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        scale: sub-pixels per side that a coarse pixel predicts offsets for; at another ratio of the two maps the
            nearest sub-pixel's offset serves.
        style: ``"lp"``: predict at the coarse resolution, then pixel shuffle; ``"pl"``: the other way round.
        groups: groups of channels that move together; must divide ``lr_channels``.
        dyscope: predict the offsets' magnitude too.
        scope_bias: whether that prediction has a bias, as in the authors' detection code.

    Raises:
        ValueError: for an unknown style or channels that do not divide.

    Source: Liu et al., "Learning to Upsample by Learning to Sample", ICCV 2023.
    """

    @checked_options
    def __init__(
        self,
        hr_channels: int,
        lr_channels: int,
        scale: int = 2,
        style: Style = "lp",
        groups: int = 4,
        dyscope: bool = False,
        scope_bias: bool = False,
    ) -> None:
        super().__init__(hr_channels, lr_channels)
        if style not in get_args(Style):
            raise ValueError(f'style must be "lp" or "pl", got {style!r}')
        check_groups("lr_feat (groups)", lr_channels, groups)
        dims, conv = self.spatial_dims, convolution(self.spatial_dims)
        subpixels = scale**dims
        if style == "pl" and lr_channels % subpixels:
            raise ValueError(
                f'style "pl" needs channels divisible by scale**{dims} = {subpixels}, got {lr_channels}; use "lp"'
            )
        self.scale = scale
        self.style = style
        self.groups = groups
        if style == "pl":
            in_channels, out_channels = lr_channels // subpixels, dims * groups
        else:
            in_channels, out_channels = lr_channels, dims * groups * subpixels
        self.offset = conv(in_channels, out_channels, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)
        self.scope = conv(in_channels, out_channels, 1, bias=scope_bias) if dyscope else None
        if self.scope is not None:
            nn.init.zeros_(self.scope.weight)
            if self.scope.bias is not None:
                nn.init.zeros_(self.scope.bias)

    def fuse(self, hr_feat: Tensor, lr_feat: Tensor) -> FusedFeatures:
        shuffled = shuffle(lr_feat, self.scale) if self.style == "pl" else lr_feat
        offsets = self.offset(shuffled)
        offsets = offsets * (0.25 if self.scope is None else 0.5 * self.scope(shuffled).sigmoid())
        if self.style == "lp":
            offsets = shuffle(offsets, self.scale)
        offsets = resize(offsets, hr_feat.shape[2:], "nearest")
        return FusedFeatures(None, hr_feat, resample(lr_feat, offsets, self.groups))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "init_pos", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DySample3d(DySample):
    """:class:`DySample` for volumes ``(B, C, D, H, W)``: trilinear samples, offsets along three axes.

    With zero offsets this is trilinear upsampling. Strides may differ by axis: along one without a stride the first
    of the ``scale`` offsets serves. Arguments as of :class:`DySample`; ``style="pl"`` needs channels divisible by
    ``scale**3``.

    Source: this package. The authors of DySample published no form for volumes.
    """

    spatial_dims = 3
