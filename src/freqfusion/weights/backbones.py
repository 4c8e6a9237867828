"""Backbones from the weights of ImageNet classifiers: where these come from, and their names in each library."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from freqfusion._optional import require
from freqfusion.weights.files import read_state_dict
from freqfusion.weights.fill import OwnKeys, Reasons, Renaming, fill_, reason_for
from freqfusion.weights.packages import read_package

Rows = dict[str, str | tuple[str, ...]]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TABLE = "relative_position_bias_table"

UNNEEDED: Reasons = {
    r"(head|fc|classifier|classifier\.1)\.(.+\.)?(weight|bias)": "the classifier",
    r"(norm|layernorm)\.(weight|bias)": "the norm before the classifier",
    r".+\.(relative_position_index|attn_mask)": "positions in a window, which follow from its size",
}
"""Entries of a classifier's state dict that a backbone has no place for."""

KEPT: Reasons = {
    r"(swin\.)?layernorm\..+": "a norm after the last stage, which is not used",
    r"hidden_states_norms\..+": "norms for each stage, which a classifier does not have",
    r".+\.num_batches_tracked": "counts of training steps, without effect",
    r".+\.relative_position_index": "positions in a window, which follow from its size",
}
"""Entries of a backbone's state dict that may be absent from a file."""

_RESNETS = {
    ((2, 2, 2, 2), "basic"): "resnet18",
    ((3, 4, 6, 3), "basic"): "resnet34",
    ((3, 4, 6, 3), "bottleneck"): "resnet50",
    ((3, 4, 23, 3), "bottleneck"): "resnet101",
}


