"""Models of other libraries under the contracts of ours: one interface to train and judge them by."""

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion._optional import require
from freqfusion.models.base import Criterion, Model, PixelModel, pixel_cross_entropy
from freqfusion.ops.resize import resize
from freqfusion.upgrade import Upgraded

CLASS_OPTIONS = {
    "monai": "out_channels",
    "smp": "classes",
    "torchvision": "num_classes",
    "transformers": "num_labels",
}
"""How a library calls the number of classes."""

BACKBONES = ("model.pixel_level_module.encoder", "backbone", "encoder")
"""Where hosts have their backbones; those of transformers that have none of these name it themselves."""

MASK2FORMER = "transformers Mask2FormerForUniversalSegmentation"

SIDES: dict[str, tuple[int, int]] = {
    "segmentation_models_pytorch": (32, 32),
    "segmentation_models_pytorch PAN": (32, 128),
    "transformers": (1, 32),
    MASK2FORMER: (32, 32),
}
"""The number that divides the sides of an image, and the smallest side: for a library or one of its classes. Plain
vision transformers of transformers lose what does not fill a patch, so these take multiples of the patch."""

UNUSED = re.compile(r"(.+\.)?(encoder|backbone)\.swin\.layernorm\.(weight|bias)")
"""Parameters that a host has but does not use: a Swin backbone has norms of its own for each stage."""

NOT_DECAYED = ("relative_position_bias_table", "absolute_pos_embed", "position_embeddings")
"""Parameters without weight decay, besides those of embeddings and norms."""


class LibraryModel(Model):
    """A model of another library, its ``host``.

    Parameters that the host has but does not use are frozen, so that distributed training does not wait for them.

    Args:
        host: upgraded or not; upgrade it before.
        num_classes: number of classes K.
        frozen_norm: keep the batch norms of the backbone as they are: statistics and parameters, as the published
            Mask2Former with ResNet does on ADE20K and COCO (on Cityscapes, and with ResNet-101 on ADE20K, it trains
            them synchronised). For backbones with pretrained weights.
    """

    def __init__(self, host: nn.Module, num_classes: int, frozen_norm: bool = False) -> None:
        super().__init__()
        self.host = host
        self.num_classes = num_classes
        self.frozen_norm = frozen_norm
        self.spec = getattr(host, "spec", None)
        self._backbone = f"host.{backbone_path(host)}."
        for path, parameter in host.named_parameters():
            if UNUSED.fullmatch(path):
                parameter.requires_grad_(False)
        if frozen_norm:
            for norm in self._backbone_norms():
                norm.requires_grad_(False)
            self.train(self.training)

    def is_backbone(self, parameter: str) -> bool:
        return parameter.startswith(self._backbone)

    def no_weight_decay(self, parameter: str) -> bool:
        """See :meth:`freqfusion.models.base.Model.no_weight_decay`.

        In the published runs these are not decayed. Mask2Former's queries and the level embedding of its transformer
        decoder are embeddings, the level embedding of its pixel decoder is a plain parameter and decayed.

        Source: ``build_optimizer`` in facebookresearch/Mask2Former's ``train_net.py``; mmsegmentation's Swin
        configurations.
        """
        owner, _, name = parameter.rpartition(".")
        return isinstance(self.get_submodule(owner), nn.Embedding) or name in NOT_DECAYED

    def train(self, mode: bool = True) -> "LibraryModel":
        """Set the mode; frozen norms stay in evaluation mode."""
        super().train(mode)
        if self.frozen_norm:
            for norm in self._backbone_norms():
                norm.eval()
        return self

    def _backbone_norms(self) -> list[nn.Module]:
        return [
            module
            for path, module in self.named_modules()
            if path.startswith(self._backbone) and isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]


