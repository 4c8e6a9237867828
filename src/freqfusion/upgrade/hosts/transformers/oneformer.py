"""transformers: the pixel decoder of OneFormer."""

from transformers.models.oneformer.modeling_oneformer import OneFormerPixelDecoder

from freqfusion.upgrade.hosts import register_host
from freqfusion.upgrade.hosts.transformers.mask2former import PixelDecoder


@register_host
class UpgradedOneFormerPixelDecoder(PixelDecoder, OneFormerPixelDecoder):
    """Pixel decoder of OneFormer; ``fusions.out_4`` follows its deformable encoder."""

    host_forward = staticmethod(OneFormerPixelDecoder.forward)
