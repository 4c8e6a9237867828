"""Save a model with its upgrade, and get it back from its files alone."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqfusion._files import write_atomically
from freqfusion._optional import IMPORT_VARIABLE, require
from freqfusion._untrusted import building, check_plain, read_json
from freqfusion.data.normalisation import IMAGENET, Normalisation
from freqfusion.models.base import Model, normalisation_of, set_normalisation_
from freqfusion.upgrade.core import upgrade_again_
from freqfusion.weights.fill import match
from freqfusion.zoo.attributes import (
    ATTRIBUTES,
    FROZEN,
    NORMALISATION,
    find_attributes,
    freeze_as,
    restore_settings,
)
from freqfusion.zoo.build import build
from freqfusion.zoo.published import PUBLISHED
from freqfusion.zoo.spec import ModelSpec, spec_of

CONFIG = "freqfusion.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
FORMAT = 1
_PACKAGES = {"smp": "segmentation-models-pytorch", "fusion": "freqfusion"}


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    host: str | None = None,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write a model, upgraded or not, to a folder: ``model.safetensors`` and ``freqfusion.json``.

    The JSON names the constructor with its arguments, the upgrade, what was set afterwards (thresholds, image sizes,
    frozen norms), the mean and deviation of the images, and the versions; nothing is pickled. Weights that the
    constructor would start from are left out.
    Both files are written beside their place and moved there.

    Args:
        model: the model whose weights are saved.
        directory: made if it does not exist; the two files in it are replaced.
        host: how the model is made before its upgrade, as :class:`~freqfusion.zoo.spec.ModelSpec`
            reads it, e.g. ``"torchvision:maskrcnn_resnet50_fpn?num_classes=5"``. Not needed for models of
            transformers and segmentation_models_pytorch, which know it themselves, and for those that
            :func:`freqfusion.create_model` made.
        classes: names of what it predicts; by default those that it has in ``model.spec.classes``.

    Returns:
        The folder.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if the model does not tell how it is made, or ``host`` makes another one: with other weights, or
            with layers that differ in more than plain values.
    """
    safetensors = require("safetensors.torch", "hub")
    model = getattr(model, "host", model) if isinstance(model, Model) else model
    description = describe_model(model, host, classes)
    weights = _unshared(model)
    data: bytes = safetensors.save(weights, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        **description,
        "versions": _versions(description["spec"]["name"]),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        text = json.dumps(config, indent=2)
    except TypeError as error:
        raise ValueError(f"the model's arguments cannot be written as JSON: {error}") from error
    directory = Path(directory)
    write_atomically(directory / WEIGHTS, data)
    write_atomically(directory / CONFIG, text.encode())
    return directory


def from_pretrained(
    directory: str | Path,
    *,
    host: str | Callable[[], nn.Module] | None = None,
    revision: str | None = None,
) -> nn.Module:
    """Make a model again as :func:`save_pretrained` wrote it: constructor, upgrade, weights. In evaluation mode.

    A folder that somebody else wrote runs no code, opens no other file and no connection: its weights are in it,
    so arguments that name others, an address, a path or a repository are refused, and so are models that are larger
    than the weights.

    Args:
        directory: a folder; or, where there is none of that name, a repository of the Hugging Face hub.
        host: for a model whose constructor is Python code of your own: that constructor, or its
            ``package.module:function``. A file never gets code run that only it names.
        revision: branch, tag or commit of the repository.

    Returns:
        The model, on the CPU. Nothing is half-loaded: it is returned whole or not at all.

    Raises:
        FileNotFoundError: if a file is missing.
        ImportError: if safetensors, huggingface_hub or the host's library is not installed.
        ValueError: if a file was changed, is cut off, comes from a later format, does not fit the model, or asks for
            something outside the folder.

    Warns:
        UserWarning: if another version of freqfusion or of the host wrote it.
    """
    safetensors = require("safetensors.torch", "hub")
    folder = Path(directory)
    if not folder.is_dir():
        folder = _download(str(directory), revision)
    config, data = _read(folder)
    _warn_of_versions(config["versions"], config["spec"]["name"], folder)
    model = rebuild_model(config, host, str(folder / CONFIG), len(data))
    try:
        weights: dict[str, Tensor] = safetensors.load(data)
    except Exception as error:  # its errors are of a class of its own, and further ones of torch
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): copy it again") from error
    _check_fit(weights, model, str(folder / WEIGHTS), "the model")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights:
            tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights, strict=False)  # whether they fit was checked above
    return model.eval()