class LibrarySegmenter(LibraryModel, PixelModel):
    """A semantic segmentation network of another library.

    Images that the host does not take are padded with zeros, at the right and at the bottom, and the scores cropped.

    Args:
        host: maps images ``(B, 3, H, W)`` to class scores: a tensor ``(B, K, h, w)``, a dict with one under ``"out"``
            or ``"logits"``, or an output of transformers with ``logits``.
        num_classes: number of classes K.
        multiple: of what number the sides of an image have to be a multiple; by default looked up in :data:`SIDES`.
        minimum: smallest side of an image, looked up as well.
        frozen_norm: see :class:`LibraryModel`.
    """

    def __init__(
        self,
        host: nn.Module,
        num_classes: int,
        multiple: int | None = None,
        minimum: int | None = None,
        frozen_norm: bool = False,
    ) -> None:
        super().__init__(host, num_classes, frozen_norm)
        found_multiple, found_minimum = _sides(host)
        self.multiple = found_multiple if multiple is None else multiple
        self.minimum = found_minimum if minimum is None else minimum

    def forward(self, images: Tensor) -> Tensor:
        """Class scores for every pixel.

        Args:
            images: ``(B, 3, H, W)``, floating point, normalised, any ``H, W >= 1``.

        Returns:
            Logits ``(B, K, H, W)``.

        Raises:
            TypeError: for integer images, or a host with another output.
            ValueError: for another shape.
        """
        return self._scores(images)[0]

    def loss(self, images: Tensor, mask: Tensor, criterion: Criterion = pixel_cross_entropy) -> Tensor:
        """See :meth:`freqfusion.models.base.PixelModel.loss`.

        A host with an auxiliary head (UPerNet, BEiT, DPT) adds the loss of that one's scores, times the
        configuration's weight, usually 0.4.
        """
        scores, auxiliary = self._scores(images)
        loss = criterion(scores, mask)
        if auxiliary is not None:
            config: Any = self.host.config
            loss = loss + config.auxiliary_loss_weight * criterion(auxiliary, mask)
        return loss

    def _scores(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Class scores at the size of the images, and those of an auxiliary head."""
        check_images(images)
        height, width = images.shape[-2:]
        missing = [self._missing(side) for side in (height, width)]
        padded = F.pad(images, (0, missing[1], 0, missing[0])) if any(missing) else images
        auxiliary: list[Tensor] = []
        head: Any = getattr(self.host, "auxiliary_head", None)
        if isinstance(head, nn.Module):
            # the host computes these scores and keeps them to itself
            watch = head.register_forward_hook(lambda module, inputs, output: auxiliary.append(output))
            try:
                output = self.host(padded)
            finally:
                watch.remove()
        else:
            output = self.host(padded)
        found = [_class_scores(output, self.num_classes), *auxiliary]
        found = [resize(x, padded.shape[-2:], "bilinear")[..., :height, :width] for x in found]
        return found[0], found[1] if auxiliary else None

    def _missing(self, side: int) -> int:
        """Pixels to add to a side."""
        return -(-max(side, self.minimum) // self.multiple) * self.multiple - side


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of normalised images ``(B, 3, H, W)``."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point and normalised, got {images.dtype}")


def count_classes(host: nn.Module) -> int:
    """How many classes a model of another library has, as far as it says it.

    Raises:
        ValueError: if it does not.
    """
    config: Any = getattr(host, "config", None)
    found = config.get("classes") if isinstance(config, Mapping) else getattr(config, "num_labels", None)
    spec: Any = getattr(host, "spec", None)
    if not isinstance(found, int) and spec is not None:
        found = spec.options.get(CLASS_OPTIONS.get(spec.library, "num_classes"))
    if not isinstance(found, int):
        raise ValueError(f"cannot infer the number of classes of {type(host).__name__}; pass num_classes=")
    return found


def host_name(host: nn.Module) -> str:
    """Library and class of a model, upgraded or not: ``"transformers SegformerForSemanticSegmentation"``."""
    cls = type(host).host_class() if isinstance(host, Upgraded) else type(host)
    return f"{cls.__module__.partition('.')[0]} {cls.__name__}"


def backbone_path(host: nn.Module) -> str:
    """Where a host has its backbone, or ``""`` if unknown."""
    paths = (*BACKBONES, getattr(host, "base_model_prefix", ""))
    names = [name for name, _ in host.named_modules() if name]
    return next((path for path in paths if path in names), "")


def timm_name(host: nn.Module) -> str | None:
    """What timm calls the encoder of a model of segmentation_models_pytorch; None for those of other origin."""
    config: Any = getattr(host, "config", None)
    encoder = str(config.get("encoder_name")) if isinstance(config, Mapping) else ""
    prefix = next((prefix for prefix in ("tu-", "timm-") if encoder.startswith(prefix)), None)
    name = encoder.removeprefix(prefix or "")
    return name if prefix and require("timm", "vision").is_model(name) else None


def _sides(host: nn.Module) -> tuple[int, int]:
    name = host_name(host)
    library = name.partition(" ")[0]
    if name in SIDES:
        return SIDES[name]
    multiple, minimum = SIDES.get(library, (1, 1))
    if library == "transformers":
        host_config: Any = getattr(host, "config", None)
        config = getattr(host_config, "backbone_config", None) or host_config
        patch = getattr(config, "patch_size", None)
        if isinstance(patch, int) and not hasattr(config, "depths"):
            multiple = patch
    return multiple, minimum


def _class_scores(output: Any, num_classes: int) -> Tensor:
    scores = output
    if isinstance(output, Mapping):
        scores = next((output[name] for name in ("logits", "out") if name in output), None)
    if not isinstance(scores, Tensor) or scores.ndim != 4 or scores.shape[1] != num_classes:
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(output).__name__}"
        raise TypeError(
            f"the host returned {got}; expected class scores (B, {num_classes}, h, w), alone or as logits or out. Is "
            "it a model for another task, or for another number of classes?"
        )
    return scores
