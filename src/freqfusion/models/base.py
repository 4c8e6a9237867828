"""The two contracts of networks that are trained and judged, and what all segmentation models of ours share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.data.normalisation import IMAGENET, Normalisation
from freqfusion.models.inference import AS_SET, ObjectInference
from freqfusion.ops._checks import NotScriptable, refuse_torchscript

IGNORE_INDEX = 255
"""Marks pixels without truth."""
Criterion = Callable[[Tensor, Tensor], Tensor]


def pixel_cross_entropy(scores: Tensor, mask: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross entropy averaged over all pixels, ignored ones counting zero, as in the published runs.

    So a batch that is split over processes or over accumulated steps gives the gradient of the whole batch
    (mmsegmentation's ``avg_non_ignore=False``).

    Args:
        scores: logits ``(B, K, H, W)``.
        mask: ``(B, H, W)`` int64, class indices, 255 where there is no truth.
        class_weights: ``(K,)``.
    """
    total = F.cross_entropy(scores.float(), mask, class_weights, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / mask.numel()


class Model(nn.Module):
    """A network with a number of classes, and what its optimizer has to know."""

    num_classes: int
    spec: Any = None
    """How it is made (:class:`freqfusion.zoo.ModelSpec`), if :func:`freqfusion.create_model` made it."""
    bypassed: Sequence[nn.Module] = ()
    """Parts whose ``forward`` is not called, though their children's are."""
    frozen: Sequence[nn.Module] = ()
    """Parts that training leaves as they are; see :meth:`freeze_`."""

    @property
    def normalisation(self) -> Normalisation:
        """Mean and deviation of the images that it is made for; see :func:`normalisation_of`."""
        return normalisation_of(self)

    @normalisation.setter
    def normalisation(self, value: Normalisation) -> None:
        set_normalisation_(self, value)

    def is_backbone(self, parameter: str) -> bool:
        """Whether a parameter, by its name in ``named_parameters()``, belongs to the backbone."""
        return parameter.partition(".")[0] == "backbone"

    def freeze_(self, part: nn.Module) -> None:
        """Let training leave a part of this network as it is. In place.

        Its parameters need no gradient, so no optimizer of ours takes them and nothing in it is kept for the backward
        pass, and it stays in evaluation mode: no dropout, statistics of norms as they are.
        """
        part.requires_grad_(False)
        self.frozen = (*self.frozen, part)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Model":
        """Set the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def no_weight_decay(self, parameter: str) -> bool:
        """Whether a parameter of an embedding or a table of positions is not decayed; norms never are."""
        return False


def normalisation_of(model: nn.Module) -> Normalisation:
    """Mean and deviation of the images that a network is made for.

    They are a property of the network, which :func:`freqfusion.create_model` takes from its backbone's configuration
    and checkpoints and saved folders keep; ImageNet's where nothing else was ever said. Detectors that are called as
    torchvision's normalise their images themselves; theirs are what their ``transform`` has.

    Args:
        model: of this package, or a model of another library, wrapped or not.
    """
    host = _host(model)
    transform: Any = getattr(host, "transform", None)
    if hasattr(transform, "image_mean"):
        return Normalisation.of(transform.image_mean, transform.image_std)
    return getattr(host, "freqfusion_normalisation", IMAGENET)


def set_normalisation_(model: nn.Module, value: Normalisation) -> None:
    """Say what images a network is made for; see :func:`normalisation_of`. In place."""
    host = _host(model)
    transform: Any = getattr(host, "transform", None)
    if hasattr(transform, "image_mean"):
        transform.image_mean, transform.image_std = list(value.mean), list(value.std)
    else:
        host.freqfusion_normalisation = value  # type: ignore[assignment]


def _host(model: nn.Module) -> nn.Module:
    """The model that a wrapper holds, else itself."""
    host: nn.Module = getattr(model, "host", model) if isinstance(model, Model) else model
    return host


class PixelModel(Model, ABC):
    """Gives scores for every pixel."""

    has_own_loss = False
    """Whether :meth:`loss` makes no use of ``criterion``."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Class scores ``(B, K, H, W)`` of images ``(B, 3, H, W)`` with the network's :attr:`normalisation`."""

    def loss(self, images: Tensor, mask: Tensor, criterion: Criterion = pixel_cross_entropy) -> Tensor:
        """What is to be minimised, a scalar.

        Args:
            images: ``(B, 3, H, W)``, floating point, normalised.
            mask: ``(B, H, W)`` int64, class indices, 255 where there is no truth.
            criterion: gives the loss of class scores ``(B, K, H, W)`` and ``mask``.
        """
        return criterion(self(images), mask)


class ObjectModel(Model, ABC):
    """Finds objects or segments in images that may differ in size."""

    finds: Literal["boxes", "instances", "segments"]
    """What it finds: boxes, boxes with masks, or panoptic segments."""
    things: Sequence[bool]
    """Whether each class has countable objects."""

    @abstractmethod
    def find(self, images: Sequence[Tensor], inference: ObjectInference = AS_SET) -> list[dict[str, Tensor]]:
        """What is in each image, without gradients; call ``eval()`` before.

        Args:
            images: ``(3, H, W)`` each, in [0, 1].
            inference: sizes, mirrored passes and limits.

        Returns:
            For each image ``boxes`` ``(N, 4)`` (x1 y1 x2 y2, pixels), ``labels`` ``(N,)`` from 0, ``scores``
            ``(N,)`` and, of instances, ``masks`` ``(N, 1, H, W)`` bool; of segments ``segments`` ``(H, W)`` (j on the
            j-th, 0 where there is none), ``segment_labels`` and ``segment_scores`` ``(S,)``.
        """

    @abstractmethod
    def loss(self, images: Sequence[Tensor], samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """What is to be minimised, a scalar.

        Args:
            images: ``(3, H, W)`` each, in [0, 1], taken at the size they have.
            samples: the images' samples of an object data set: ``labels`` ``(N,)`` from 0, ``iscrowd`` ``(N,)``, and
                ``boxes`` ``(N, 4)``, ``masks`` ``(N, H, W)`` or ``segments`` ``(H, W)``.
        """


class Segmenter(NotScriptable, PixelModel):
    """A backbone and a decode head; a subclass says in :meth:`decode` how they are joined.

    Args:
        backbone: maps an image to a list of feature maps.
        decode_head: maps feature maps to class scores.
        num_classes: number of classes K.
    """

    def __init__(self, backbone: nn.Module, decode_head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.num_classes = num_classes

    @abstractmethod
    def decode(self, image: Tensor) -> Tensor:
        """Class scores of ``image`` at the head's own, smaller size: ``(B, num_classes, h, w)``."""

    def forward(self, image: Tensor) -> Tensor:
        """Class scores for every pixel.

        Args:
            image: ``(B, 3, H, W)``, floating point, normalised, any ``H, W >= 1``.

        Returns:
            Logits ``(B, num_classes, H, W)``.

        Raises:
            TypeError: for an integer image.
            ValueError: for another shape.
            RuntimeError: under TorchScript's tracing.
        """
        refuse_torchscript()
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[-2:]) < 1:
            raise ValueError(f"image must have shape (B, 3, H, W), got {tuple(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(
                f"image must be floating point, got {image.dtype}; convert it and normalise it with the mean "
                "and standard deviation used in training, model.normalisation"
            )
        return F.interpolate(self.decode(image), size=image.shape[-2:], mode="bilinear", align_corners=False)
