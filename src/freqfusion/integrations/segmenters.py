"""Models of other libraries as semantic segmentation networks: one interface to train and judge them by."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.integrations.base import Upgraded
from freqfusion.integrations.spec import ModelSpec
from freqfusion.integrations.transformers.catalog import PUBLISHED, build_published
from freqfusion.ops.resize import resize

if TYPE_CHECKING:
    from freqfusion.integrations.transformers.mask_classification import Images, QueryResult, Targets

CLASS_ARGUMENTS = {
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
"""Of what number the sides of an image have to be a multiple, and what is the smallest: for a library or one of its
classes. Plain vision transformers of transformers lose what is no whole patch, so these take multiples of it."""

UNUSED = re.compile(r"(.+\.)?(encoder|backbone)\.swin\.layernorm\.(weight|bias)")
"""Parameters that a host has but does not use: a Swin backbone has norms of its own for each stage."""

NOT_DECAYED = ("relative_position_bias_table", "absolute_pos_embed", "position_embeddings")
"""Parameters without weight decay, besides those of embeddings and norms."""

Criterion = Callable[[Tensor, Tensor], Tensor]


def list_hosts() -> list[str]:
    """Names of published networks; :func:`build_host` makes others too.

    >>> [name for name in list_hosts() if name.startswith("upernet")]
    ['upernet_swin_t', 'upernet_swin_s', 'upernet_swin_b', 'upernet_convnext_t']
    """
    return list(PUBLISHED)


def build_host(name: str, num_classes: int, **config_options: Any) -> nn.Module:
    """A model of another library, as the library makes it, with fresh weights.

    Args:
        name: a name of :func:`list_hosts`, or ``library:name?argument=value`` as
            :func:`freqfusion.integrations.load_model` takes it, without the number of classes: for example
            ``"smp:Unet?encoder_name=resnet18"`` or ``"transformers:SegformerForSemanticSegmentation"``.
        num_classes: number of classes K, without background.
        config_options: for a name of the list, settings of transformers' configuration to change
            (``num_queries=200``; ``backbone_config={"drop_path_rate": 0.1}``), else further arguments.

    Raises:
        ImportError: if the library is not installed.
        TypeError: for an option that the model does not have.
        ValueError: for an unknown name, or a class count below 1 or twice given.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if name in PUBLISHED:
        return build_published(name, num_classes, **config_options)
    if ":" not in name:
        raise ValueError(
            f"unknown network {name!r}; choose one of {', '.join(PUBLISHED)}, or name a model of a library, such as "
            "smp:Unet?encoder_name=resnet18"
        )
    spec = ModelSpec.parse(name)
    if spec.is_known and spec.source not in CLASS_ARGUMENTS:
        raise ValueError(
            f"{name!r} is no segmentation network of another library; those of freqfusion are made by "
            "freqfusion.models.create_model"
        )
    argument = CLASS_ARGUMENTS.get(spec.source, "num_classes")
    if spec.arguments.get(argument, num_classes) != num_classes:
        raise ValueError(
            f"{name!r} says another number of classes than {num_classes}; leave {argument} out of it"
        )
    arguments = {**spec.arguments, **config_options, argument: num_classes}
    return ModelSpec(spec.source, spec.name, arguments).build()


