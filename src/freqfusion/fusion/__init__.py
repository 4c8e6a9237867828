"""Fusion methods: each joins one coarse and one fine feature map."""

from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.fusion.catalog import create_fusion, list_fusions
from freqfusion.fusion.freqfusion import FreqFusion
from freqfusion.fusion.interpolate import Bilinear, Nearest

__all__ = ["Bilinear", "FreqFusion", "FusedFeatures", "Fusion", "Nearest", "create_fusion", "list_fusions"]
