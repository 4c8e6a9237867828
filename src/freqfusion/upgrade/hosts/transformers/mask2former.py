"""transformers: the pixel decoder of Mask2Former, fused as in the authors' release; see also OneFormer's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

from freqfusion.upgrade.base import FusionPoint, Upgraded
from freqfusion.upgrade.hosts import register_host


class PixelDecoder(Upgraded):
    """A deformable encoder on the three coarsest maps, and above it pyramid levels that are fused.

    ``fusions.out_4`` joins the encoder's finest map with the backbone's of stride 4. Points are named by the
    stride that their fine map has where the backbone's strides are 4, 8, 16 and 32.

    The host's forward does all but the pyramid levels. It runs on a view of the module that has none.
    """

    host_forward: Callable[..., Any]
    """As a static method: it is given the view."""

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        channels = module.level_embed.shape[1]
        levels = reversed(range(module.num_fpn_levels))
        return [FusionPoint(_name("out", level), channels, channels, "bilinear") for level in levels]

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
        for name, value in {**replaced, "_module": module}.items():
            setattr(self, name, value)

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
    def points(module: Any) -> list[FusionPoint]:
        after = PixelDecoder.points(module)
        channels = module.level_embed.shape[1]
        coarsest = len(module.feature_channels) - 1
        fine = [coarsest - i for i in range(1, len(module.input_projections))]
        before = [FusionPoint(_name("in", level), channels, channels, mode="none") for level in fine]
        published = {
            "compressed_channels": channels // 4,
            "hamming_window": False,
            "feature_resample_norm": False,
        }
        return [point._replace(freqfusion=published) for point in before + after]

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
