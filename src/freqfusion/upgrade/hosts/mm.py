"""The mm libraries: fusion methods as types of mmengine's registry, and a neck.

Named in a config, this file makes them known::

    custom_imports = dict(imports=["freqfusion.upgrade.hosts.mm"])

``dict(type="CARAFE")``, ``dict(type="DySample+")`` and so on are for ``mmcv.cnn.build_upsample_layer``, that is the
``upsample_cfg`` of a host; :class:`FreqFusionFPN` is a neck in place of ``FPN`` or ``FPN_CARAFE``. mmengine and mmcv
(or mmcv-lite, for nothing here needs its compiled operators) are the user's own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from freqfusion.fusion import list_fusions
from freqfusion.fusion.catalog import class_name, create_fitting_fusion, is_guided
from freqfusion.fusion.single import SingleInput

TYPES = {class_name(name): name for name in list_fusions()}
"""The methods by their names in a config."""


def _layer_of_one(name: str) -> Callable[..., nn.Module]:
    def build(
        channels: int | None = None,
        scale_factor: int = 2,
        *,
        in_channels: int | None = None,
        out_channels: int | None = None,
        with_cp: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> nn.Module:
        """A layer of one input; with ``out_channels`` a 1x1 convolution, norm and activation follow.

        So it takes what ``FPN_CARAFE`` gives its upsamplers, and what ``UNet`` of mmseg does.
        """
        width = in_channels if channels is None else channels
        if width is None:
            raise TypeError(f"{name} needs channels or in_channels, the number of channels of its map")
        if with_cp:
            raise ValueError(f"{name} does not support with_cp=True")
        layer = SingleInput(name, width, scale_factor, **options)
        if out_channels is None:
            return layer
        return nn.Sequential(layer, ConvModule(width, out_channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg))

    return build


def _layer_of_two(name: str) -> Callable[..., nn.Module]:
    def build(
        channels: int | None = None,
        scale_factor: int = 2,
        *,
        hr_channels: int | None = None,
        lr_channels: int | None = None,
        **options: Any,
    ) -> nn.Module:
        """The fusion module, for a host that calls it with both maps, whose sizes count, not ``scale_factor``."""
        hr_channels = channels if hr_channels is None else hr_channels
        lr_channels = channels if lr_channels is None else lr_channels
        if hr_channels is None or lr_channels is None:
            raise TypeError(
                f"{name} needs hr_channels and lr_channels (or channels, for both), and a host that calls it with "
                f"the fine and the coarse map, such as FreqFusionFPN; got {', '.join(options) or 'neither'}"
            )
        return create_fitting_fusion(name, hr_channels, lr_channels, options)

    return build


for _type, _name in TYPES.items():
    MODELS.register_module(
        name=_type, module=_layer_of_two(_name) if is_guided(_name) else _layer_of_one(_name)
    )


@MODELS.register_module()
class FreqFusionFPN(BaseModule):
    """Feature pyramid whose top-down path is a fusion method; arguments of mmdet's ``FPN_CARAFE``.

    Parameters have the names of the neck in the released FreqFusion detectors, whose weights load.

    Args:
        in_channels: channels of the backbone's maps, fine to coarse.
        out_channels: channels of every level.
        num_outs: levels that come out. The first beyond the backbone's maps is made of the last of these by a
            convolution of stride 2, the next of that; they are fused into the one below like the others.
        start_level: the first map that is used.
        end_level: the map before which they end; -1 for all. Levels beyond the maps need -1.
        norm_cfg: norm of the convolutions.
        act_cfg: activation of the convolutions.
        upsample_cfg: the method: ``type`` is one of :data:`TYPES`, the rest are its options. FreqFusion if None.
        init_cfg: of mmengine's ``BaseModule``.

    Raises:
        ValueError: for fewer than two levels, fewer levels than maps, or an unknown type.

    Source: Chen et al., "Frequency-aware Feature Fusion for Dense Image Prediction", TPAMI 2024, in the feature
    pyramid of Lin et al., CVPR 2017.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        upsample_cfg: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        widths = in_channels[start_level : len(in_channels) if end_level == -1 else end_level]
        if num_outs < max(2, len(widths)) or (end_level != -1 and num_outs != len(widths)):
            least = "" if end_level != -1 else " or more"
            raise ValueError(
                f"num_outs must be {max(2, len(widths))}{least} for these levels, got {num_outs}"
            )
        options = dict(upsample_cfg or {"type": "FreqFusion"})
        name = TYPES.get(options.pop("type", ""))
        if name is None:
            raise ValueError(
                f"the type of upsample_cfg must be one of {', '.join(TYPES)}, got {upsample_cfg}"
            )
        self.in_channels = in_channels
        self.levels = range(start_level, start_level + len(widths))

        def convolution(width: int, kernel_size: int, stride: int = 1) -> nn.Module:
            layer: nn.Module = ConvModule(
                width,
                out_channels,
                kernel_size,
                stride,
                padding=kernel_size // 2,
                bias=norm_cfg is None,
                norm_cfg=norm_cfg,
                act_cfg=act_cfg,
            )
            nn.init.xavier_uniform_(layer.conv.weight)  # type: ignore[union-attr, arg-type]
            return layer

        extra = [*widths[-1:], *[out_channels] * num_outs][: num_outs - len(widths)]
        self.lateral_convs = nn.ModuleList(
            [*(convolution(width, 1) for width in widths), *(convolution(width, 3, 2) for width in extra)]
        )
        self.alignment = nn.ModuleList(
            create_fitting_fusion(name, out_channels, out_channels, options) for _ in range(num_outs - 1)
        )
        self.fpn_convs = nn.ModuleList(convolution(out_channels, 3) for _ in range(num_outs))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Pyramid levels ``(B, out_channels, H_i, W_i)``, fine to coarse, of the backbone's maps."""
        if len(inputs) != len(self.in_channels):
            raise ValueError(f"got {len(inputs)} maps, this neck was built for {len(self.in_channels)}")
        sources = [inputs[level] for level in self.levels]
        sources.append(sources[-1])
        laterals: list[Tensor] = []
        for i, lateral in enumerate(self.lateral_convs):
            laterals.append(lateral(sources[i] if i < len(sources) else laterals[-1]))
        for i in range(len(laterals) - 1, 0, -1):
            _, hr_feat, lr_feat = self.alignment[i - 1](hr_feat=laterals[i - 1], lr_feat=laterals[i])
            laterals[i - 1] = hr_feat + lr_feat
        return tuple(output(x) for output, x in zip(self.fpn_convs, laterals, strict=True))
