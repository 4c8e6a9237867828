"""Models with fresh weights, by a spec: the names of this package, registered ones, published networks, libraries."""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from freqfusion._optional import require
from freqfusion.models.base import Model
from freqfusion.models.encoders import RESNETS, SmallEncoder
from freqfusion.models.segmenter import DECODERS, EncoderDecoder, build_segmenter
from freqfusion.models.segnext import SegNeXt
from freqfusion.upgrade.core import upgrade_again_
from freqfusion.zoo.libraries import build_library
from freqfusion.zoo.published import PUBLISHED, build_published
from freqfusion.zoo.spec import ModelSpec

DETECTORS = ("faster_rcnn", "mask_rcnn", "panoptic_fpn")

NO_OBJECTS = "{} gives a class for every pixel and finds no objects, so it takes neither things nor output"

Builder = TypeVar("Builder", bound=Callable[..., Model])


def _fpn_small(
    num_classes: int, fusion: str, *, channels: int = 48, fusion_options: Mapping[str, Any] | None = None
) -> EncoderDecoder:
    defaults = {"compressed_channels": 16} if fusion == "freqfusion" else {}
    options = {**defaults, **(fusion_options or {})}
    return EncoderDecoder(SmallEncoder(), num_classes, fusion, channels=channels, fusion_options=options)


_REGISTERED: dict[str, Callable[..., Model]] = {
    "segnext_t": partial(SegNeXt, "t"),
    "segnext_s": partial(SegNeXt, "s"),
    "segnext_b": partial(SegNeXt, "b"),
    "segnext_l": partial(SegNeXt, "l"),
    "fpn_small": _fpn_small,
    "fpn_resnet18": partial(build_segmenter, "resnet18", channels=64),
}
_PIXEL_MODELS = frozenset(_REGISTERED)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the ready networks that fit a shell pattern; :func:`freqfusion.create_model` takes more.

    >>> list_models("segnext_*")
    ['segnext_t', 'segnext_s', 'segnext_b', 'segnext_l']
    >>> list_models("mask2former_swin_*")
    ['mask2former_swin_t', 'mask2former_swin_s', 'mask2former_swin_b', 'mask2former_swin_l']
    """
    detectors = [f"{kind}_{backbone}" for kind in DETECTORS for backbone in RESNETS]
    return [name for name in (*_REGISTERED, *detectors, *PUBLISHED) if fnmatchcase(name, pattern)]


def register_model(name: str) -> Callable[[Builder], Builder]:
    """Give a network of your own a name that :func:`freqfusion.create_model` and the command line take; a decorator.

    Args:
        name: not taken yet; letters, digits, ``_``, ``.``, ``+`` and ``-``.

    Returns:
        The decorator of a function or class ``builder(num_classes, fusion, **options)`` that makes a
        :class:`~freqfusion.models.PixelModel` or :class:`~freqfusion.models.ObjectModel` with fresh weights.

    Raises:
        ValueError: for a name that is taken or of another form.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"a model's name is of letters, digits, _, ., + and -, got {name!r}")

    def register(builder: Builder) -> Builder:
        before = getattr(_REGISTERED.get(name), "__qualname__", "")
        if name in list_models() and before != builder.__qualname__:  # else its file is imported again
            raise ValueError(f"there is a model {name!r} already; choose another name")
        _REGISTERED[name] = builder
        return builder

    return register


def build(spec: ModelSpec) -> nn.Module:
    """A model with fresh weights as its spec says, upgraded; one of a library without a wrapper.

    Raises:
        ImportError, TypeError, ValueError: see :func:`freqfusion.create_model`.
    """
    if spec.library:
        model = build_library(spec)
    elif spec.name in PUBLISHED:
        model = build_published(spec.name, **spec.options)
    else:
        model = build_own(spec.options, spec.name)
    if spec.upgrade is not None:
        upgrade_again_(model, spec.upgrade)
    model.spec = spec  # type: ignore[assignment]
    return model


def build_own(options: Mapping[str, Any], name: str) -> Model:
    """A network of this package, or a registered one."""
    options = dict(options)
    num_classes, fusion = options.pop("num_classes", None), options.pop("fusion", "freqfusion")
    kind = next((kind for kind in DETECTORS if name.startswith(f"{kind}_")), "")
    decoder, _, backbone = name.partition("_")
    if name in _REGISTERED:
        builder: Callable[..., Model] = _REGISTERED[name]
    elif kind:
        require("torchvision", "vision")
        from freqfusion.models.detection import build_detector

        builder = partial(build_detector, kind, name.removeprefix(f"{kind}_"))
    elif decoder in DECODERS and backbone:
        builder = partial(build_segmenter, backbone, decoder)
    elif Path(name).exists():
        raise ValueError(
            f"{name} is not a saved model: give a folder with freqfusion.json, written by freqfusion convert or "
            "save_pretrained. A file of weights goes with the name of its network, as weights (on the command line "
            "--model.weights)"
        )
    else:
        near = get_close_matches(name, list_models(), 1)
        raise ValueError(
            f"unknown model {name!r}{f', did you mean {near[0]}?' if near else '.'} Choose a name of "
            f"freqfusion.list_models(); a decoder ({', '.join(DECODERS)}) or a detector ({', '.join(DETECTORS)}) and "
            "a network of timm, such as unet_convnext_tiny; or a model of a library, such as "
            "smp:Unet?encoder_name=resnet18"
        )
    if num_classes is None:
        raise ValueError(f"{name!r} needs num_classes, the number of classes")
    if "things" in options and (name in _PIXEL_MODELS or not (kind or name in _REGISTERED)):
        raise ValueError(NO_OBJECTS.format(name))
    model = builder(num_classes=num_classes, fusion=fusion, **options)
    if not isinstance(model, Model):
        raise TypeError(
            f"the builder of {name!r} made a {type(model).__name__}, expected a freqfusion.models.PixelModel or "
            "ObjectModel"
        )
    model.spec = ModelSpec(name, {"num_classes": num_classes, "fusion": fusion, **options})
    return model
