"""Save a model with its upgrade, and get it back from its files alone."""

import contextlib
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqfusion._files import write_atomically
from freqfusion._optional import require
from freqfusion._untrusted import (
    MAX_CLASSES,
    building,
    check_arguments,
    check_plain,
    read_json,
    without_outside,
)
from freqfusion.upgrade import Upgrade, Upgraded
from freqfusion.upgrade.core import upgrade_again_
from freqfusion.zoo.attributes import (
    ATTRIBUTES,
    FROZEN,
    find_attributes,
    freeze_as,
    restore_settings,
)
from freqfusion.zoo.spec import ModelSpec, check_spec

CONFIG = "freqfusion.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
FORMAT = 1
_PARTS: dict[str, type] = {
    "host": dict,
    "host.source": str,
    "host.name": str,
    "host.arguments": dict,
    "versions": dict,
    "sha256": str,
    "upgrade": dict,
    "upgrade.fusion": str,
    "upgrade.init": str,
    "upgrade.options": dict,
    "upgrade.sites": list,
    "settings": dict,
    "settings.frozen_norms": list,
    "settings.attributes": dict,
    "classes": list,
}
"""What the JSON holds, checked in this order; a model that is not upgraded has null for ``upgrade``."""
_OPTIONAL = ("settings", "settings.frozen_norms", "settings.attributes", "classes")
_PACKAGES = {"smp": "segmentation-models-pytorch", "fusion": "freqfusion"}