def as_segmenter(
    host: nn.Module,
    num_classes: int | None = None,
    *,
    multiple: int | None = None,
    minimum: int | None = None,
    frozen_norm: bool = False,
) -> "HostSegmenter":
    """Make a model of another library a segmentation network of this one.

    Args:
        host: maps images ``(B, 3, H, W)`` to class scores: a tensor ``(B, K, h, w)``, a dict with one under ``"out"``
            or ``"logits"``, or an output of transformers with ``logits``; or transformers' Mask2Former. Upgraded or
            not; upgrade it before.
        num_classes: number of classes K; read from the host where it says it.
        multiple: of what number the sides of an image have to be a multiple; by default looked up in :data:`SIDES`.
        minimum: smallest side of an image, likewise.
        frozen_norm: keep the batch norms of the backbone as they are: statistics and parameters, as the published
            Mask2Former with ResNet does on ADE20K and COCO (on Cityscapes, and with ResNet-101 on ADE20K, it trains
            them synchronised). For backbones with pretrained weights.

    Raises:
        ValueError: for a host whose number of classes is not known, or one that gives no class scores.
    """
    if num_classes is None:
        num_classes = _count_classes(host)
    found_multiple, found_minimum = _sides(host)
    return HostSegmenter(
        host,
        num_classes,
        found_multiple if multiple is None else multiple,
        found_minimum if minimum is None else minimum,
        frozen_norm,
    )


