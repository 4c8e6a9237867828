"""One entrance: a network by its name, with the weights there are to start from."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from freqfusion._optional import require
from freqfusion.models.base import Model, ObjectModel, PixelModel
from freqfusion.models.encoders import RESNETS, SmallEncoder
from freqfusion.models.library import (
    CLASS_OPTIONS,
    MASK2FORMER,
    LibrarySegmenter,
    count_classes,
    host_name,
)
from freqfusion.models.segmenter import DECODERS, EncoderDecoder, build_segmenter
from freqfusion.models.segnext import SegNeXt
from freqfusion.upgrade import Upgrade, find_sites, upgrade_
from freqfusion.upgrade.core import Init, upgrade_again_
from freqfusion.zoo.libraries import build_library
from freqfusion.zoo.pretrained import from_pretrained, is_saved
from freqfusion.zoo.published import PUBLISHED, build_published
from freqfusion.zoo.spec import ModelSpec, spec_of
from freqfusion.zoo.start import checkpoint_, load_backbone_of_, take_weights_, take_weights_of_library

DETECTORS = ("faster_rcnn", "mask_rcnn", "panoptic_fpn")

OF_WRAPPERS = ("frozen_norm", "output", "things")
"""Options of how a library's model is trained and used, not of how it is made."""

_NO_OBJECTS = "{} gives a class for every pixel and finds no objects, so it takes neither things nor output"

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
    """Names of the ready networks that fit a shell pattern; :func:`create_model` also puts others together.

    >>> list_models("segnext_*")
    ['segnext_t', 'segnext_s', 'segnext_b', 'segnext_l']
    >>> list_models("mask2former_swin_*")
    ['mask2former_swin_t', 'mask2former_swin_s', 'mask2former_swin_b', 'mask2former_swin_l']
    """
    detectors = [f"{kind}_{backbone}" for kind in DETECTORS for backbone in RESNETS]
    return [name for name in (*_REGISTERED, *detectors, *PUBLISHED) if fnmatchcase(name, pattern)]


