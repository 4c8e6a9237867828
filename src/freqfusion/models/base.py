"""What every segmentation model has in common."""

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.ops._checks import NotScriptable, refuse_torchscript


class Segmenter(NotScriptable, nn.Module, ABC):
    """A backbone and a decode head; a subclass says in :meth:`decode` how they are joined.

    Args:
        backbone: maps an image to a list of feature maps.
        decode_head: maps feature maps to class scores.
        num_classes: number of classes K.
    """

    made_by: tuple[str, dict[str, Any]] | None = None
    """Name and arguments with which :func:`freqfusion.models.create_model` makes such a network, if it did."""

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
                "and standard deviation used in training"
            )
        return F.interpolate(self.decode(image), size=image.shape[-2:], mode="bilinear", align_corners=False)
