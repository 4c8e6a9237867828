"""The weights that a network starts from: of saved models, files, official releases and transformers."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from freqfusion._optional import require
from freqfusion._untrusted import check_arguments, check_plain, read_json
from freqfusion.fusion import FreqFusion
from freqfusion.models.base import Model, normalisation_of, set_normalisation_
from freqfusion.models.encoders import RESNETS, TimmEncoder
from freqfusion.models.library import UNUSED, LibraryModel, backbone_path, host_name, timm_name
from freqfusion.upgrade import Upgrade, Upgraded, upgrade_
from freqfusion.upgrade.core import upgrade_again_
from freqfusion.weights.backbones import load_backbone_, name_in_timm
from freqfusion.weights.files import read_state_dict
from freqfusion.weights.fill import fill_, list_problems
from freqfusion.zoo.normalisation import (
    normalisation_in_timm,
    take_normalisation_of_file_,
    take_normalisation_of_processor_,
)
from freqfusion.zoo.official import find_family, read_official
from freqfusion.zoo.pretrained import CONFIG, from_pretrained, is_saved
from freqfusion.zoo.published import PUBLISHED
from freqfusion.zoo.spec import ModelSpec

CLASSIFIERS = re.compile(
    r"(.+\.)?(classifier|class_predictor|segmentation_head\.0|conv_seg|cls_logits|box_predictor\.\w+"
    r"|mask_predictor\.(2|mask_fcn_logits)|decode_head\.fusions\.gate|semantic_branch\.logits)\.(weight|bias)|criterion\.empty_weight"
)
"""Entries of a state dict that depend on the number of classes."""


def take_weights_of_library(
    host: nn.Module, spec: ModelSpec, weights: str | Path, asked: Upgrade | None
) -> tuple[nn.Module, bool]:
    """The host with weights, and whether it is upgraded now, as the saved model was."""
    is_transformers = host_name(host).startswith("transformers ")
    if is_saved(weights) and not (is_transformers and not Path(weights).is_dir() and not _is_on_hub(weights)):
        saved: nn.Module | None = from_pretrained(weights)
    elif Path(weights).is_file():
        saved = _read_official(Path(weights))
    elif is_transformers:
        host = load_transformers(host, str(weights), None if spec.name in PUBLISHED else spec)
        host.spec = replace(spec.without_outside(), options=_options_of(host, spec))  # type: ignore[assignment]
        take_normalisation_of_processor_(host, Path(weights))
        return host, False
    else:
        raise _no_weights(host, weights)
    upgrade: Upgrade | None = getattr(saved, "freqfusion_upgrade", None)
    if saved is None:
        state = _own_entries(read_state_dict(weights))
        if asked is not None and any("fusions." in key for key in state):
            upgrade_(host, asked.fusion, init=asked.init or "paper", **asked.options)  # type: ignore[arg-type]
    else:
        state = saved.state_dict()
    if upgrade is not None:
        has = {"fusion": upgrade.fusion, "init": upgrade.init, "options": upgrade.options}
        wanted = None
        if asked is not None:
            wanted = {
                "fusion": asked.fusion,
                "init": asked.init or upgrade.init,
                "options": asked.options or upgrade.options,
            }
        if wanted != has:
            raise ValueError(
                f"{weights} holds a model upgraded with {has}, you asked for {wanted or 'the plain model'}: ask for "
                "the same, or save the model after freqfusion.downgrade_"
            )
        upgrade_again_(host, upgrade)
    _take_state_(host, state, weights)
    _take_normalisation_(host, saved, weights)
    return host, getattr(host, "freqfusion_upgrade", None) is not None


def _options_of(host: Any, spec: ModelSpec) -> dict[str, Any]:
    """The options of a model whose checkpoint decided on its configuration."""
    return spec.options if spec.name in PUBLISHED else host.config.to_dict()


def take_weights_(model: nn.Module, weights: str | Path) -> None:
    """Fill a network of this package."""
    if is_saved(weights):
        saved: nn.Module | None = from_pretrained(weights)
    elif Path(weights).is_file():
        saved = _read_official(Path(weights))
    else:
        raise _no_weights(model, weights)
    state = _own_entries(read_state_dict(weights)) if saved is None else saved.state_dict()
    _take_state_(model, state, weights)
    _take_normalisation_(model, saved, weights)


def _take_normalisation_(model: nn.Module, saved: nn.Module | None, weights: str | Path) -> None:
    """That of a model whose weights were taken, or of the file that held them."""
    if saved is None:
        take_normalisation_of_file_(model, Path(weights))
    else:
        set_normalisation_(model, normalisation_of(saved))


def _no_weights(model: nn.Module, weights: str | Path) -> Exception:
    if Path(weights).is_dir():
        return ValueError(
            f"{str(weights)!r} has no {CONFIG}, so it is not a folder of freqfusion.save_pretrained, the only kind "
            f"of folder that a {type(model).__name__} takes weights from"
        )
    return FileNotFoundError(
        f"there are no weights at {str(weights)!r}: give a file, a folder of freqfusion.save_pretrained, or a "
        "repository of the hub as user/name"
    )


def _read_official(path: Path) -> nn.Module | None:
    return None if find_family(read_state_dict(path)) is None else read_official(path)[0].model


def _is_on_hub(name: str | Path) -> bool:
    """Whether a repository of the hub holds a model of :func:`freqfusion.push_to_hub`."""
    try:
        return bool(require("huggingface_hub", "hub").file_exists(str(name), CONFIG))
    except Exception:  # not reachable: whoever loads from there says so
        return False


def _own_entries(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's entries in a checkpoint of ``freqfusion fit``; else all."""
    for prefix in ("network.host.", "network."):
        if all(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _take_state_(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load all but the classifier of another number of classes; each tensor is checked."""
    own = model.state_dict()
    started = [
        key
        for key in own
        if CLASSIFIERS.fullmatch(key) and key in state and state[key].shape != own[key].shape
    ]
    _warn_of_classifier(source, started)
    kept = {re.escape(key): "of another number of classes" for key in started}
    kept[r".+\.num_batches_tracked"] = "counts of training steps, without effect"
    try:
        fill_(
            model,
            {key: value for key, value in state.items() if key not in started},
            f"this {type(model).__name__}",
            kept=kept,
        )
    except ValueError as error:
        raise ValueError(
            f"{source}: {error}; pass every setting that differs from the published configuration, such as "
            "num_queries"
        ) from error


def _warn_of_classifier(source: str | Path, started: Iterable[str]) -> None:
    names = ", ".join(sorted(started))
    if names:
        warnings.warn(
            f"{source} has another number of classes; these start with fresh weights: {names}",
            stacklevel=5,
        )


def _backbone_of(model: nn.Module) -> nn.Module:
    place = backbone_path(model)
    if not place:
        raise ValueError(f"cannot tell which part of this {type(model).__name__} is the backbone")
    backbone = model.get_submodule(place)
    return getattr(backbone, "body", backbone)  # of a detector, under its pyramid


def freeze_backbone_(model: Model) -> None:
    """Let training leave the backbone as it is."""
    host = model.host if isinstance(model, LibraryModel) else model
    backbone = _backbone_of(host)
    if any(isinstance(module, Upgraded) for module in backbone.modules()):
        raise ValueError(
            f"the backbone of this {type(host).__name__} cannot be frozen: the part that is known as such holds "
            "fusions too"
        )
    model.freeze_(backbone)


def load_backbone_of_(model: nn.Module, source: str | Path) -> None:
    backbone = _backbone_of(model)
    kind = getattr(getattr(backbone, "config", None), "model_type", "") or type(backbone).__name__
    title = f"the {kind} backbone of this {host_name(model).partition(' ')[2]}"
    names: dict[str, str] = {}
    if isinstance(backbone, TimmEncoder):
        names, backbone = {"timm": backbone.name}, backbone.network
    elif getattr(backbone, "name", None) in RESNETS.values():
        names = {"torchvision": str(backbone.name), "timm": str(backbone.name)}
    elif (name := timm_name(model)) is not None:
        names = {"timm": name}
    load_backbone_(backbone, source, title, names)
    if str(source).partition(":")[0] == "timm":
        published = normalisation_in_timm(name_in_timm(str(source), names["timm"]))
        if published is not None:
            set_normalisation_(model, published)


def load_transformers(
    host: Any, weights: str, spec: ModelSpec | None, unused: re.Pattern[str] = UNUSED
) -> nn.Module:
    """The host with the weights of a checkpoint of transformers.

    Args:
        host: as built, of the class that is wanted.
        weights: folder or name on the hub.
        spec: if the checkpoint says the configuration, further settings of it; else that is the host's.
        unused: names of parameters that the checkpoint may lack.
    """
    settings: dict[str, Any] = {"config": host.config}
    if spec is not None:
        settings = {**spec.options, "num_labels": host.config.num_labels}
    try:
        _check_transformers(weights)
        loaded, report = type(host).from_pretrained(
            weights, ignore_mismatched_sizes=True, output_loading_info=True, **settings
        )
    except OSError as error:
        raise FileNotFoundError(
            f"{weights!r} is neither a folder of freqfusion.save_pretrained nor a checkpoint that transformers can "
            f"load: {error}"
        ) from error
    misfits = {
        key: f"{key} {tuple(theirs)} instead of {tuple(ours)}"
        for key, theirs, ours in report["mismatched_keys"]
    }
    started = [key for key in misfits if CLASSIFIERS.fullmatch(key)]
    absent = [key for key in report["missing_keys"] if key not in misfits and not unused.fullmatch(key)]
    found = list_problems(
        {
            "missing": sorted(absent),
            "of another shape": [text for key, text in misfits.items() if key not in started],
        }
    )
    if found:
        raise ValueError(
            f"{weights} does not fit this {type(host).__name__}: {found}; pass every setting that differs from "
            "the published configuration, such as num_queries"
        )
    _warn_of_classifier(weights, started)
    if report["unexpected_keys"]:
        found = list_problems({"tensors": sorted(report["unexpected_keys"])})
        warnings.warn(f"{weights} has more than a {type(host).__name__}; left out were {found}", stacklevel=3)
    model: nn.Module = loaded.float()
    return model


def _check_transformers(weights: str) -> None:
    """Refuse a checkpoint of transformers that asks for something outside."""
    config, _ = require("transformers", "hosts").PretrainedConfig.get_config_dict(weights)
    check_plain(config, weights)
    check_arguments(config, weights, "transformers")
    folder = Path(weights)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{weights} holds an adapter of PEFT for a model elsewhere: merge it into its model first"
        )
    for index in folder.glob("*.index.json"):
        content = read_json(index)
        files = content.get("weight_map", {}) if isinstance(content, dict) else {}
        outside = [name for name in files.values() if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise ValueError(f"{index} names the file {outside[0]!r}, expected files of its own folder")


def checkpoint_(model: nn.Module) -> None:
    host = model.host if isinstance(model, LibraryModel) else model
    found = False
    for module in host.modules():
        if isinstance(module, FreqFusion):
            module.use_checkpoint = found = True
        elif getattr(module, "supports_gradient_checkpointing", False):
            found = True
            enable = getattr(module, "activation_checkpointing_enable", None)  # its name since transformers 5
            (enable or module.gradient_checkpointing_enable)({"use_reentrant": False})  # type: ignore[operator]
    if not found:
        raise ValueError(
            f"there is nothing to checkpoint in this {type(host).__name__}: it has neither FreqFusion nor a part for "
            "which transformers supports it; leave out checkpointing"
        )