def register_model(name: str) -> Callable[[Builder], Builder]:
    """Give a network of your own a name that :func:`create_model` and the command line take; a decorator.

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


def create_model(
    name: str | Path,
    num_classes: int | None = None,
    fusion: str = "freqfusion",
    *,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    init: Init | None = None,
    upgrade_options: Mapping[str, Any] | None = None,
    checkpointing: bool = False,
    **options: Any,
) -> Any:
    """Build a network by name, with fresh weights unless told otherwise, ready to be trained.

    Args:
        name: what the command line takes as ``--model.network``:

            - a name of :func:`list_models`, such as ``segnext_t``, ``mask_rcnn_r50`` or ``mask2former_swin_b``;
            - ``DECODER_NETWORK``: ``fpn``, ``unet`` or ``progressive`` on any network of timm with maps of different
              strides (``unet_convnext_tiny``); ``KIND_NETWORK``: ``faster_rcnn``, ``mask_rcnn`` or
              ``panoptic_fpn`` on one with maps at the strides 4 to 32;
            - a model of a library, ``smp:Unet?encoder_name=resnet18``, ``transformers:...``, ``torchvision:...``, or
              of code of your own, ``package.module:function``, ``file.py:function``;
            - a folder of :func:`freqfusion.save_pretrained`, or a repository of the hub that holds one
              (``user/name``); the model is then as it was saved, and only ``num_classes`` may be given.

            ``?option=value&...`` may follow every name; ``fusion`` there comes before the argument.
        num_classes: number of classes K, without background. Models of libraries and folders may leave it out.
        fusion: a name of :func:`freqfusion.list_fusions`. A model of a library is upgraded; its own way of upsampling
            (what :func:`freqfusion.find_sites` says as ``mode``, usually ``"bilinear"`` or ``"nearest"``) leaves it
            as it is.
        weights: to start from: a folder of :func:`freqfusion.save_pretrained`, or such a repository of the hub; a
            file with the model's own tensors, also a checkpoint of ``freqfusion fit``; a file of an official release
            (recognised by its tensors); for a model of transformers a checkpoint of that library, a folder or a name
            on the hub; for a model of torchvision ``torchvision:TAG``. The classifier of another number of classes
            is left out, with a warning; everything else must fit. A saved upgrade must be the one asked for.
        backbone_weights: ImageNet weights for the backbone: a file, an address, ``torchvision:TAG``, ``timm:TAG`` or
            ``timm``; see :func:`~freqfusion.weights.load_backbone_`.
        init: of the upgrade of a library's model, see :func:`freqfusion.upgrade_`. By default ``"paper"``, but
            ``"identity"`` with ``weights`` of a model that is not upgraded, so that it starts from what it was.
        upgrade_options: further arguments of :func:`freqfusion.upgrade_` there.
        checkpointing: recompute activations in the backward pass instead of keeping them, in FreqFusion and where
            transformers supports it. Slower, less memory, the same gradients.
        **options: further arguments of the network: of :class:`~freqfusion.models.SegNeXt`, of the decoder
            (``channels``, ``finest_stride``, ``fusion_options``, ``backbone_options``), of the detector
            (``things``, ``top_level``, ``min_size``, ...), of the library's constructor, or settings of a published
            network's configuration (``num_queries=200``). Networks of other libraries also take ``frozen_norm``
            (keep the backbone's batch norms as they are), Mask2Former ``things`` and ``output`` (``"panoptic"`` or
            ``"instance"``).

    Returns:
        A :class:`~freqfusion.models.PixelModel` or an :class:`~freqfusion.models.ObjectModel`, in training mode, on
        the CPU in float32; its ``spec`` says how it is made. Of a library's model it is a wrapper, with that model
        as ``host``.

    Raises:
        FileNotFoundError: if weights are not there.
        ImportError: if a library is not installed; the message holds the install line.
        OSError: if a download that was asked for fails.
        TypeError: for an option that the network or the method does not have.
        ValueError: for an unknown name, weights that do not fit, or values out of range.

    Warns:
        UserWarning: if the classifier starts anew; the message names its tensors.

    >>> import torch
    >>> model = create_model("fpn_small", num_classes=5, fusion="bilinear")
    >>> model(torch.zeros(2, 3, 33, 47)).shape
    torch.Size([2, 5, 33, 47])
    >>> str(model.spec)
    'fpn_small?num_classes=5&fusion=bilinear'
    """
    if weights is not None and backbone_weights is not None:
        raise ValueError("give weights or backbone_weights, not both: weights hold the backbone's too")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    upgrade = dict(upgrade_options or {})
    if is_saved(name):
        own = {key: options.pop(key) for key in OF_WRAPPERS if key in options}
        given = {"weights": weights, "backbone_weights": backbone_weights, "init": init} | upgrade | options
        wrong = [key for key, value in given.items() if value is not None]
        if wrong:
            raise ValueError(
                f"{name} is a saved model, which is as it was saved: leave out {', '.join(wrong)} (on the command "
                "line --model.network_options null)"
            )
        model = wrap(from_pretrained(name), num_classes, **own)
    else:
        spec = ModelSpec.parse(str(name))
        spec = replace(spec, options={**spec.options, **options})
        if spec.library or spec.name in PUBLISHED:
            model = _upgraded(spec, num_classes, fusion, weights, backbone_weights, init, upgrade)
        else:
            if init is not None or upgrade:
                raise ValueError(
                    f"init and upgrade_options are for models of other libraries; {name!r} is built with the fusion "
                    "(fusion_options)"
                )
            if spec.options.get("num_classes", num_classes) != num_classes and num_classes is not None:
                raise ValueError(
                    f"{name!r} says another number of classes than {num_classes}; leave it out of the name"
                )
            model = _build_own({"num_classes": num_classes, "fusion": fusion} | spec.options, spec.name)
            if weights is not None:
                take_weights_(model, weights)
            if backbone_weights is not None:
                load_backbone_of_(model, backbone_weights)
    if checkpointing:
        checkpoint_(model)
    return model.train()


def build(spec: ModelSpec) -> nn.Module:
    """A model with fresh weights as its spec says, upgraded; one of a library without a wrapper.

    Raises:
        ImportError, TypeError, ValueError: see :func:`create_model`.
    """
    if spec.library:
        model = build_library(spec)
    elif spec.name in PUBLISHED:
        model = build_published(spec.name, **spec.options)
    else:
        model = _build_own(spec.options, spec.name)
    if spec.upgrade is not None:
        upgrade_again_(model, spec.upgrade)
    model.spec = spec  # type: ignore[assignment]
    return model


def wrap(model: nn.Module, num_classes: int | None = None, **options: Any) -> Any:
    """A model under the contract of pixels or of objects.

    Args:
        model: of this package, which is returned as it is, or of another library.
        num_classes: number of classes K; read from the model where it says it.
        **options: of the wrapper: ``things`` and ``output`` of a Mask2Former, ``things`` of a detector, ``multiple``
            and ``minimum`` of a segmentation network (:class:`~freqfusion.models.library.LibrarySegmenter`),
            ``frozen_norm`` of all but detectors.

    Raises:
        ValueError: for another number of classes than the model has, or an unknown one.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if isinstance(model, (PixelModel, ObjectModel)):
        found: Any = model
        if "output" in options or ("things" in options and not isinstance(model, ObjectModel)):
            raise ValueError(_NO_OBJECTS.format(type(model).__name__))
        if "frozen_norm" in options:
            raise ValueError(
                f"frozen_norm is for networks of other libraries, this is a {type(model).__name__}"
            )
    elif host_name(model) == MASK2FORMER:
        from freqfusion.models.mask2former import MaskClassifier

        found = MaskClassifier(model, count_classes(model), **options)  # type: ignore[arg-type]
    elif "GeneralizedRCNNTransform" in [
        cls.__name__ for cls in type(getattr(model, "transform", None)).__mro__
    ]:
        from freqfusion.models.detection import LibraryDetector

        found = LibraryDetector(model, num_classes, **options)
    else:
        if options.keys() & {"things", "output"}:
            raise ValueError(_NO_OBJECTS.format(type(model).__name__))
        count = count_classes(model) if num_classes is None else num_classes
        found = LibrarySegmenter(model, count, **options)
    if num_classes not in (None, found.num_classes):
        raise ValueError(
            f"the network predicts {found.num_classes} classes, not {num_classes}: use the data set that "
            "the network was made for"
        )
    if "things" in options and list(found.things) != list(options["things"]):
        raise ValueError("the network was made for other things and stuff than asked for")
    return found