def load_backbone_(
    backbone: nn.Module,
    source: str | Path,
    title: str | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Fill a backbone with the weights of an ImageNet classifier; each tensor is checked. In place.

    Understood are state dicts with the names of

    - the backbone itself, or of a whole model that has it under ``backbone.``;
    - timm's classifier of the same name, for a backbone of timm;
    - microsoft/Swin-Transformer (``layers.0.blocks.0.attn.qkv.weight``), torchvision
      (``layer1.0.conv1.weight``), NVlabs/SegFormer (``block1.0.attn.kv.weight``), facebookresearch/ConvNeXt
      (``stages.0.0.dwconv.weight``) and transformers, from before version 5 or since, for these four of transformers.

    Position embeddings of a plain vision transformer of timm for another image size are resampled.

    Args:
        backbone: the module to fill, such as ``MSCAN("t")``.
        source: a file or an address, see :func:`~freqfusion.weights.read_state_dict`; or ``torchvision:TAG``, such as
            ``torchvision:IMAGENET1K_V1``, or ``timm:TAG``, such as ``timm:a1_in1k`` (``timm`` for its default),
            which that library downloads once; or ``package:NAME``, an installed package with weights, see
            :func:`~freqfusion.weights.packages.read_package`.
        title: what the backbone is, for messages.
        names: of the backbone in torchvision and timm, for the tags.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if safetensors, torchvision, timm or a package with weights is needed and absent.
        OSError: if a download fails.
        ValueError: if the file cannot be read or does not fit, or the library has no such weights.
    """
    kind = getattr(getattr(backbone, "config", None), "model_type", "")
    title = title or f"this {type(backbone).__name__}"
    state = _published(str(source), {**_names_of(backbone), **names}, title)
    if state is None:
        state = _backbone_entries(read_state_dict(source))
    unneeded = dict(UNNEEDED)
    try:
        if kind in _ROWS:
            own_keys: OwnKeys = Renaming(_ROWS[kind](_is_old(backbone.state_dict()))).own_keys
            if not any(map(own_keys, state)):
                state = _from_transformers(state, kind)
        else:
            own_keys = _loose_keys(backbone)
            if "timm" in names and "torchvision" not in names:
                state = _resample_positions(state, backbone)
                rest = [key for key in _timm_keys(names["timm"]) if not own_keys(key)]
                unneeded |= {re.escape(key): "layers after the last map" for key in rest}
        _check_windows(state, backbone)
        fill_(backbone, state, "it", own_keys, unneeded, KEPT)
    except ValueError as error:
        raise ValueError(f"{source} cannot be loaded into {title}; is it another variant? {error}") from error


def _published(source: str, names: Mapping[str, str], title: str) -> dict[str, Tensor] | None:
    """The weights that torchvision, timm or a package publishes for a network; None for a file."""
    library, colon, tag = source.partition(":")
    if library == "package" and colon:
        return read_package(tag, names.get("timm"), title)
    if library not in ("timm", "torchvision") or not (colon or library == "timm"):
        return None
    name = names.get(library)
    if name is None:
        raise ValueError(f"{library} has no weights for {title}; give a file")
    if library == "torchvision":
        kinds = require("torchvision.models", "vision").get_model_weights(name)
        if tag not in kinds.__members__:
            raise ValueError(
                f"torchvision has no weights {tag!r} of {name}; it has {', '.join(kinds.__members__)}"
            )
        return dict(kinds[tag].get_state_dict(progress=True, check_hash=True))
    network: nn.Module = require("timm", "vision").create_model(name_in_timm(source, name), pretrained=True)
    return network.state_dict()


def name_in_timm(source: str, network: str) -> str:
    """The name, with its tag, of the weights that ``timm`` or ``timm:TAG`` stands for."""
    tag = source.partition(":")[2]
    if not tag or require("timm", "vision").is_model(tag):
        return tag or network
    return f"{network.partition('.')[0]}.{tag}"


def _names_of(backbone: nn.Module) -> dict[str, str]:
    """The names that other libraries have for a residual network of transformers."""
    config: Any = getattr(backbone, "config", None)
    if getattr(config, "model_type", "") != "resnet":
        return {}
    name = _RESNETS.get((tuple(config.depths), config.layer_type))
    return {} if name is None else {"torchvision": name, "timm": name}


def _backbone_entries(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "backbone."
    if any(key.startswith(prefix) for key in state):
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _loose_keys(backbone: nn.Module) -> OwnKeys:
    """Own names, also where timm's networks of feature maps write ``stages_0`` for ``stages.0``."""

    def loose(key: str) -> str:
        return key.removeprefix("model.").replace(".", "_")

    own = {loose(key): key for key in backbone.state_dict()}
    return lambda key: (own[loose(key)],) if loose(key) in own else ()


def _timm_keys(name: str) -> list[str]:
    """Names in timm's whole classifier."""
    with torch.device("meta"):
        network: nn.Module = require("timm", "vision").create_model(name, pretrained=False)
    return list(network.state_dict())


def swin_rows(old: bool) -> Rows:
    """Names of microsoft/Swin-Transformer and of transformers 5, or as these were before."""
    swin = "" if old else "swin."
    block, own_block = "layers.{}.blocks.{}.", swin + "encoder.layers.{}.blocks.{}."
    attention = own_block + ("attention.self." if old else "attention.")
    qkv = ("query", "key", "value") if old else ("q_proj", "k_proj", "v_proj")
    positions = attention if old else attention + "relative_position_bias."
    rows: Rows = {
        "patch_embed.proj.{}": swin + "embeddings.patch_embeddings.projection.{}",
        "patch_embed.norm.{}": swin + "embeddings.norm.{}",
        block + "norm1.{}": own_block + "layernorm_before.{}",
        block + "norm2.{}": own_block + "layernorm_after.{}",
        block + "attn.qkv.{}": tuple(attention + name + ".{}" for name in qkv),
        block + "attn.relative_position_{}": positions + "relative_position_{}",
        block + "attn.proj.{}": own_block + ("attention.output.dense.{}" if old else "attention.o_proj.{}"),
        block + "mlp.fc1.{}": own_block + ("intermediate.dense.{}" if old else "mlp.fc1.{}"),
        block + "mlp.fc2.{}": own_block + ("output.dense.{}" if old else "mlp.fc2.{}"),
        "layers.{}.downsample.": swin + "encoder.layers.{}.downsample.",
    }
    return rows | {f"norm{i}.": f"hidden_states_norms.{stage}." for i, stage in enumerate(STAGES)}


def _resnet(old: bool) -> Rows:
    rows: Rows = {
        "conv1.{}": "embedder.embedder.convolution.{}",
        "bn1.{}": "embedder.embedder.normalization.{}",
    }
    for i in range(4):
        unit, own_unit = f"layer{i + 1}.{{}}.", f"encoder.stages.{i}.layers.{{}}."
        rows[unit + "downsample.0.{}"] = own_unit + "shortcut.convolution.{}"
        rows[unit + "downsample.1.{}"] = own_unit + "shortcut.normalization.{}"
        for j in range(3):
            rows[f"{unit}conv{j + 1}.{{}}"] = f"{own_unit}layer.{j}.convolution.{{}}"
            rows[f"{unit}bn{j + 1}.{{}}"] = f"{own_unit}layer.{j}.normalization.{{}}"
    return rows


def _segformer(old: bool) -> Rows:
    rows: Rows = {}
    for i in range(4):
        block, patches = f"block{i + 1}.{{}}.", f"patch_embed{i + 1}."
        own, own_block = f"stages.{i}.", f"stages.{i}.blocks.{{}}."
        names: Rows = {
            patches + "proj.{}": own + "patch_embeddings.proj.{}",
            patches + "norm.{}": own + "patch_embeddings.layer_norm.{}",
            block + "norm1.{}": own_block + "layernorm_before.{}",
            block + "attn.q.{}": own_block + "attention.q_proj.{}",
            block + "attn.kv.{}": (own_block + "attention.k_proj.{}", own_block + "attention.v_proj.{}"),
            block + "attn.proj.{}": own_block + "attention.o_proj.{}",
            block + "attn.sr.{}": own_block + "attention.sequence_reduction.sequence_reduction.{}",
            block + "attn.norm.{}": own_block + "attention.sequence_reduction.layer_norm.{}",
            block + "norm2.{}": own_block + "layernorm_after.{}",
            block + "mlp.fc1.{}": own_block + "mlp.fc1.{}",
            block + "mlp.dwconv.dwconv.{}": own_block + "mlp.dwconv.dwconv.{}",
            block + "mlp.fc2.{}": own_block + "mlp.fc2.{}",
            f"norm{i + 1}.{{}}": own + "layer_norm.{}",
        }
        if old:
            own_block, attention = f"encoder.block.{i}.{{}}.", f"encoder.block.{i}.{{}}.attention."
            names |= {
                patches + "proj.{}": f"encoder.patch_embeddings.{i}.proj.{{}}",
                patches + "norm.{}": f"encoder.patch_embeddings.{i}.layer_norm.{{}}",
                block + "norm1.{}": own_block + "layer_norm_1.{}",
                block + "attn.q.{}": attention + "self.query.{}",
                block + "attn.kv.{}": (attention + "self.key.{}", attention + "self.value.{}"),
                block + "attn.proj.{}": attention + "output.dense.{}",
                block + "attn.sr.{}": attention + "self.sr.{}",
                block + "attn.norm.{}": attention + "self.layer_norm.{}",
                block + "norm2.{}": own_block + "layer_norm_2.{}",
                block + "mlp.fc1.{}": own_block + "mlp.dense1.{}",
                block + "mlp.dwconv.dwconv.{}": own_block + "mlp.dwconv.dwconv.{}",
                block + "mlp.fc2.{}": own_block + "mlp.dense2.{}",
                f"norm{i + 1}.{{}}": f"encoder.layer_norm.{i}.{{}}",
            }
        rows |= names
    return rows


def _convnext(old: bool) -> Rows:
    block, own_block = "stages.{}.{}.", "encoder.stages.{}.layers.{}."
    return {
        "downsample_layers.0.0.{}": "embeddings.patch_embeddings.{}",
        "downsample_layers.0.1.{}": "embeddings.layernorm.{}",
        "downsample_layers.{}.": "encoder.stages.{}.downsampling_layer.",
        block + "dwconv.{}": own_block + "dwconv.{}",
        block + "norm.{}": own_block + "layernorm.{}",
        block + "pwconv1.{}": own_block + "pwconv1.{}",
        block + "pwconv2.{}": own_block + "pwconv2.{}",
        block + "gamma": own_block + "layer_scale_parameter",
        **{f"norm{i}.": f"hidden_states_norms.{stage}." for i, stage in enumerate(STAGES)},
    }


_ROWS = {"convnext": _convnext, "resnet": _resnet, "segformer": _segformer, "swin": swin_rows}
"""For the backbones of transformers, by their ``model_type``: names of the original and of transformers, as they are
now or, if asked, as they were before version 5."""


def _is_old(keys: Iterable[str]) -> bool:
    """Whether names are those that transformers had before version 5."""
    return any(".attention.self." in key for key in keys)


def _from_transformers(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A state dict of transformers, whose files mix the names of its versions, under the names of the original."""
    own, before = _bare_rows(kind, old=False), _bare_rows(kind, old=True)
    current = Renaming(
        {was: now for key in own for was, now in zip(before[key], own[key], strict=True) if was != now}
    )
    bare: dict[str, Tensor] = {}
    for key, value in state.items():
        key = key.removeprefix(f"{kind}.")
        if not reason_for(key, UNNEEDED):
            bare[next(iter(current.own_keys(key)), key)] = value
    return Renaming(own).official_state(bare)


def _bare_rows(kind: str, old: bool) -> dict[str, tuple[str, ...]]:
    """The rows without the prefix that transformers has in some places, such as ``swin.``."""
    return {
        official: tuple(own.removeprefix(f"{kind}.") for own in ((owns,) if isinstance(owns, str) else owns))
        for official, owns in _ROWS[kind](old).items()
    }


def _resample_positions(state: dict[str, Tensor], backbone: Any) -> dict[str, Tensor]:
    """The state with the position embeddings of a plain transformer at the backbone's grid, by timm's function.

    Others than those of a square grid are left as they are, so that the check of shapes refuses them.
    """
    network: Any = getattr(backbone, "model", None)  # timm's, under what takes its features
    own = getattr(network, "pos_embed", None)
    key = next((key for key in ("pos_embed", "model.pos_embed") if key in state), None)
    if key is None or own is None or not state[key].ndim == own.ndim == 3:
        return state
    prefix = 0 if getattr(network, "no_embed_class", False) else getattr(network, "num_prefix_tokens", 0)
    count = state[key].shape[1] - prefix
    if state[key].shape == own.shape or count < 1 or math.isqrt(count) ** 2 != count:
        return state
    resample = require("timm.layers", "vision").resample_abs_pos_embed
    grid = network.patch_embed.grid_size
    return {**state, key: resample(state[key], grid, num_prefix_tokens=prefix)}


def _check_windows(state: Mapping[str, Tensor], backbone: nn.Module) -> None:
    """Say it plainly where a Swin is of another window."""
    windows = [
        {(math.isqrt(len(value)) + 1) // 2 for key, value in entries.items() if key.endswith(TABLE)}
        for entries in (state, backbone.state_dict())
    ]
    if all(windows) and windows[0] != windows[1]:
        theirs, ours = (", ".join(map(str, sorted(sizes))) for sizes in windows)
        raise ValueError(
            f"its attention has windows of {theirs}, the backbone of {ours}; take the weights of the same window, or "
            f'build it with backbone_config={{"window_size": {theirs}}}'
        )
