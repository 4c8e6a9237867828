"""Features of a frozen encoder, such as a vision transformer, at the resolution of the image."""

from freqfusion.features.anyup import AnyUp
from freqfusion.features.base import FeatureUpsampler
from freqfusion.features.bilinear import BilinearFeatures
from freqfusion.features.catalog import (
    UpsamplerInfo,
    create_upsampler,
    describe_upsamplers,
    list_upsamplers,
)
from freqfusion.features.extract import (
    encoder_normalisation,
    encoder_options,
    encoder_patch,
    extract_features,
)
from freqfusion.features.featup import FeatUpJBU
from freqfusion.features.jafar import JAFAR
from freqfusion.features.joint_bilateral import JointBilateralFeatures
from freqfusion.features.loftup import LoftUp
from freqfusion.features.naf import NAF
from freqfusion.features.uplift import UPLiFT

__all__ = [
    "JAFAR",
    "NAF",
    "AnyUp",
    "BilinearFeatures",
    "FeatUpJBU",
    "FeatureUpsampler",
    "JointBilateralFeatures",
    "LoftUp",
    "UPLiFT",
    "UpsamplerInfo",
    "create_upsampler",
    "describe_upsamplers",
    "encoder_normalisation",
    "encoder_options",
    "encoder_patch",
    "extract_features",
    "list_upsamplers",
]
