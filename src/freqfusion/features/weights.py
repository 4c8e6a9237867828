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


RELEASED: dict[str, dict[str, Released]] = {}
"""By method, then by the name that follows ``released:``."""


def load_weights_(upsampler: FeatureUpsampler, name: str, weights: str | Path) -> None:
    """Fill an upsampler; every tensor is checked. In place.

    Args:
        name: of the method.
        weights: as :func:`~freqfusion.features.create_upsampler` takes them.
    """
    state: dict[str, Tensor] = read_state_dict(weights)
    fill_(upsampler, state, f"{name} ({type(upsampler).__name__})")
    if upsampler.licence:
        print(f"weights of {name}: {upsampler.licence}", file=sys.stderr)
