"""transformers: the pixel decoder of Mask2Former, fused as in the authors' release; see also OneFormer's."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

from freqfusion.integrations.base import Joint, Upgraded
from freqfusion.integrations.hosts import register_host


class PixelDecoder(Upgraded):
    """A deformable encoder on the three coarsest maps, and above it pyramid levels that are fused.

    ``fusions.out_4`` joins the encoder's finest map with the backbone's of stride 4. Joints are named by the
    stride that their fine map has where the backbone's strides are 4, 8, 16 and 32.

    The host's forward does all but the pyramid levels. It runs on a view of the module that has none.
    """

    host_forward: Callable[..., Any]
    """As a static method: it is given the view."""

    @staticmethod
    def joints(module: Any) -> list[Joint]:
        channels = module.mask_projection.in_channels
        levels = reversed(range(module.num_fpn_levels))
        return [Joint(_name("out", level), channels, channels, "bilinear") for level in levels]

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        sizes = [-(-37 // 2**i) for i in range(len(module.feature_channels))]
        return ([torch.randn(1, c, n, n + 3) for c, n in zip(module.feature_channels, sizes, strict=True)],)

    def forward(self: Any, features: Any, *args: Any, **kwargs: Any) -> Any:
        view = _View(self, num_fpn_levels=0, mask_projection=lambda x: x, **self.replaced(features))
        output = self.host_forward(view, features, *args, **kwargs)
        x = output.mask_features  # the encoder's finest map, which the view did not project
        for level in reversed(range(self.num_fpn_levels)):
            lateral = getattr(self, f"adapter_{level + 1}")(features[level])
            lateral, x = self.fusions[_name("out", level)](lateral, x)
            x = getattr(self, f"layer_{level + 1}")(lateral + x)
        output.mask_features = self.mask_projection(x)
        return output

    def replaced(self, features: Any) -> dict[str, Any]:
        """Further attributes of the view, given the backbone's maps from fine to coarse."""
        return {}


class _View:
    """A module with some attributes replaced, as the ``self`` of its class's forward. Leaves the module alone."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@register_host
class UpgradedMask2FormerPixelDecoder(PixelDecoder, Mask2FormerPixelDecoder):
    """Pixel decoder of Mask2Former with two fusions before the deformable encoder and one after it.

    ``fusions.in_16`` and ``fusions.in_8`` add to the encoder's finer input maps what is coarser, where the host
    joins nothing; ``fusions.out_4`` replaces the interpolation after the encoder. The published options are a
    quarter of the decoder's channels (64 of 256) for the compressed maps, no Hamming window and no normalisation in
    the offset generator.

    Source: the release of Chen et al., TPAMI 2024, ``FreqAwareMSDeformAttnPixelDecoder2``. It keeps autocast out of
    the whole pixel decoder; here the host decides, which does not.
    """

    host_forward = staticmethod(Mask2FormerPixelDecoder.forward)

    @staticmethod
    def joints(module: Any) -> list[Joint]:
        after = PixelDecoder.joints(module)
        channels = module.mask_projection.in_channels
        coarsest = len(module.feature_channels) - 1
        fine = [coarsest - i for i in range(1, len(module.input_projections))]
        before = [Joint(_name("in", level), channels, channels, mode="none") for level in fine]
        published = {
            "compressed_channels": channels // 4,
            "hamming_window": False,
            "feature_resample_norm": False,
        }
        return [joint._replace(freqfusion=published) for joint in before + after]

    def replaced(self: Any, features: Any) -> dict[str, Any]:
        fused: list[Tensor] = []
        for i, projection in enumerate(self.input_projections):
            level = len(features) - 1 - i
            x = projection(features[level])
            if fused:
                nothing = partial(torch.zeros_like, x)
                x, coarse = self.fusions[_name("in", level)](x, fused[-1], plain=nothing)
                x = x + coarse
            fused.append(x)
        # the host projects the backbone's maps itself, and takes their sizes and dtypes for the positions
        return {"input_projections": [lambda _, x=x: x for x in fused]}


def _name(side: str, level: int) -> str:
    return f"{side}_{4 * 2**level}"


_KEYS = (
    (r"input_proj\.(\d+)\.([01])\.(weight|bias)", r"input_projections.\1.\2.\3"),
    (r"transformer\.level_embed", "level_embed"),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)", r"encoder.layers.\1.self_attn.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.norm1\.(.+)", r"encoder.layers.\1.self_attn_layer_norm.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.(.+)", r"encoder.layers.\1.final_layer_norm.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.linear([12])\.(.+)", r"encoder.layers.\1.fc\2.\3"),
    (r"mask_features\.(weight|bias)", r"mask_projection.\1"),
    (r"(adapter|layer)_(\d+)\.(weight|bias)", r"\1_\2.0.\3"),
    (r"(adapter|layer)_(\d+)\.norm\.(weight|bias)", r"\1_\2.1.\3"),
    (r"freqfusions\.0\.(.+)", r"fusions.in_16.fusion.\1"),
    (r"freqfusions\.1\.(.+)", r"fusions.in_8.fusion.\1"),
    (r"freqfusions\.2\.(.+)", r"fusions.out_4.fusion.\1"),
)


def pixel_decoder_key(official_key: str) -> str:
    """The name in an upgraded ``Mask2FormerPixelDecoder`` of a parameter of the FreqFusion authors' release.

    Also those of the original Mask2Former, whose code the release builds on. Values and shapes are the same.

    Args:
        official_key: as in the release's checkpoints, without ``sem_seg_head.pixel_decoder.`` in front.

    Raises:
        ValueError: for a key that such a pixel decoder does not have.

    >>> pixel_decoder_key("transformer.encoder.layers.0.linear1.weight")
    'encoder.layers.0.fc1.weight'
    >>> pixel_decoder_key("freqfusions.2.content_encoder.bias")
    'fusions.out_4.fusion.content_encoder.bias'
    """
    for pattern, replacement in _KEYS:
        match = re.fullmatch(pattern, official_key)
        if match:
            return match.expand(replacement)
    raise ValueError(
        f"{official_key!r} is no parameter of the released pixel decoder; expected one such as "
        "'input_proj.0.0.weight', without the prefix of the whole model"
    )
