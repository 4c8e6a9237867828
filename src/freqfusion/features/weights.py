"""Released weights of the upsamplers: where their authors publish them, and how their files name the tensors."""

import sys
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from freqfusion.features.base import FeatureUpsampler
from freqfusion.weights.files import read_state_dict
from freqfusion.weights.fill import fill_


class Released(NamedTuple):
    """Weights that the authors of a method publish."""

    address: str
    """Of the file: ``https://...``, or ``user/name`` of a repository on the Hugging Face hub."""
    licence: str
    encoder: str
    """Whose features it is for; ``""`` if for any."""


_NAF = "https://github.com/valeoai/NAF/releases/download/model/"
_ANYUP = "https://github.com/wimmerth/anyup/releases/download/"
_JAFAR = "https://github.com/PaulCouairon/JAFAR/releases/download/Weights/"

RELEASED: dict[str, dict[str, Released]] = {
    "naf": {"naf_release": Released(f"{_NAF}naf_release.pth", "Apache-2.0", "")},
    "anyup": {
        "anyup_multi_backbone": Released(f"{_ANYUP}checkpoint_v2/anyup_multi_backbone.pth", "CC-BY-4.0", ""),
        "anyup_paper": Released(f"{_ANYUP}checkpoint/anyup_paper.pth", "CC-BY-4.0", ""),
    },
    "jafar": {
        encoder: Released(f"{_JAFAR}{encoder}.pth", "Apache-2.0", encoder)
        for encoder in (
            "vit_small_patch14_dinov2.lvd142m",
            "vit_small_patch14_reg4_dinov2",
            "vit_base_patch14_dinov2.lvd142m",
            "vit_base_patch16_224",
            "vit_base_patch16_224.dino",
            "vit_base_patch16_clip_384",
            "vit_base_patch16_siglip_512.v2_webli",
        )
    },
}
"""By method, then by the name that follows ``released:``."""


def load_weights_(upsampler: FeatureUpsampler, name: str, weights: str | Path) -> None:
    """Fill an upsampler; every tensor is checked. In place.

    Args:
        name: of the method.
        weights: as :func:`~freqfusion.features.create_upsampler` takes them.
    """
    state: dict[str, Tensor] = read_state_dict(weights)
    fill_(upsampler, upsampler.own_state(state), f"{name} ({type(upsampler).__name__})")
    if upsampler.licence:
        print(f"weights of {name}: {upsampler.licence}", file=sys.stderr)
