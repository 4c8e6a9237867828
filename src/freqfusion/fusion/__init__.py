"""Fusion methods: each joins one coarse and one fine feature map."""

from freqfusion.fusion.a2u import A2U
from freqfusion.fusion.base import FusedFeatures, Fusion
from freqfusion.fusion.carafe import CARAFE, CARAFE3d
from freqfusion.fusion.catalog import (
    FusionInfo,
    create_fusion,
    describe_fusions,
    list_fusions,
    register_fusion,
)
from freqfusion.fusion.deconv import Deconv
from freqfusion.fusion.dysample import DySample, DySample3d
from freqfusion.fusion.fade import FADE, FADELite
from freqfusion.fusion.freqfusion import FreqFusion, FreqFusion3d
from freqfusion.fusion.indexnet import IndexNet
from freqfusion.fusion.interpolate import Bilinear, Nearest, Nearest3d, Trilinear
from freqfusion.fusion.lda_aqu import LDAAQU
from freqfusion.fusion.pixel_shuffle import PixelShuffle
from freqfusion.fusion.resfu import ReSFU
from freqfusion.fusion.sapa import SAPA
from freqfusion.fusion.sapa_d import SAPAD

__all__ = [
    "A2U",
    "CARAFE",
    "FADE",
    "LDAAQU",
    "SAPA",
    "SAPAD",
    "Bilinear",
    "CARAFE3d",
    "Deconv",
    "DySample",
    "DySample3d",
    "FADELite",
    "FreqFusion",
    "FreqFusion3d",
    "FusedFeatures",
    "Fusion",
    "FusionInfo",
    "IndexNet",
    "Nearest",
    "Nearest3d",
    "PixelShuffle",
    "ReSFU",
    "Trilinear",
    "create_fusion",
    "describe_fusions",
    "list_fusions",
    "register_fusion",
]
