"""One entrance: a network by its name, with the weights there are to start from."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from freqfusion._optional import require
from freqfusion.models.base import Model, ObjectModel, PixelModel
from freqfusion.models.library import (
    CLASS_OPTIONS,
    MASK2FORMER,
    LibrarySegmenter,
    count_classes,
    host_name,
)
from freqfusion.upgrade import Upgrade, find_sites, upgrade_
from freqfusion.upgrade.core import Init
from freqfusion.zoo.build import NO_OBJECTS, build, build_own
from freqfusion.zoo.normalisation import take_own_normalisation_
from freqfusion.zoo.pretrained import from_pretrained, is_saved
from freqfusion.zoo.published import PUBLISHED
from freqfusion.zoo.spec import ModelSpec, spec_of
from freqfusion.zoo.start import (
    checkpoint_,
    freeze_backbone_,
    load_backbone_of_,
    take_weights_,
    take_weights_of_library,
)

OF_WRAPPERS = ("frozen_norm", "output", "things")
"""Options of how a library's model is trained and used, not of how it is made."""


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
    freeze_backbone: bool = False,
    **options: Any,
) -> Any:
    """Build a network by name, with fresh weights unless told otherwise, ready to be trained.

    Args:
        name: what the command line takes as ``--model.network``:

            - a name of :func:`list_models`, such as ``segnext_t``, ``mask_rcnn_r50`` or ``mask2former_swin_b``;
            - ``DECODER_NETWORK``: ``fpn``, ``unet`` or ``progressive`` on a network of timm (``unet_convnext_tiny``,
              ``fpn_vit_small_patch14_dinov2``); ``KIND_NETWORK``: ``faster_rcnn``, ``mask_rcnn`` or
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
            ``timm``, ``package:efficientnet_lite0``; see :func:`~freqfusion.weights.load_backbone_`.
        init: of the upgrade of a library's model, see :func:`freqfusion.upgrade_`. By default ``"paper"``, but
            ``"identity"`` with ``weights`` of a model that is not upgraded, so that it starts from what it was.
        upgrade_options: further arguments of :func:`freqfusion.upgrade_` there.
        checkpointing: recompute activations in the backward pass instead of keeping them, in FreqFusion and where
            transformers supports it. Slower, less memory, the same gradients.
        freeze_backbone: let training leave the backbone as it is: no gradients in it, and it stays in evaluation
            mode. For a backbone with trained weights.
        **options: further arguments of the network: of :class:`~freqfusion.models.SegNeXt`, of the decoder
            (``channels``, ``finest_stride``, ``fusion_options``, ``backbone_options``), of the detector
            (``things``, ``top_level``, ``min_size``, ...), of the library's constructor, or settings of a published
            network's configuration (``num_queries=200``). Networks of other libraries also take ``frozen_norm``
            (keep the backbone's batch norms as they are), Mask2Former ``things`` and ``output`` (``"panoptic"`` or
            ``"instance"``).

    Returns:
        A :class:`~freqfusion.models.PixelModel` or an :class:`~freqfusion.models.ObjectModel`, in training mode, on
        the CPU in float32; its ``spec`` says how it is made, and its ``normalisation`` what mean and deviation its
        images have: those of the weights it starts from, else of its backbone's configuration in timm or smp, else
        ImageNet's. Of a library's model it is a wrapper, with that model as ``host``.

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
        model = wrap(from_pretrained(name).float(), num_classes, **own)
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
            model = build_own({"num_classes": num_classes, "fusion": fusion} | spec.options, spec.name)
            take_own_normalisation_(model)
            if weights is not None:
                take_weights_(model, weights)
            if backbone_weights is not None:
                load_backbone_of_(model, backbone_weights)
    if checkpointing:
        checkpoint_(model)
    if freeze_backbone:
        freeze_backbone_(model)
    return model.train()


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
            raise ValueError(NO_OBJECTS.format(type(model).__name__))
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
            raise ValueError(NO_OBJECTS.format(type(model).__name__))
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
    take_own_normalisation_(host)
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