def is_saved(name: str | Path) -> bool:
    """Whether a name stands for a folder of :func:`save_pretrained`, or may stand for a repository of the hub."""
    text = str(name)
    if (Path(text) / CONFIG).is_file():
        return True
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not Path(text).exists()


def describe_model(
    model: nn.Module, host: str | None = None, classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """The spec of a model and what it was set to afterwards, in the plain values of the JSON.

    The model is made again, and compared, so that nothing is written down that cannot be read.

    Args:
        model: see :func:`save_pretrained`.
        host: see :func:`save_pretrained`.
        classes: see :func:`save_pretrained`.

    Raises:
        ValueError: if the model does not tell how it is made, or if that makes another one.
    """
    spec = spec_of(model, host)
    if classes is not None:
        spec = replace(spec, classes=tuple(map(str, classes)))
    if spec.is_known:  # what could not be read again is not written
        ModelSpec.from_json(spec.to_json(), "the model")
    maker = f"{spec.name} with these options"
    with torch.random.fork_rng(devices=[]):  # code of the user's too: it made the model that is saved
        made = build(spec)
    set_normalisation_(made, normalisation_of(model))
    settings: dict[str, Any] = {FROZEN: freeze_as(model, made)}
    _check_fit(model.state_dict(), made, "the saved model", maker)
    settings[ATTRIBUTES] = find_attributes(model, made, maker)
    restore_settings(made, {ATTRIBUTES: settings[ATTRIBUTES]}, maker)
    settings = {name: value for name, value in settings.items() if value}
    return with_normalisation({"spec": spec.to_json(), "settings": settings}, model)


def with_normalisation(description: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A description that says, in its settings, what images a model is made for; nothing of ImageNet's."""
    found, settings = normalisation_of(model), dict(description.get("settings", {}))
    settings.pop(NORMALISATION, None)
    if found != IMAGENET:
        settings[NORMALISATION] = {"mean": list(found.mean), "std": list(found.std)}
    return {**description, "settings": settings} if settings or "settings" in description else {**description}


def rebuild_model(
    description: Any,
    host: str | Callable[[], nn.Module] | None = None,
    source: str = "the description",
    size: int | None = None,
) -> nn.Module:
    """A model with fresh weights, as :func:`describe_model` says it was made.

    Args:
        description: of the model; a file may hold it that is somebody else's.
        host: see :func:`from_pretrained`.
        source: where the description comes from, for messages.
        size: bytes of the weights that belong to it, where these are somebody else's; a model with many more
            parameters is not built.

    Raises:
        ImportError: if the host's library is not installed.
        ValueError: if only the description names the code that makes the model, or if it asks for something outside.
    """
    spec, settings = read_description(description, source)
    with (
        contextlib.nullcontext()
        if size is None
        else building(size, f"{source}: the model cannot be made as it says: ")
    ):
        if host is None or isinstance(host, str):
            if host is not None:
                spec = replace(ModelSpec.parse(host), upgrade=spec.upgrade, classes=spec.classes)
            else:
                refuse_code(spec, source)
            model = build(spec)
        else:
            model = host()
            if spec.upgrade is not None:
                upgrade_again_(model, spec.upgrade)
            model.spec = spec  # type: ignore[assignment]
    restore_settings(model, settings, source)
    return model


def refuse_code(spec: ModelSpec, source: str) -> None:
    """Refuse a model that is made by code that only a file names, and not the user.

    Raises:
        ValueError: naming the code.
    """
    if not spec.is_known and spec.library not in os.environ.get(IMPORT_VARIABLE, "").split(","):
        raise ValueError(
            f"{source} says that the model is made by {spec.name}, code that is not run because a file names it; if "
            f"you trust it, pass it as host=, or on the command line add --import {spec.library}"
        )


def read_description(description: Any, source: str) -> tuple[ModelSpec, dict[str, Any]]:
    """Spec and settings in what :func:`describe_model` gave, checked.

    Raises:
        ValueError: for another form, or what would fetch or open something outside.
    """
    parts = description if isinstance(description, Mapping) else {}
    spec = ModelSpec.from_json(parts.get("spec"), source)
    settings = parts.get("settings") or {}
    kinds: dict[str, type] = {FROZEN: list, ATTRIBUTES: dict, NORMALISATION: dict}
    if not isinstance(settings, dict) or any(
        not isinstance(settings.get(name, kind()), kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"{source} was changed: settings is {settings!r:.80}. Copy it again")
    check_plain(settings, source)
    if NORMALISATION in settings:
        Normalisation.from_json(settings[NORMALISATION], source)
    return spec, settings


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    host: str | None = None,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload with freqfusion",
) -> str:
    """Upload a model with a model card to the Hugging Face hub.

    Args:
        model: see :func:`save_pretrained`.
        repo_id: ``"user/name"``; made if it does not exist.
        host: see :func:`save_pretrained`.
        private: of a repository that is made.
        token: of the hub; by default the one you are logged in with.
        commit_message: of the upload.

    Returns:
        Address of the commit.
    """
    hub = require("huggingface_hub", "hub")
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((save_pretrained(model, folder, host=host) / CONFIG).read_text(encoding="utf-8"))
        Path(folder, CARD).write_text(_model_card(repo_id, model, config), encoding="utf-8")
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(commit.commit_url)


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """Contiguous CPU tensors, one name for each: of weights that several modules share the first one stays."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach().cpu().contiguous().clone()
    return kept


def _check_fit(weights: Mapping[str, Tensor], model: nn.Module, source: str, target: str) -> None:
    """Raise unless the weights are those of the model; shared ones may come under one of their names."""
    problems = match(weights, model.state_dict(keep_vars=True)).problems
    if problems:
        raise ValueError(f"{source} does not fit {target}: {problems}")


def _download(repo_id: str, revision: str | None) -> Path:
    hub = require("huggingface_hub", "hub")
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:  # the hub's errors are of these kinds
        raise FileNotFoundError(
            f"there is no folder {repo_id!r}, and no such repository could be fetched from the hub: {error}"
        ) from error


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The parsed JSON and the bytes of the weights, which are those that were written."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; give a folder that freqfusion.save_pretrained wrote"
            )
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or "format" not in config:
        raise ValueError(f"{path} was not written by freqfusion.save_pretrained")
    if config["format"] != FORMAT:
        raise ValueError(
            f"{path} has the format {config['format']!r}, this freqfusion reads {FORMAT}; update it: "
            "python -m pip install --upgrade freqfusion"
        )
    for key, kind in (("versions", dict), ("sha256", str)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{path} was changed: {key} is {config.get(key)!r}. Copy it again")
    read_description(config, str(path))
    data = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that {CONFIG} was written with: it is cut off, changed or of "
            "another model. Copy both files again"
        )
    return config, data


def _versions(name: str) -> dict[str, str]:
    """Versions of torch, this package and the library that a model's name begins with."""
    source = name.rpartition(":")[0] or ("transformers" if name in PUBLISHED else "")
    versions = {"torch": str(torch.__version__)}
    for package in ("freqfusion", _PACKAGES.get(source, source)):
        with contextlib.suppress(
            metadata.PackageNotFoundError, ValueError
        ):  # code of the user's has no version
            versions[package] = metadata.version(package)
    return versions


def _warn_of_versions(written: dict[str, str], model: str, folder: Path) -> None:
    here = _versions(model)
    changed = [
        f"{name} {version} (here {here.get(name, 'none')})"
        for name, version in written.items()
        if name != "torch" and version != here.get(name)
    ]
    if changed:
        warnings.warn(f"{folder} was written by {', '.join(changed)}; check its results", stacklevel=3)


def _model_card(repo_id: str, model: nn.Module, config: dict[str, Any]) -> str:
    hub = require("huggingface_hub", "hub")
    upgrade, made = config["spec"]["upgrade"], f"`{config['spec']['name']}`"
    if upgrade:
        made += f", upgraded with `{upgrade['fusion']}` at {len(upgrade['sites'])} sites (init `{upgrade['init']}`)"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    mean, std = (", ".join(f"{value:g}" for value in values) for values in normalisation_of(model))
    data = hub.ModelCardData(library_name="freqfusion", tags=["freqfusion"])
    return f"""---
{data.to_yaml()}
---
# {repo_id}

{made}. {parameters:,} parameters. Written with {versions}. Images in [0, 1] are normalised with the mean
{mean} and the deviation {std}.

```python
import freqfusion

model = freqfusion.from_pretrained("{repo_id}")
```

Install it with `pip install "freqfusion[hosts,hub]"`. The weights are safetensors, and `{CONFIG}` says how the
model is made; nothing in this repository is run.
"""