def _build_own(options: Mapping[str, Any], name: str) -> Model:
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
        raise ValueError(_NO_OBJECTS.format(name))
    model = builder(num_classes=num_classes, fusion=fusion, **options)
    if not isinstance(model, Model):
        raise TypeError(
            f"the builder of {name!r} made a {type(model).__name__}, expected a freqfusion.models.PixelModel or "
            "ObjectModel"
        )
    model.spec = ModelSpec(name, {"num_classes": num_classes, "fusion": fusion, **options})
    return model


def _upgraded(
    spec: ModelSpec,
    num_classes: int | None,
    fusion: str,
    weights: str | Path | None,
    backbone_weights: str | Path | None,
    init: Init | None,
    upgrade_options: dict[str, Any],
) -> Model:
    """A model of another library with the fusion method, under one of the contracts."""
    options = dict(spec.options)
    own = {key: options.pop(key) for key in OF_WRAPPERS if key in options}
    spec, started = for_classes(replace(spec, options=options), num_classes), weights is not None
    if spec.library == "torchvision":
        for key, source in (("weights", weights), ("weights_backbone", backbone_weights)):
            if str(source).startswith("torchvision:"):
                spec = replace(spec, options={**spec.options, key: str(source).partition(":")[2]})
        weights, backbone_weights = (
            None if str(source).startswith("torchvision:") else source
            for source in (weights, backbone_weights)
        )
    host = build(spec)
    host.spec = spec.without_outside()  # type: ignore[assignment]
    plain, done = _is_plain(host, fusion), False
    if weights is None and host_name(host) == MASK2FORMER:
        from freqfusion.models.mask2former import reset_parameters_

        reset_parameters_(host)  # type: ignore[arg-type]
    if weights is not None:
        asked = None if plain else Upgrade(fusion, init or "", (), upgrade_options)
        host, done = take_weights_of_library(host, spec, weights, asked)
    if backbone_weights is not None:
        load_backbone_of_(host, backbone_weights)
    if not plain and not done:
        upgrade_(host, fusion, init=init or ("identity" if started else "paper"), **upgrade_options)
    host.spec = spec_of(host)  # type: ignore[assignment]
    return wrap(host, num_classes, **own)


def for_classes(spec: ModelSpec, num_classes: int | None) -> ModelSpec:
    """The spec of a library's model with the number of classes, under the name that the library has for it."""
    if spec.name in PUBLISHED:
        if num_classes is None and "num_classes" not in spec.options:
            raise ValueError(f"{spec.name!r} needs num_classes, the number of classes")
        name = "num_classes"
    else:
        name = CLASS_OPTIONS.get(spec.library, "num_classes")
    if num_classes is None:
        return spec
    count = num_classes
    if spec.library == "torchvision":
        detectors = require("torchvision.models", "vision").detection
        library = require("torchvision.models", "vision")
        count += spec.name.partition(":")[2] in library.list_models(module=detectors)  # and the background
    if spec.options.get(name, count) != count:
        raise ValueError(f"{spec} says another number of classes than {num_classes}; leave {name} out of it")
    return replace(spec, options={**spec.options, name: count})


def _is_plain(host: nn.Module, fusion: str) -> bool:
    """Whether the host upsamples that way by itself."""
    modes = {site.mode for site in find_sites(host) if not site.skipped} - {"none"}
    return modes == {fusion} or (not modes and fusion == "bilinear")
