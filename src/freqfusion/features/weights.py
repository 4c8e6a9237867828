"""Released weights of the upsamplers: where their authors publish them, and how their files name the tensors."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freqfusion._optional import require
from freqfusion.features.base import FeatureUpsampler
from freqfusion.weights.files import load_plain, read_state_dict
from freqfusion.weights.fill import fill_, match


class Released(NamedTuple):
    """Weights that the authors of a method publish."""

    address: str
    """Of the file: ``https://...``, or ``user/name/file`` in a repository on the Hugging Face hub."""
    licence: str
    encoder: str
    """Whose features it is for; ``""`` if for any."""
    options: Mapping[str, Any] = MappingProxyType({})
    """Arguments of the method's constructor that it was trained with, where they are not the default ones."""


_NAF = "https://github.com/valeoai/NAF/releases/download/model/"
_ANYUP = "https://github.com/wimmerth/anyup/releases/download/"
_JAFAR = "https://github.com/PaulCouairon/JAFAR/releases/download/Weights/"
_FEATUP = "https://marhamilresearch4.blob.core.windows.net/feature-upsampling-public/pretrained/"
_FEATUP_ENCODERS = {
    "dino_s": ("dino16", "DINO ViT-S/16"),
    "dinov2_s": ("dinov2", "DINOv2 ViT-S/14"),
    "vit_s": ("vit", "ViT-S/16"),
    "clip_b": ("clip", "CLIP ViT-B/16"),
    "resnet50": ("resnet50", "ResNet-50"),
}
_FEATUP_ALL = _FEATUP_ENCODERS | {"maskclip_b": ("maskclip", "MaskCLIP ViT-B/16")}

RELEASED: dict[str, dict[str, Released]] = {
    "naf": {"naf_release": Released(f"{_NAF}naf_release.pth", "Apache-2.0", "")},
    "anyup": {
        "anyup_multi_backbone": Released(f"{_ANYUP}checkpoint_v2/anyup_multi_backbone.pth", "CC-BY-4.0", ""),
        "anyup_paper": Released(f"{_ANYUP}checkpoint/anyup_paper.pth", "CC-BY-4.0", ""),
    },
    "jafar": {
        encoder: Released(f"{_JAFAR}{encoder}.pth", "Apache-2.0", encoder)
        for encoder in (
            "vit_small_patch14_dinov2.lvd142m",
            "vit_small_patch14_reg4_dinov2",
            "vit_base_patch14_dinov2.lvd142m",
            "vit_base_patch16_224",
            "vit_base_patch16_224.dino",
            "vit_base_patch16_clip_384",
            "vit_base_patch16_siglip_512.v2_webli",
        )
    },
    "featup_jbu": {
        name + suffix: Released(
            f"{_FEATUP}{folder}{file}_jbu_stack_cocostuff.ckpt", "MIT", encoder, {"norm": not suffix}
        )
        for suffix, folder, names in (("", "", _FEATUP_ENCODERS), ("_no_norm", "no_norm/", _FEATUP_ALL))
        for name, (file, encoder) in names.items()
    },
    "loftup": {
        "dinov2_s": Released("haiwen/loftup-dinov2s/pytorch_model.bin", "MIT", "DINOv2 ViT-S/14"),
        "dinov2_s_reg": Released(
            "haiwen/loftup-dinov2s_reg/pytorch_model.bin", "MIT", "DINOv2 ViT-S/14, registers"
        ),
        "dinov2_b": Released("haiwen/loftup-dinov2b/pytorch_model.bin", "MIT", "DINOv2 ViT-B/14"),
        "dinov2_b_reg": Released(
            "haiwen/loftup-dinov2b_reg/pytorch_model.bin", "MIT", "DINOv2 ViT-B/14, registers"
        ),
        "clip_b": Released("haiwen/loftup-clip/pytorch_model.bin", "MIT", "CLIP, 512 channels"),
        "siglip_b": Released("haiwen/loftup-siglip/pytorch_model.bin", "MIT", "SigLIP, 768 channels"),
        "siglip2_b": Released("haiwen/loftup-siglip2/pytorch_model.bin", "MIT", "SigLIP 2, 768 channels"),
    },
    "uplift": {
        "dinov2_s": Released(
            "UPLiFT-upsampler/uplift_dinov2-s14/uplift_dinov2-s14.safetensors", "MIT", "DINOv2 ViT-S/14"
        ),
        "dinov3_splus": Released(
            "UPLiFT-upsampler/uplift_dinov3-splus16/uplift_dinov3-splus16.safetensors",
            "MIT",
            "DINOv3 ViT-S+/16",
            {"patch_size": 16},
        ),
    },
}
"""By method, then by the name that follows ``released:``."""

