"""Structures that join several feature levels: add, concatenate, U-Net, and the light Hamburger head."""

from freqfusion.decoders.fpn import FPN
from freqfusion.decoders.ham import NMF2D, LightHamHead
from freqfusion.decoders.progressive import ProgressiveConcat
from freqfusion.decoders.unet import UNet

__all__ = ["FPN", "NMF2D", "LightHamHead", "ProgressiveConcat", "UNet"]