class HostSegmenter(nn.Module):
    """A model of another library as a segmentation network; :func:`as_segmenter` makes it.

    Images that the host does not take are padded with zeros, at the right and at the bottom, and the scores cropped.
    Parameters that the host has but does not use are frozen, so that distributed training does not wait for them.

    Args:
        host: see :func:`as_segmenter`, like the others.
        num_classes: number of classes K.
        multiple: of what number the sides of an image have to be a multiple.
        minimum: smallest side of an image.
        frozen_norm: keep the batch norms of the backbone as they are.
    """

    def __init__(
        self,
        host: nn.Module,
        num_classes: int,
        multiple: int = 1,
        minimum: int = 1,
        frozen_norm: bool = False,
    ) -> None:
        super().__init__()
        self.host = host
        self.num_classes = num_classes
        self.multiple = multiple
        self.minimum = minimum
        self.frozen_norm = frozen_norm
        self.is_mask2former = host_name(host) == MASK2FORMER
        self._backbone = f"host.{backbone_path(host)}."
        for path, parameter in host.named_parameters():
            if UNUSED.fullmatch(path):
                parameter.requires_grad_(False)
        if frozen_norm:
            for norm in self._backbone_norms():
                norm.requires_grad_(False)
            self.train(self.training)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores for every pixel.

        Args:
            images: ``(B, 3, H, W)``, floating point, normalised, any ``H, W >= 1``.

        Returns:
            ``(B, K, H, W)``: logits; of Mask2Former the logarithm of what its queries vote for each class (see
            :meth:`QueryResult.semantic`). That has the same largest class, and its softmax is each class's share of
            the votes, so that scores of several passes are averaged as those of other networks are.

        Raises:
            TypeError: for integer images, or a host with another output.
            ValueError: for another shape.
        """
        return self._scores(images)[0]

    def training_loss(self, images: Tensor, mask: Tensor, criterion: Criterion) -> Tensor:
        """What is to be minimised, as the network was published.

        Args:
            images: ``(B, 3, H, W)``, floating point, normalised.
            mask: ``(B, H, W)`` int64, class indices, 255 where there is no truth.
            criterion: gives the loss of class scores ``(B, K, H, W)`` and ``mask``. A host with an auxiliary head
                (UPerNet, BEiT, DPT) adds the loss of that one's scores, times the configuration's weight, 0.4 as a
                rule. Not used for Mask2Former, which has a loss of its own.

        Returns:
            A scalar.
        """
        if self.is_mask2former:
            from freqfusion.integrations.transformers import mask_classification  # it imports transformers

            return self._set_loss(images, mask_classification.semantic_targets(mask))
        scores, auxiliary = self._scores(images)
        loss = criterion(scores, mask)
        if auxiliary is not None:
            config: Any = self.host.config
            loss = loss + config.auxiliary_loss_weight * criterion(auxiliary, mask)
        return loss

    def object_loss(self, images: Sequence[Tensor], samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """What is to be minimised by a Mask2Former that finds objects or segments.

        Args:
            images: ``(3, H, W)`` each, floating point, normalised; of any sizes.
            samples: the images' samples of an object data set, with segments or masks.

        Returns:
            A scalar.
        """
        from freqfusion.integrations.transformers import mask_classification

        return self._set_loss(images, mask_classification.object_targets(samples))

    def find(
        self, images: Sequence[Tensor], output_sizes: Sequence[tuple[int, int]] | None = None
    ) -> "list[QueryResult]":
        """What the queries of a Mask2Former find in each image, in the form of any task.

        Args:
            images: ``(3, H, W)`` each, floating point, normalised; of any sizes.
            output_sizes: heights and widths of the results, by default the images'.
        """
        from freqfusion.integrations.transformers import mask_classification

        return mask_classification.predict_queries(cast("Any", self.host), images, output_sizes)

    @property
    def bypassed(self) -> list[nn.Module]:
        """Parts of the host whose ``forward`` is not called, their children's are."""
        if not self.is_mask2former:
            return []
        return [self.host, *map(self.host.get_submodule, ("model", "model.pixel_level_module"))]

    def is_backbone(self, parameter_path: str) -> bool:
        """Whether a parameter, by its name in ``named_parameters()``, belongs to the host's backbone."""
        return parameter_path.startswith(self._backbone)

    def no_weight_decay(self, parameter_path: str) -> bool:
        """Whether a parameter, by its name in ``named_parameters()``, is of an embedding or a table of positions.

        In the published runs these are not decayed, and neither are the parameters of norms, about which this does
        not speak. Mask2Former's queries and the level embedding of its transformer decoder are embeddings, the level
        embedding of its pixel decoder is a plain parameter and decayed.

        Source: ``build_optimizer`` in facebookresearch/Mask2Former's ``train_net.py``; mmsegmentation's Swin
        configurations.
        """
        owner, _, name = parameter_path.rpartition(".")
        return isinstance(self.get_submodule(owner), nn.Embedding) or name in NOT_DECAYED

    def train(self, mode: bool = True) -> "HostSegmenter":
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

    def _scores(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Class scores at the size of the images, and those of an auxiliary head."""
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point and normalised, got {images.dtype}")
        if self.is_mask2former:
            votes = torch.stack([result.semantic() for result in self.find([*images])])
            return votes.clamp_min(torch.finfo(votes.dtype).tiny).log(), None
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

    def _set_loss(self, images: "Images", targets: "Targets") -> Tensor:
        from freqfusion.integrations.transformers import mask_classification

        losses = mask_classification.set_losses(cast("Any", self.host), images, *targets)
        return torch.stack(list(losses.values())).sum()

    def _missing(self, side: int) -> int:
        """Pixels to add to a side."""
        return -(-max(side, self.minimum) // self.multiple) * self.multiple - side


def host_name(host: nn.Module) -> str:
    """Library and class of a model, upgraded or not: ``"transformers SegformerForSemanticSegmentation"``."""
    cls = type(host).host_class() if isinstance(host, Upgraded) else type(host)
    return f"{cls.__module__.partition('.')[0]} {cls.__name__}"


def backbone_path(host: nn.Module) -> str:
    """Where a host has its backbone, or ``""`` where that is not known."""
    paths = (*BACKBONES, getattr(host, "base_model_prefix", ""))
    names = [name for name, _ in host.named_modules() if name]
    return next((path for path in paths if path in names), "")


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


def _count_classes(host: nn.Module) -> int:
    config: Any = getattr(host, "config", None)
    found = config.get("classes") if isinstance(config, Mapping) else getattr(config, "num_labels", None)
    if not isinstance(found, int):
        spec = getattr(host, "freqfusion_host", None)
        if isinstance(spec, ModelSpec):
            found = spec.arguments.get(CLASS_ARGUMENTS.get(spec.source, "num_classes"))
    if not isinstance(found, int):
        raise ValueError(
            f"it is not known how many classes this {type(host).__name__} has; say it with num_classes="
        )
    return found


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
