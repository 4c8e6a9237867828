"""A U-Net decoder with FreqFusion for terratorch, whose configurations then say ``decoder: FreqFusionUNet``.

Put this file into the folder that terratorch is told of by ``custom_modules_path`` and import it in that folder's
``__init__.py``, or import it before you build a model.
"""

from terratorch.registry import TERRATORCH_DECODER_REGISTRY

from freqfusion.decoders import UNet


@TERRATORCH_DECODER_REGISTRY.register
class FreqFusionUNet(UNet):
    def __init__(self, in_channels: list[int], channels: int = 256, fusion: str = "freqfusion") -> None:
        super().__init__(in_channels, channels, fusion)
