"""Upsamplers of frozen features by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from freqfusion.features.anyup import AnyUp
from freqfusion.features.base import FeatureUpsampler
from freqfusion.features.bilinear import BilinearFeatures
from freqfusion.features.featup import FeatUpJBU
from freqfusion.features.jafar import JAFAR
from freqfusion.features.joint_bilateral import JointBilateralFeatures
from freqfusion.features.loftup import LoftUp
from freqfusion.features.naf import NAF
from freqfusion.features.uplift import UPLiFT
from freqfusion.features.weights import find_released, load_weights_


class UpsamplerInfo(NamedTuple):
    """What an upsampler is, for tables."""

    name: str
    """As :func:`create_upsampler` takes it."""
    parameters: int
    """Learnable numbers of one for 384 channels, with default options."""
    per_encoder: bool
    """Whether it is made for one number of channels, and its released weights for one encoder."""
    paper: str
    year: int


class _Method(NamedTuple):
    build: Callable[..., FeatureUpsampler]
    per_encoder: bool
    paper: str
    year: int


_METHODS: dict[str, _Method] = {
    "bilinear": _Method(BilinearFeatures, False, "interpolation", 0),
    "joint_bilateral": _Method(JointBilateralFeatures, False, "Kopf et al., SIGGRAPH", 2007),
    "featup_jbu": _Method(FeatUpJBU, True, "Fu et al., FeatUp, ICLR", 2024),
    "jafar": _Method(JAFAR, True, "Couairon et al., JAFAR, NeurIPS", 2025),
    "loftup": _Method(LoftUp, True, "Huang et al., LoftUp, ICCV", 2025),
    "anyup": _Method(AnyUp, False, "Wimmer et al., AnyUp, ICLR", 2026),
    "naf": _Method(NAF, False, "Chambon et al., NAF, CVPR", 2026),
    "uplift": _Method(UPLiFT, True, "UPLiFT, CVPR", 2026),
}


def list_upsamplers() -> list[str]:
    """Names that :func:`create_upsampler` takes."""
    return list(_METHODS)


def describe_upsamplers() -> list[UpsamplerInfo]:
    """A line on every upsampler, in the order of :func:`list_upsamplers`."""
    lines = []
    for name, method in _METHODS.items():
        with torch.device("meta"):  # only counted
            upsampler = method.build(**({"channels": 384} if method.per_encoder else {}))
        parameters = sum(parameter.numel() for parameter in upsampler.parameters())
        lines.append(UpsamplerInfo(name, parameters, method.per_encoder, method.paper, method.year))
    return lines


def create_upsampler(
    name: str, channels: int | None = None, *, weights: str | Path | None = None, **options: Any
) -> FeatureUpsampler:
    """Build an upsampler of frozen features, in evaluation mode.

    Args:
        name: one of :func:`list_upsamplers`.
        channels: channels C of the features; needed by the methods that are made for one number of them.
        weights: a file with released weights or of ``freqfusion fit``, or an address, or ``"released:NAME"`` to
            download one of :data:`~freqfusion.features.weights.RELEASED` from where the authors publish it; their
            licence is printed and kept as ``licence``. By default the weights are fresh.
        **options: further arguments of the method's constructor.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if a download that was asked for fails.
        TypeError: for an option that the method does not have.
        ValueError: for an unknown name, missing channels, or weights that do not fit.

    >>> upsampler = create_upsampler("bilinear")
    >>> upsampler(torch.zeros(1, 8, 3, 4), torch.zeros(1, 3, 42, 56)).shape
    torch.Size([1, 8, 42, 56])
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"unknown upsampler {name!r}; choose one of: {', '.join(_METHODS)}")
    method = _METHODS[name]
    if method.per_encoder:
        if channels is None:
            raise ValueError(
                f"{name!r} is made for one number of channels: give channels, that of your features"
            )
        options["channels"] = channels
    released = None if weights is None else find_released(name, weights)
    if released is not None:
        options = {**released.options, **options}
    upsampler = method.build(**options)
    if weights is not None:
        load_weights_(upsampler, name, weights)
    return upsampler.eval()