def save_pretrained(model: nn.Module, directory: str | Path, *, host: str | None = None) -> Path:
    """Write a model, upgraded or not, to a folder: ``model.safetensors`` and ``freqfusion.json``.

    The JSON names the constructor with its arguments, the upgrade, what was set afterwards (thresholds, image sizes,
    frozen norms) and the versions; nothing is pickled. Weights that the constructor would start from are left out.
    Both files are written beside their place and moved there. If the model has an attribute ``classes``, the names of
    what it predicts, these are kept too.

    Args:
        model: the model whose weights are saved.
        directory: made if it does not exist; the two files in it are replaced.
        host: how the model is made before its upgrade, as :func:`~freqfusion.zoo.spec.load_model`
            takes it, e.g. ``"torchvision:maskrcnn_resnet50_fpn?num_classes=5"``. Not needed for models of
            transformers and segmentation_models_pytorch, which know it themselves, for those of
            ``freqfusion.models``, and for those that ``load_model`` made.

    Returns:
        The folder.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if it cannot be told how the model is made, or ``host`` makes another one: with other weights, or
            with layers that differ in more than plain values.
    """
    safetensors = require("safetensors.torch", "hub")
    description = describe_model(model, host)
    weights = _unshared(model)
    data: bytes = safetensors.save(weights, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        **description,
        "versions": _versions(description["host"]["source"]),
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
    _warn_of_versions(config["versions"], config["host"]["source"], folder)
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


def describe_model(model: nn.Module, host: str | None = None) -> dict[str, Any]:
    """How a model is made, upgraded and set, and what its classes are called, in the plain values of the JSON.

    The model is made again, and compared, so that nothing is written down that cannot be read.

    Args:
        model: see :func:`save_pretrained`.
        host: likewise.

    Raises:
        ValueError: if it cannot be told how the model is made, or if that makes another one.
    """
    spec = ModelSpec.parse(host) if host is not None else _describe(model)
    if spec.is_known:
        spec = ModelSpec(spec.source, spec.name, without_outside(spec.arguments, spec.source))
    upgrade: Upgrade | None = getattr(model, "freqfusion_upgrade", None)
    description: dict[str, Any] = {
        "host": {"source": spec.source, "name": spec.name, "arguments": spec.arguments},
        "upgrade": None
        if upgrade is None
        else {
            "fusion": upgrade.fusion,
            "init": upgrade.init,
            "options": upgrade.options,
            "sites": list(upgrade.sites),
        },
    }
    classes = getattr(model, "classes", None)
    if isinstance(classes, (list, tuple)):
        description["classes"] = [str(name) for name in classes]
    _check_description(description, "the model")
    maker = f"{spec.source}:{spec.name} with these arguments"
    with torch.random.fork_rng(devices=[]):  # code of the user's too: it made the model that is saved
        made = rebuild_model(description, host=spec.build)
    settings: dict[str, Any] = {FROZEN: freeze_as(model, made)}
    _check_fit(model.state_dict(), made, "the saved model", maker)
    settings[ATTRIBUTES] = find_attributes(model, made, maker)
    restore_settings(made, {ATTRIBUTES: settings[ATTRIBUTES]}, maker)
    settings = {name: value for name, value in settings.items() if value}
    return description | ({"settings": settings} if settings else {})


def rebuild_model(
    description: Mapping[str, Any],
    host: str | Callable[[], nn.Module] | None = None,
    source: str = "the description",
    size: int | None = None,
) -> nn.Module:
    """A model with fresh weights, as :func:`describe_model` says it was made.

    Args:
        description: of the model.
        host: see :func:`from_pretrained`.
        source: where the description comes from, for messages.
        size: bytes of the weights that belong to it, where these are somebody else's; a model with many more
            parameters is not built.

    Raises:
        ImportError: if the host's library is not installed.
        ValueError: if only the description names the code that makes the model, or if it asks for something outside.
    """
    _check_description(description, source)
    spec = ModelSpec(**description["host"])

    def bounds() -> contextlib.AbstractContextManager[None]:
        if size is None:
            return contextlib.nullcontext()
        return building(size, f"{source}: the model cannot be made as it says: ")

    if host is None:
        if not spec.is_known:
            raise ValueError(
                f"{source} says that the model is made by {spec.source}:{spec.name}, code that is not "
                "run because a file names it; if you trust it, pass it as host="
            )
        with bounds():
            model = spec.build()
    else:
        model = ModelSpec.parse(host).build() if isinstance(host, str) else host()
    if description["upgrade"] is not None:
        with bounds():
            upgrade_again_(model, Upgrade(**description["upgrade"]))
    restore_settings(model, description.get("settings", {}), source)
    if "classes" in description:
        model.classes = tuple(description["classes"])  # type: ignore[assignment]
    return model


def _check_description(description: Mapping[str, Any], source: str) -> None:
    """Refuse what has another form, or asks for something outside."""
    check_plain(description, source)
    for key, kind in _PARTS.items():
        if key in ("versions", "sha256"):  # of the file, not of the model
            continue
        _check_part(description, key, kind, source)
    classes = description.get("classes", [])
    if len(classes) > MAX_CLASSES or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{source} was changed: classes must be at most {MAX_CLASSES} texts. Copy it again")
    spec = ModelSpec(**description["host"])
    if spec.is_known:
        check_spec(spec, source)
    if description["upgrade"] is not None:
        check_arguments(description["upgrade"]["options"], source)


def _check_part(config: Mapping[str, Any], key: str, kind: type, source: str | Path) -> None:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    plain = key.startswith("upgrade") and config.get("upgrade", "absent") is None
    if not isinstance(value, kind) and not plain and not (value is None and key in _OPTIONAL):
        raise ValueError(f"{source} was changed: {key} is {value!r}. Copy it again")


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


def _describe(model: nn.Module) -> ModelSpec:
    """How the model is made, if that can be known."""
    spec = getattr(model, "freqfusion_host", None)
    if isinstance(spec, ModelSpec):
        return spec
    made_by = getattr(model, "made_by", None)  # of our own networks
    if isinstance(made_by, tuple):
        return ModelSpec("freqfusion", *made_by)
    host = type(model).host_class() if isinstance(model, Upgraded) else type(model)
    library = host.__module__.partition(".")[0]
    config: Any = getattr(model, "config", None)
    if library == "transformers" and config is not None:
        return ModelSpec("transformers", host.__name__, config.to_dict())
    if library == "segmentation_models_pytorch" and config is not None:
        return ModelSpec("smp", host.__name__, {**config, "encoder_weights": None})
    raise ValueError(
        f"it is not known how this {host.__name__} is made; say it with host=, for example "
        'host="torchvision:maskrcnn_resnet50_fpn?num_classes=5" or host="my_package.models:build"'
    )


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """Contiguous CPU tensors, one name for each: of weights that several modules share the first one stays."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach().cpu().contiguous().clone()
    return kept


def _check_fit(weights: dict[str, Tensor], model: nn.Module, source: str, target: str) -> None:
    """Raise unless the weights are those of the model; shared ones may come under one of their names."""
    expected = model.state_dict(keep_vars=True)
    present = {id(expected[name]) for name in weights if name in expected}
    problems = [
        f"lacks {name}"
        for name, tensor in expected.items()
        if name not in weights and id(tensor) not in present
    ]
    problems += [f"has {name}, which is unknown" for name in weights if name not in expected]
    problems += [
        f"has {name} of shape {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems += [
        f"has {name} in {tensor.dtype} instead of {expected[name].dtype}"
        for name, tensor in weights.items()
        if name in expected and tensor.is_floating_point() != expected[name].is_floating_point()
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{source} does not fit {target}: it {'; it '.join(problems[:4])}{more}")


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
    for key, kind in _PARTS.items():
        _check_part(config, key, kind, path)
    data = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that {CONFIG} was written with: it is cut off, changed or of "
            "another model. Copy both files again"
        )
    return config, data


def _versions(source: str) -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for package in ("freqfusion", _PACKAGES.get(source, source)):
        with contextlib.suppress(
            metadata.PackageNotFoundError, ValueError
        ):  # code of the user's has no version
            versions[package] = metadata.version(package)
    return versions


def _warn_of_versions(written: dict[str, str], source: str, folder: Path) -> None:
    here = _versions(source)
    changed = [
        f"{name} {version} (here {here.get(name, 'none')})"
        for name, version in written.items()
        if name != "torch" and version != here.get(name)
    ]
    if changed:
        warnings.warn(f"{folder} was written by {', '.join(changed)}; check its results", stacklevel=3)


def _model_card(repo_id: str, model: nn.Module, config: dict[str, Any]) -> str:
    host, upgrade = config["host"], config["upgrade"]
    made = f"`{host['source']}:{host['name']}`"
    what = (
        f"{made}, upgraded with `{upgrade['fusion']}` at {len(upgrade['sites'])} sites (init `{upgrade['init']}`)"
        if upgrade
        else made
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    return f"""---
library_name: freqfusion
tags:
- freqfusion
---
# {repo_id}

{what}. {parameters:,} parameters. Written with {versions}.

```python
import freqfusion

model = freqfusion.from_pretrained("{repo_id}")
```

Install it with `pip install "freqfusion[hosts,hub]"`. The weights are safetensors, and `{CONFIG}` says how the
model is made; nothing in this repository is run.
"""
