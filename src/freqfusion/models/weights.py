"""Loading backbone weights from a file or an address."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from freqfusion._optional import require

LISTED_KEYS = 8
"""How many keys of each kind an error message names."""


def load_backbone_weights(backbone: nn.Module, source: str | Path) -> None:
    """Load weights into ``backbone``, in place; every key must match.

    Understood layouts: a plain state dict of the backbone; a full model, whose ``backbone.`` entries are
    taken; either of them wrapped as ``{"state_dict": ...}``. An ImageNet classifier (``head.*``) is left
    out. Files are read with ``weights_only=True``, or with safetensors where the name ends in
    ``.safetensors``.

    Args:
        backbone: the module to fill, e.g. ``MSCAN("t")``.
        source: a path, or an ``http(s)://`` address, which is downloaded once into
            ``torch.hub.get_dir()/checkpoints``.

    Raises:
        ImportError: for a safetensors file where that package is absent.
        FileNotFoundError: if there is no such file.
        OSError: if the download fails.
        ValueError: if the file is not a readable set of weights, or does not fit the backbone.
    """
    address = str(source)
    path = _download(address) if address.startswith(("http://", "https://")) else Path(source)
    state = _backbone_entries(_read(path), path)
    _check_fit(backbone, state, path)
    backbone.load_state_dict(state)


def _download(url: str) -> Path:
    """The local copy of ``url``; part of the address's hash keeps equal file names of two sites apart."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{digest}-{Path(urlparse(url).path).name}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise OSError(
                f"could not download {url}: {error}; download it by other means and give its path"
            ) from error
    return path


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        load = require("safetensors.torch", "hub").load_file
    else:
        load = _load_pickle
    try:
        return load(path)
    except Exception as error:  # a foreign file makes the unpickler fail in almost any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as weights ({reason}). Expected a state dict saved with torch.save or "
            "safetensors; was the file downloaded completely?"
        ) from error


def _load_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _backbone_entries(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds {type(content).__name__!r}, expected a state dict: names and tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} is not a state dict: entry {key!r} is a {type(value).__name__}, expected a tensor"
            )
    if any(key.startswith("backbone.") for key in content):
        prefix = "backbone."
        return {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    return {key: value for key, value in content.items() if not key.startswith("head.")}


def _check_fit(backbone: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = backbone.state_dict()
    misfits = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": misfits,
    }
    found = []
    for kind, keys in problems.items():
        if keys:
            more = f" and {len(keys) - LISTED_KEYS} more" if len(keys) > LISTED_KEYS else ""
            found.append(f"{len(keys)} {kind}: {', '.join(keys[:LISTED_KEYS])}{more}")
    if found:
        raise ValueError(
            f"{path} does not fit this {type(backbone).__name__}; is it another variant? " + "; ".join(found)
        )