_PREFIXES = ("", "upsampler.", "network.")
"""Before the names of an upsampler's tensors: in most authors' files, and in those of a training."""
_AUTHORS_PREFIX = {"featup_jbu": "upsampler."}
_USUAL_CHANNELS = (384, 512, 768, 1024, 2048)


def find_released(name: str, weights: str | Path) -> Released | None:
    """What ``"released:NAME"`` stands for; None for a file or an address.

    Raises:
        ValueError: for an unknown name.
    """
    kind, colon, title = str(weights).partition(":")
    if not colon or kind != "released":
        return None
    known = RELEASED.get(name, {})
    if title not in known:
        choice = f"choose one of: {', '.join(known)}" if known else "no weights of it are known"
        raise ValueError(f"{name} has no released weights {title!r}; {choice}")
    return known[title]


def load_weights_(upsampler: FeatureUpsampler, name: str, weights: str | Path) -> None:
    """Fill an upsampler; every tensor is checked. In place.

    Args:
        name: of the method.
        weights: as :func:`~freqfusion.features.create_upsampler` takes them.
    """
    released = find_released(name, weights)
    source = weights if released is None else _download(released.address)
    state: Mapping[str, Tensor] = read_state_dict(source)
    own = upsampler.state_dict()
    if not own:
        raise ValueError(f"{name} has no weights to load; leave weights out")
    prefix = max(_PREFIXES, key=lambda prefix: sum(prefix + key in state for key in own))
    state = upsampler.own_state(_entries(state, prefix))
    title = f"{name} ({type(upsampler).__name__})" + (
        f" for {upsampler.channels} channels" if upsampler.channels else ""
    )
    try:
        fill_(upsampler, state, title)
    except ValueError as error:
        raise ValueError(f"{source}: {error}{_fitting(state)}") from None
    if released is not None:
        upsampler.licence = released.licence
    elif prefix == _AUTHORS_PREFIX.get(name, "") and name in RELEASED and not _is_of_a_training(source):
        upsampler.licence = next(iter(RELEASED[name].values())).licence
    if upsampler.licence:
        print(f"weights of {name}: {upsampler.licence}", file=sys.stderr)


def _download(address: str) -> str | Path:
    if address.startswith(("http://", "https://")):
        return address  # which the reader of files downloads
    hub = require("huggingface_hub", "hub")
    user, repository, file = address.split("/")
    try:
        return Path(hub.hf_hub_download(f"{user}/{repository}", file))
    except Exception as error:  # of several libraries
        raise OSError(
            f"could not download {file} of https://huggingface.co/{user}/{repository}: {error}; download it by other "
            "means and give its path"
        ) from error


def _entries(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The upsampler's tensors among those of a training, which may hold the encoder's too."""
    entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if prefix == "upsampler.":  # FeatUp's normalises the features in its encoder
        norm = "model.1.norm."
        entries |= {
            "norm." + key.removeprefix(norm): value for key, value in state.items() if key.startswith(norm)
        }
    return entries


def _is_of_a_training(source: str | Path) -> bool:
    """Whether ``freqfusion fit`` wrote a file."""
    path = Path(source)
    if path.suffix == ".safetensors" or not path.is_file():
        return False
    content = load_plain(path)
    return isinstance(content, Mapping) and "task" in content and "state_dict" in content


def _fitting(state: Mapping[str, Tensor]) -> str:
    """Which upsampler the tensors are of, as the end of a message; ``""`` where that is not known."""
    from freqfusion.features.catalog import create_upsampler  # which imports this module

    for name in RELEASED:
        for channels in _USUAL_CHANNELS:
            with torch.device("meta"):
                upsampler = create_upsampler(name, channels)
            if not match(state, upsampler.state_dict(keep_vars=True)).problems:
                return f". The file fits {name}" + (f" for {channels} channels" if upsampler.channels else "")
            if upsampler.channels is None:
                break
    return ""
