"""Encoders by name, whose features are upsampled."""

import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from freqfusion._optional import require
from freqfusion.weights.files import read_state_dict
from freqfusion.weights.fill import fill_
from freqfusion.zoo.libraries import build_library
from freqfusion.zoo.normalisation import read_processor
from freqfusion.zoo.spec import ModelSpec
from freqfusion.zoo.start import load_transformers

CLASSIFIER = re.compile(r"(head|head_dist|head_drop|fc_norm|fc|classifier|norm)\.(.+\.)?(weight|bias)")
"""Entries of a timm classifier that an encoder may have no place for."""

POOLED = re.compile(r"(pooler|head)\..+")
"""Entries of a model of transformers that only make a vector of its features."""
KEPT = {r".+\.num_batches_tracked": "counts of training steps, without effect"}


def load_encoder(name: str, weights: str | Path | None = None) -> nn.Module:
    """An encoder of timm or transformers without its classifier, frozen, for :func:`extract_features`.

    Vision transformers of timm are built for images of any size where they can be.

    Args:
        name: a network of ``timm.list_models()``, such as ``vit_small_patch14_dinov2``, or a class of transformers,
            such as ``transformers:Dinov2Model``; ``?option=value&...`` may follow.
        weights: of a network of timm: a file or an address, with its names there or as timm converts them from
            (DINOv2's and DINOv3's own, OpenAI's CLIP, ...), or ``timm`` or ``timm:TAG``, which timm downloads once.
            Of transformers: a checkpoint, folder or name on the hub; its image processor's mean and deviation are
            kept with the model. By default the weights are fresh.

    Returns:
        The model in evaluation mode; its parameters need no gradient.

    Raises:
        FileNotFoundError: if there are no such weights.
        ImportError: if the library is not installed.
        OSError: if a download that was asked for fails.
        TypeError: for an option that the model does not have.
        ValueError: for an unknown name, or weights that do not fit.
    """
    spec = ModelSpec.parse(name)
    if spec.library == "transformers":
        model = build_library(spec)
        if weights is not None:
            if Path(weights).is_file():
                raise ValueError(
                    f"{weights} is a file; of a model of transformers give the folder that it wrote, with config.json"
                )
            model = load_transformers(model, str(weights), spec, POOLED)
            model.pretrained_cfg = read_processor(Path(weights))  # type: ignore[assignment]
    elif spec.library:
        raise ValueError(
            f"{name!r} is no encoder that can be read: name a network of timm, such as vit_small_patch14_dinov2, or "
            "one of transformers, such as transformers:Dinov2Model"
        )
    else:
        model = _of_timm(spec, weights)
    return model.requires_grad_(False).eval()


def _of_timm(spec: ModelSpec, weights: str | Path | None) -> nn.Module:
    timm = require("timm", "vision")
    if not timm.is_model(spec.name):
        raise ValueError(
            f"timm has no network {spec.name!r}; timm.list_models() lists what there is, and a model of transformers "
            "is written transformers:Dinov2Model"
        )
    library, _, tag = str(weights).partition(":")
    name = f"{spec.name.partition('.')[0]}.{tag}" if library == "timm" and tag else spec.name
    options = {"num_classes": 0, "pretrained": library == "timm", **spec.options}
    try:
        model: nn.Module = timm.create_model(name, **{"dynamic_img_size": True, **options})
    except TypeError:  # it has no such option
        model = timm.create_model(name, **options)
    except RuntimeError as error:  # an unknown tag
        raise ValueError(f"timm has no weights {weights!r} of {spec.name}: {error}") from error
    if weights is not None and library != "timm":
        own = model.state_dict()
        convert: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = read_state_dict(weights)
        try:
            state = state if convert is None else convert(state, model)
            unneeded = {
                re.escape(key): "the classifier"
                for key in state
                if key not in own and CLASSIFIER.fullmatch(key)
            }
            fill_(model, state, f"the encoder {spec.name}", unneeded=unneeded, kept=KEPT)
        except Exception as error:  # timm's conversion of a foreign file fails in almost any way
            reason = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{weights} cannot be loaded; is it of another encoder? {reason}") from error
    return model
