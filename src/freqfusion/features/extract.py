"""Features of the encoders of timm and transformers as maps, whatever tokens, grids and layouts these have inside."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freqfusion.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from freqfusion.features.base import Size, normalise
from freqfusion.ops._checks import check_filled, check_map, check_whole
from freqfusion.ops.resize import resize

FINAL_NORMS = ("layernorm", "norm", "post_layernorm")
"""What the vision transformers of transformers call the norm after the last layer."""


def encoder_normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per colour, in [0, 1], of the images that an encoder wants.

    They are those of ``model.pretrained_cfg``, which timm's networks have and
    :func:`~freqfusion.zoo.encoders.load_encoder` gives to those of transformers, and ImageNet's for others.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("mean") or IMAGENET_MEAN), tuple(config.get("std") or IMAGENET_STD)


def encoder_options(name: str, model: nn.Module) -> dict[str, Any]:
    """Options of :func:`~freqfusion.features.create_upsampler` that follow from the encoder.

    JAFAR and UPLiFT take the image normalised as the encoder does, and UPLiFT asks for its patch.

    Args:
        name: of the upsampler.
    """
    if name not in ("jafar", "uplift"):
        return {}
    mean, std = encoder_normalisation(model)
    patch = {"patch_size": max(encoder_patch(model))} if name == "uplift" else {}
    return {"mean": mean, "std": std, **patch}


def encoder_patch(model: nn.Module) -> Size:
    """Rows and columns of the image for each pixel of an encoder's features (of its last stage).

    Raises:
        ValueError: for a model whose features :func:`extract_features` cannot read.
    """
    patch: Any = None
    if hasattr(model, "feature_info"):
        strides = [level["reduction"] for level in model.feature_info]  # type: ignore[union-attr]
        patch = max(strides)
        if len(set(strides)) == 1:
            patch = getattr(getattr(model, "patch_embed", None), "patch_size", patch)
    elif hasattr(model, "config"):
        config: Any = model.config
        patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if patch is None:
        raise _unreadable(model, "expected a network of timm, without features_only, or one of transformers")
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return height, width


@torch.no_grad()
def extract_features(
    model: nn.Module,
    image: Tensor,
    layers: Sequence[int] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Features of an image from a frozen encoder, as a map; without gradients.

    Class and register tokens are left out. An image that the patches do not divide is resized bilinearly to the next
    multiple of the patch (of a network of stages: of its coarsest stride), so that the map still covers all of it,
    evenly. Position embeddings of another grid are resampled by the library.

    Args:
        model: of timm, a plain vision transformer or a network of stages; or a plain vision transformer of
            transformers (ViT, DeiT, BEiT, DINOv2, with registers or not, DINOv3, SigLIP, CLIP and their like). In
            evaluation mode.
        image: ``(B, 3, H, W)`` in [0, 1].
        layers: indices of the layers (of stages, in a network of stages) whose features are joined along the
            channels, in this order; negative ones count from the last. Each is followed by the encoder's final norm,
            as in DINOv2's linear probes. By default the last alone.
        mean: per colour, in [0, 1]; by default :func:`encoder_normalisation`.
        std: per colour, in [0, 1]; by default of the same.

    Returns:
        ``(B, C, ceil(H / P), ceil(W / P))`` with patches of P pixels, of the dtype of the model.

    Raises:
        TypeError: for an integer image.
        ValueError: for an image of another shape or of a size that the model refuses, a layer that it does not have,
            a model in training mode, or one whose features cannot be read.
    """
    check_map("image", image)
    check_filled("image", image)
    if image.shape[1] != 3:
        raise ValueError(f"image must have 3 channels (B, 3, H, W) in [0, 1], got {image.shape[1]}")
    if model.training:
        raise ValueError(
            f"this {type(model).__name__} is in training mode, where features vary: call its .eval()"
        )
    defaults = encoder_normalisation(model)
    image = normalise(image, defaults[0] if mean is None else mean, defaults[1] if std is None else std)
    image = image.to(next(model.parameters()).dtype)
    if hasattr(model, "forward_intermediates"):
        read = _of_timm
    elif hasattr(model, "base_model") and hasattr(model, "config"):
        read = _of_transformers
    else:
        raise _unreadable(model, "expected a network of timm, without features_only, or one of transformers")
    try:
        maps = read(model, image, layers)
    except (AssertionError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _unreadable(model, f"it fails on an image of {tuple(image.shape[-2:])} ({error})") from error
    sizes = {tuple(x.shape[-2:]) for x in maps}
    if len(sizes) > 1:
        raise ValueError(f"layers {layers} have maps of different sizes, {sorted(sizes)}; choose one of them")
    return torch.cat(maps, dim=1) if len(maps) > 1 else maps[0]


def _of_timm(model: Any, image: Tensor, layers: Sequence[int] | None) -> list[Tensor]:
    patches = getattr(model, "patch_embed", None)
    image = _in_whole_patches(image, encoder_patch(model))
    fixed = getattr(patches, "img_size", None) if getattr(patches, "strict_img_size", False) else None
    if fixed is not None and tuple(image.shape[-2:]) != tuple(fixed):
        raise ValueError(
            f"this {type(model).__name__} is made for images of {tuple(fixed)}, got {tuple(image.shape[-2:])}; build "
            "it with timm.create_model(..., dynamic_img_size=True), which most vision transformers take, or for that "
            "size with img_size=..., or resize the image"
        )
    chosen = _resolve(layers, len(model.feature_info), model)
    wanted = sorted(set(chosen))
    maps = model.forward_intermediates(
        image, indices=wanted, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    by_layer = dict(zip(wanted, maps, strict=True))
    return [by_layer[index] for index in chosen]


def _of_transformers(model: Any, image: Tensor, layers: Sequence[int] | None) -> list[Tensor]:
    host = model if hasattr(model, "embeddings") else model.base_model  # without a classifier
    host = getattr(host, "vision_model", host)  # of a model of images and texts
    config = getattr(host.config, "vision_config", host.config)
    arguments = inspect.signature(host.forward).parameters
    depth = getattr(config, "num_hidden_layers", None)
    lists = (part for part in host.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)
    blocks = next(lists, None)
    if blocks is None or "spatial_shapes" in arguments:
        raise _unreadable(
            model, "expected a plain vision transformer, with one list of layers and one patch size"
        )
    for name in ("mask_ratio", "num_detection_tokens"):  # of ViTMAE and YOLOS
        if hasattr(config, name):
            raise _unreadable(
                model, f"it has {name}, so its last tokens are not those of the patches in order"
            )
    patch = encoder_patch(model)
    image = _in_whole_patches(image, patch)
    chosen = _resolve(layers, len(blocks), model)
    # Taken from the layers: what transformers returns as the last hidden state is normalised in some models only.
    tokens: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tokens[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[index].register_forward_hook(keep(index)) for index in set(chosen)]
    resampled = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in arguments else {}
    try:
        host(image, **resampled)
    finally:
        for handle in handles:
            handle.remove()
    norm = next((getattr(host, name) for name in FINAL_NORMS if getattr(host, name, None)), nn.Identity())
    height, width = (length // side for length, side in zip(image.shape[-2:], patch, strict=True))
    found = [tokens[index] for index in chosen]
    if any(x.ndim != 3 or len(x) != len(image) or x.shape[1] < height * width for x in found):
        raise _unreadable(
            model,
            f"expected at least {height} x {width} tokens (B, N, C) of its layers, got {tuple(found[0].shape)}",
        )
    # Class and register tokens come first.
    return [norm(x)[:, -height * width :].mT.unflatten(2, (height, width)).contiguous() for x in found]


def _unreadable(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"cannot read the features of this {type(model).__name__}: {reason}; take them yourself, as a map "
        "(B, C, h, w), and give that to the upsampler"
    )


def _in_whole_patches(image: Tensor, patch: Size) -> Tensor:
    size = [-(-length // side) * side for length, side in zip(image.shape[-2:], patch, strict=True)]
    return resize(image, size, "bilinear")


def _resolve(layers: Sequence[int] | None, depth: int, model: nn.Module) -> list[int]:
    """Indices from 0 of the layers that are wanted."""
    wanted = [-1] if layers is None else [check_whole("layers", index) for index in layers]
    if not wanted or not all(-depth <= index < depth for index in wanted):
        raise ValueError(
            f"layers {wanted} are not of this {type(model).__name__}, which has {depth}: 0 to {depth - 1}, or -1 for "
            "the last"
        )
    return [index % depth for index in wanted]
