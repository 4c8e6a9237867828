"""Models of other libraries to train: built, filled with the weights there are to start from, and upgraded."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from freqfusion._optional import require
from freqfusion._untrusted import check_arguments, check_plain, read_json
from freqfusion.fusion import FreqFusion
from freqfusion.models.library import (
    MASK2FORMER,
    UNUSED,
    backbone_path,
    build_host,
    host_name,
    list_hosts,
)
from freqfusion.upgrade import Upgrade, find_sites, upgrade_
from freqfusion.upgrade.core import Init, upgrade_again_
from freqfusion.weights.files import list_problems, read_state_dict
from freqfusion.weights.fill import Plan, Reasons, Renaming, fill, reason_for, same_key
from freqfusion.zoo.official.mask2former import ENCODER, STAGES, Rows, swin_rows
from freqfusion.zoo.pretrained import CONFIG, from_pretrained
from freqfusion.zoo.spec import ModelSpec

CLASSIFIERS = re.compile(
    r"(.+\.)?(classifier|class_predictor|segmentation_head\.0)\.(weight|bias)|criterion\.empty_weight"
)
"""Entries of a host's state dict that depend on the number of classes."""

TABLE = "relative_position_bias_table"

UNNEEDED: Reasons = {
    r"(head|fc|classifier|classifier\.1)\.(weight|bias)": "the classifier",
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


def create_host(
    name: str,
    num_classes: int,
    fusion: str = "freqfusion",
    *,
    init: Init | None = None,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    upgrade_options: Mapping[str, Any] | None = None,
    checkpointing: bool = False,
    **config_options: Any,
) -> nn.Module:
    """A model of another library whose coarse features are brought up by a fusion method, ready to be trained.

    Args:
        name: a published network of :func:`~freqfusion.models.library.list_hosts`, or a model of a library
            as :func:`~freqfusion.models.library.build_host` takes it.
        num_classes: number of classes K, without background.
        fusion: a name of :func:`freqfusion.list_fusions`. The host's own way of enlarging (``"bilinear"`` for all
            published ones; what :func:`freqfusion.find_sites` says as ``mode`` for others) leaves it as it is.
        init: see :func:`freqfusion.upgrade_`. By default ``"paper"``; ``"identity"`` with ``weights`` of a host that
            is not upgraded, so that it starts from what it was.
        weights: to start from: a folder of :func:`freqfusion.save_pretrained`, whose upgrade, if it has one, must be
            the one asked for; or, for a model of transformers, a checkpoint of that library: a folder or a name on
            the Hugging Face hub, which is downloaded. The classifier of another number of classes is left out, with
            a warning, everything else must fit. A published network is built as its name says; a
            ``transformers:`` one as the checkpoint says.
        backbone_weights: a file of ImageNet weights for the backbone; see :func:`load_backbone_`.
        upgrade_options: further arguments of :func:`freqfusion.upgrade_`.
        checkpointing: recompute activations in the backward pass instead of keeping them, in FreqFusion and where
            transformers supports it (Swin, SegFormer). Slower, less memory, the same gradients.
        config_options: see :func:`~freqfusion.models.library.build_host`.

    Returns:
        The host, in training mode, on the CPU in float32.

    Raises:
        FileNotFoundError: if weights are not there.
        ImportError: if a library is not installed.
        TypeError: for an option that the model or the method does not have.
        ValueError: for unknown names, weights that do not fit, or nothing to checkpoint.

    Warns:
        UserWarning: if the classifier starts anew; the message names its tensors.
    """
    if weights is not None and backbone_weights is not None:
        raise ValueError("give weights or backbone_weights, not both: weights hold the backbone's too")
    options = dict(upgrade_options or {})
    host = build_host(name, num_classes, **config_options)
    plain = _is_plain(host, fusion)
    done = False
    if weights is not None and (Path(weights) / CONFIG).is_file():
        done = _load_saved_(host, Path(weights), fusion, init, options)
    elif weights is not None:
        host = _load_transformers(host, str(weights), None if name in list_hosts() else name, config_options)
    elif host_name(host) == MASK2FORMER:
        from freqfusion.models.mask2former import reset_parameters_

        reset_parameters_(host)  # type: ignore[arg-type]
    if backbone_weights is not None:
        load_backbone_(host, backbone_weights)
    if not plain and not done:
        upgrade_(host, fusion, init=init or ("paper" if weights is None else "identity"), **options)
    if checkpointing:
        _checkpoint_(host)
    return host.train()


def load_backbone_(host: nn.Module, path: str | Path) -> None:
    """Fill the backbone of a host with the weights of an ImageNet classifier; each tensor is checked. In place.

    Understood are state dicts with the names of

    - microsoft/Swin-Transformer (``layers.0.blocks.0.attn.qkv.weight``), for Swin;
    - torchvision (``layer1.0.conv1.weight``), for ResNet;
    - NVlabs/SegFormer's ``mit_b0.pth`` and so on (``block1.0.attn.kv.weight``), for SegFormer;
    - facebookresearch/ConvNeXt (``stages.0.0.dwconv.weight``), for ConvNeXt;
    - transformers, from before version 5 or since, for these four;
    - the backbone itself, for all others.

    Args:
        host: plain or upgraded.
        path: a file in a layout of :func:`~freqfusion.weights.files.read_state_dict`.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: for a safetensors file where that package is absent.
        ValueError: if the file cannot be read or does not fit, or the host's backbone is not known.
    """
    place = backbone_path(host)
    if not place:
        raise ValueError(f"it is not known which part of this {type(host).__name__} is the backbone")
    backbone = host.get_submodule(place)
    state = read_state_dict(path)
    kind = getattr(getattr(backbone, "config", None), "model_type", "")
    keys: Callable[[str], Sequence[str]] = same_key
    title = f"the {kind or type(backbone).__name__} backbone of this {host_name(host).partition(' ')[2]}"
    try:
        if kind in _ROWS:
            keys = Renaming(_ROWS[kind](_is_old(backbone.state_dict()))).own_keys
            if not any(map(keys, state)):
                state = _from_transformers(state, kind)
        _check_windows(state, backbone)
        _fill(Plan(title, backbone, keys, UNNEEDED, KEPT), state)
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded into {title}: {error}") from error


def _is_plain(host: nn.Module, fusion: str) -> bool:
    """Whether the host enlarges that way by itself."""
    modes = {site.mode for site in find_sites(host) if not site.skipped} - {"none"}
    return modes == {fusion} or (not modes and fusion == "bilinear")


def _load_saved_(
    host: nn.Module, folder: Path, fusion: str, init: Init | None, options: Mapping[str, Any]
) -> bool:
    """Take the weights of a folder of ``save_pretrained``.

    Returns:
        Whether the host is upgraded now, as the saved model was.
    """
    saved = from_pretrained(folder)
    upgrade: Upgrade | None = getattr(saved, "freqfusion_upgrade", None)
    if upgrade is not None:
        asked = {"fusion": fusion, "init": init or upgrade.init, "options": dict(options) or upgrade.options}
        has = {"fusion": upgrade.fusion, "init": upgrade.init, "options": upgrade.options}
        if asked != has:
            raise ValueError(
                f"{folder} holds a model upgraded with {has}, asked for is {asked}: ask for the same, or save the "
                "model after freqfusion.downgrade_"
            )
        upgrade_again_(host, upgrade)
    state, own = saved.state_dict(), host.state_dict()
    started = [
        key
        for key in own
        if CLASSIFIERS.fullmatch(key) and key in state and state[key].shape != own[key].shape
    ]
    _warn_of_classifier(folder, started)
    kept = {re.escape(key): "of another number of classes" for key in started}
    title = f"this {host_name(host).partition(' ')[2]}"
    try:
        _fill(
            Plan(title, host, kept=kept), {key: value for key, value in state.items() if key not in started}
        )
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}; what is set apart from the published configuration, such as num_queries, must be "
            "given"
        ) from error
    return upgrade is not None


