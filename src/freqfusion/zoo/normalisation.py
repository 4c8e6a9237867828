"""What images a network is made for: by its backbone's configuration, or by the weights that it starts from."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from freqfusion._optional import require
from freqfusion._untrusted import read_json
from freqfusion.data.normalisation import IMAGENET, Normalisation
from freqfusion.models.base import normalisation_of, set_normalisation_
from freqfusion.models.encoders import TimmEncoder
from freqfusion.models.library import timm_name
from freqfusion.weights.files import load_plain
from freqfusion.zoo.attributes import NORMALISATION


def own_normalisation(model: nn.Module) -> Normalisation | None:
    """What the configuration of a model's backbone says, in timm or segmentation_models_pytorch; None if nothing.

    smp states it for its trained encoders, and reads that from where their weights are: so only with those.
    """
    encoder = next((part for part in model.modules() if isinstance(part, TimmEncoder)), None)
    if encoder is not None:
        return _in(encoder.network.pretrained_cfg)
    config: Any = getattr(model, "config", None)
    if isinstance(config, Mapping) and config.get("encoder_weights"):
        encoders = require("segmentation_models_pytorch", "hosts").encoders
        return _in(encoders.get_preprocessing_params(config["encoder_name"], config["encoder_weights"]))
    name = timm_name(model)
    return None if name is None else normalisation_in_timm(name)


def normalisation_in_timm(name: str) -> Normalisation | None:
    """What timm says of a network, whose tag may follow a dot; None if nothing."""
    config: Any = require("timm", "vision").get_pretrained_cfg(name)
    return None if config is None else _in(vars(config))


def take_own_normalisation_(model: nn.Module) -> None:
    """Take the normalisation of the backbone's configuration, unless whoever made the model chose one. In place."""
    own = own_normalisation(model)
    if own is not None and normalisation_of(model) == IMAGENET:
        set_normalisation_(model, own)


def take_normalisation_(model: nn.Module, description: Mapping[str, Any], source: str) -> None:
    """Take the normalisation of what :func:`~freqfusion.zoo.pretrained.describe_model` gave of the weights. In place.

    Where it says none, that is ImageNet's, which all had before networks had their own; detectors of libraries, which
    never had another than the library's, keep theirs.

    Raises:
        ValueError: for one of another form.
    """
    settings = description.get("settings") or {}
    if NORMALISATION in settings:
        set_normalisation_(model, Normalisation.from_json(settings[NORMALISATION], source))
    elif not hasattr(getattr(model, "transform", None), "image_mean") or own_normalisation(model) is not None:
        set_normalisation_(model, IMAGENET)


def take_normalisation_of_file_(model: nn.Module, path: Path) -> None:
    """Take that of a checkpoint of ``freqfusion fit``; bare weights say nothing. In place."""
    content = None if path.suffix == ".safetensors" else load_plain(path, mapped=zipfile.is_zipfile(path))
    settings = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    if isinstance(settings, Mapping) and "network" in settings:
        network = settings["network"]
        take_normalisation_(model, network if isinstance(network, Mapping) else {}, str(path))


def read_processor(folder: Path) -> dict[str, Any]:
    """Mean and deviation of the images, of a folder of transformers that says them; else None for each."""
    path = folder / "preprocessor_config.json"
    content = read_json(path) if path.is_file() else {}
    return {name: content.get(f"image_{name}") for name in ("mean", "std")}


def take_normalisation_of_processor_(model: nn.Module, folder: Path) -> None:
    """Take that of a folder of transformers, if it says one. In place.

    Raises:
        ValueError: if what it says is not three means and deviations.
    """
    found = read_processor(folder)
    if None not in found.values():
        set_normalisation_(model, Normalisation.from_json(found, str(folder)))


def _in(config: Mapping[str, Any]) -> Normalisation | None:
    mean, std = config.get("mean"), config.get("std")
    return None if mean is None or std is None else Normalisation.of(mean, std)
