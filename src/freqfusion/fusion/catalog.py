"""Fusion methods by name."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from freqfusion.fusion.a2u import A2U
from freqfusion.fusion.base import Fusion
from freqfusion.fusion.carafe import CARAFE, CARAFE3d
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


class FusionInfo(NamedTuple):
    """What a fusion method is, for tables."""

    name: str
    """As :func:`create_fusion` takes it."""
    guided: bool
    """Whether the fine map helps to upsample the coarse one."""
    parameters: int
    """Learnable numbers of one module with 256 channels on both sides and default options."""
    paper: str
    year: int


class _Method(NamedTuple):
    build: Callable[..., Fusion]
    guided: bool
    paper: str
    year: int


_SAPA = "Lu et al., SAPA, NeurIPS"
_DYSAMPLE = "Liu et al., Learning to Upsample by Learning to Sample, ICCV"
_METHODS: dict[str, _Method] = {
    "nearest": _Method(Nearest, False, "interpolation", 0),
    "bilinear": _Method(Bilinear, False, "interpolation", 0),
    "deconv": _Method(Deconv, False, "Noh et al., Learning Deconvolution Network, ICCV", 2015),
    "pixel_shuffle": _Method(PixelShuffle, False, "Shi et al., Sub-Pixel CNN, CVPR", 2016),
    "carafe": _Method(CARAFE, False, "Wang et al., CARAFE, ICCV", 2019),
    "indexnet": _Method(IndexNet, True, "Lu et al., Indices Matter, ICCV", 2019),
    "a2u": _Method(A2U, True, "Dai et al., Learning Affinity-Aware Upsampling, CVPR", 2021),
    "fade": _Method(FADE, True, "Lu et al., FADE, ECCV", 2022),
    "sapa": _Method(SAPA, True, _SAPA, 2022),
    "sapa-g": _Method(partial(SAPA, gating=True), True, _SAPA, 2022),
    "dysample": _Method(DySample, False, _DYSAMPLE, 2023),
    "dysample+": _Method(partial(DySample, dyscope=True), False, _DYSAMPLE, 2023),
    "dysample-s": _Method(partial(DySample, style="pl", groups=8), False, _DYSAMPLE, 2023),
    "dysample-s+": _Method(partial(DySample, style="pl", groups=8, dyscope=True), False, _DYSAMPLE, 2023),
    "sapa_d": _Method(SAPAD, True, "Liu et al., On Point Affiliation in Feature Upsampling, arXiv", 2023),
    "fade_lite": _Method(FADELite, True, "Lu et al., FADE, IJCV", 2024),
    "lda_aqu": _Method(LDAAQU, False, "Du et al., LDA-AQU, ACM MM", 2024),
    "resfu": _Method(ReSFU, True, "Zhou et al., A Refreshed Similarity-based Upsampler, arXiv", 2024),
    "freqfusion": _Method(FreqFusion, True, "Chen et al., Frequency-aware Feature Fusion, TPAMI", 2024),
}
_OURS = frozenset(_METHODS)


_VOLUMES: dict[str, Callable[..., Fusion]] = {
    "nearest": Nearest3d,
    "bilinear": Trilinear,
    "carafe": CARAFE3d,
    "dysample": DySample3d,
    "dysample+": partial(DySample3d, dyscope=True),
    "dysample-s": partial(DySample3d, style="pl", groups=8),
    "dysample-s+": partial(DySample3d, style="pl", groups=8, dyscope=True),
    "freqfusion": FreqFusion3d,
}
"""The methods for volumes."""


def list_fusions(spatial_dims: int = 2) -> list[str]:
    """Names that :func:`create_fusion` takes, for images or, with 3, for volumes.

    >>> ", ".join(list_fusions(spatial_dims=3))
    'nearest, bilinear, carafe, dysample, dysample+, dysample-s, dysample-s+, freqfusion'
    >>> ", ".join(list_fusions())
    'nearest, bilinear, deconv, pixel_shuffle, carafe, indexnet, a2u, fade, sapa, sapa-g, dysample, dysample+, \
dysample-s, dysample-s+, sapa_d, fade_lite, lda_aqu, resfu, freqfusion'
    """
    return list(_methods(spatial_dims))


def _methods(spatial_dims: int) -> Mapping[str, Callable[..., Fusion]]:
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 (images) or 3 (volumes), got {spatial_dims!r}")
    return _VOLUMES if spatial_dims == 3 else {name: method.build for name, method in _METHODS.items()}


def register_fusion(
    name: str, build: Callable[..., Fusion], *, guided: bool = False, paper: str = "", year: int = 0
) -> None:
    """Make a method of your own known by name, to :func:`create_fusion` and to all that takes such a name.

    Args:
        name: a new name.
        build: called as ``build(hr_channels, lr_channels, **options)``; a subclass of
            :class:`~freqfusion.fusion.base.Fusion`, usually.
        guided: whether the fine map helps to upsample the coarse one.
        paper: where it comes from, for tables.
        year: of the paper.

    Raises:
        ValueError: if the name is taken.
    """
    if name in _METHODS:
        raise ValueError(f"the fusion {name!r} exists already; choose another name")
    _METHODS[name] = _Method(build, guided, paper, year)


def describe_fusions() -> list[FusionInfo]:
    """A line on every method, in the order of :func:`list_fusions`.

    >>> describe_fusions()[4]
    FusionInfo(name='carafe', guided=False, parameters=74148, paper='Wang et al., CARAFE, ICCV', year=2019)
    """
    lines = []
    for name, method in _METHODS.items():
        with torch.device("meta"):  # only counted
            parameters = sum(parameter.numel() for parameter in method.build(256, 256).parameters())
        lines.append(FusionInfo(name, method.guided, parameters, method.paper, method.year))
    return lines


def is_guided(name: str) -> bool:
    """Whether the fine map helps a method to upsample the coarse one.

    Raises:
        ValueError: for an unknown name.
    """
    return _method(name).guided


def class_name(name: str) -> str:
    """The name of a method's class, with what tells its variants apart; a registered method's own name.

    >>> class_name("carafe"), class_name("dysample-s+")
    ('CARAFE', 'DySample-S+')
    """
    build = _method(name).build
    if name not in _OURS:
        return name
    if not isinstance(build, partial):
        return build.__name__
    stem: str = build.func.__name__
    return stem + name.removeprefix(stem.lower()).upper()


def _method(name: str) -> _Method:
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"unknown fusion {name!r}; choose one of: {', '.join(_METHODS)}")
    return _METHODS[name]


def create_fusion(
    name: str, hr_channels: int, lr_channels: int, *, spatial_dims: int = 2, **options: Any
) -> Fusion:
    """Build a fusion method by name.

    Its first weights come from a random stream of their own that one draw from the global CPU generator
    starts. So whatever is built after it, from the same seed, has the same first weights with every method.

    Args:
        name: one of :func:`list_fusions`.
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.
        spatial_dims: 2 for maps ``(B, C, H, W)``, 3 for volumes ``(B, C, D, H, W)``, where ``"bilinear"`` is
            trilinear.
        options: further arguments of the method's constructor.

    Raises:
        ValueError: for an unknown name, or a method that has no form for volumes.
        TypeError: for an option that the method does not have.
    """
    _method(name)
    methods = _methods(spatial_dims)
    if name not in methods:
        raise ValueError(
            f"{name!r} has no form for volumes (spatial_dims=3); choose one of: {', '.join(methods)}"
        )
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return methods[name](hr_channels, lr_channels, **options)


GROUPS = {
    "freqfusion": ("feature_resample_group", 4),
    "dysample": ("groups", 4),
    "dysample+": ("groups", 4),
    "dysample-s": ("groups", 8),
    "dysample-s+": ("groups", 8),
    "sapa_d": ("groups", 4),
    "lda_aqu": ("n_groups", 2),
}
"""The methods that move channels in groups, with the option that counts the groups and its default."""

SCALES = {
    "pixel_shuffle": "scale_factor",
    "carafe": "scale_factor",
    "dysample": "scale",
    "dysample+": "scale",
    "dysample-s": "scale",
    "dysample-s+": "scale",
}
"""The methods without a guide that predict something for each sub-pixel, with the option that tells their number."""


def create_fitting_fusion(
    name: str, hr_channels: int, lr_channels: int, options: Mapping[str, Any], spatial_dims: int = 2
) -> Fusion:
    """:func:`create_fusion`, with fewer groups where the default does not divide the channels.

    A number of groups in ``options`` is taken as it is.
    """
    if name in GROUPS:
        option, default = GROUPS[name]
        options = {option: math.gcd(default, lr_channels), **options}
    return create_fusion(name, hr_channels, lr_channels, spatial_dims=spatial_dims, **options)
