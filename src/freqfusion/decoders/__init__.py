"""Structures that join several feature levels: a pyramid that adds, and the light Hamburger head."""

from freqfusion.decoders.fpn import FPN
from freqfusion.decoders.ham import NMF2D, LightHamHead

__all__ = ["FPN", "NMF2D", "LightHamHead"]