def _load_transformers(host: Any, weights: str, spec: str | None, options: Mapping[str, Any]) -> nn.Module:
    """The host with the weights of a checkpoint of transformers.

    Args:
        host: as built, of the class that is wanted.
        weights: folder or name on the hub.
        spec: ``transformers:...`` if the checkpoint says the configuration; else it is the host's.
        options: further settings of that configuration.
    """
    if not host_name(host).startswith("transformers "):
        raise ValueError(
            f"{weights!r} is no folder that freqfusion.save_pretrained wrote (it has no {CONFIG}), the only kind of "
            f"weights that there is for a {type(host).__name__}"
        )
    settings: dict[str, Any] = {"config": host.config}
    if spec is not None:
        settings = {**ModelSpec.parse(spec).arguments, **options, "num_labels": host.config.num_labels}
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
    absent = [key for key in report["missing_keys"] if key not in misfits and not UNUSED.fullmatch(key)]
    found = list_problems(
        {
            "missing": sorted(absent),
            "of another shape": [text for key, text in misfits.items() if key not in started],
        }
    )
    if found:
        raise ValueError(
            f"{weights} does not fit this {type(host).__name__}: {found}; what is set apart from the published "
            "configuration, such as num_queries, must be given"
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


def _warn_of_classifier(weights: str | Path, started: Iterable[str]) -> None:
    names = ", ".join(sorted(started))
    if names:
        warnings.warn(
            f"{weights} is of another number of classes; these start with fresh weights: {names}",
            stacklevel=4,
        )


def _fill(plan: Plan, state: Mapping[str, Tensor]) -> None:
    """Load a state dict in the dtype of the plan's model."""
    dtype = next(plan.model.parameters()).dtype
    fill(plan, {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()})


def _checkpoint_(host: nn.Module) -> None:
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


def _swin(old: bool) -> Rows:
    rows = swin_rows(old)  # of Mask2Former, whose backbone has a prefix in both
    return {
        official.removeprefix("backbone."): tuple(
            own.removeprefix(ENCODER) for own in ((owns,) if isinstance(owns, str) else owns)
        )
        for official, owns in rows.items()
    }


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


_ROWS = {"convnext": _convnext, "resnet": _resnet, "segformer": _segformer, "swin": _swin}
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
