"""The contract of the upsamplers of frozen features: features and an image in, features at any size out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from freqfusion.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from freqfusion.ops._checks import NotScriptable, check_count, check_filled, check_map, check_pair

Size = tuple[int, int]


class FeatureUpsampler(NotScriptable, nn.Module, ABC):
    """Base class of the upsamplers of features of a frozen encoder.

    A subclass implements :meth:`upsample`; this class checks the inputs and normalises the image.

    Args:
        channels: channels of the features, where the method is made for one number of them.
    """

    mean: Sequence[float] = IMAGENET_MEAN
    """Of the images that the method was trained with, per colour, in [0, 1]; may be set on an instance."""
    std: Sequence[float] = IMAGENET_STD
    """Standard deviation of the same."""
    licence: str = ""
    """Of the weights, where they are the authors'."""

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.channels = None if channels is None else check_count("channels", channels)

    @abstractmethod
    def upsample(self, features: Tensor, image: Tensor, size: Size, chunk: int | None) -> Tensor:
        """Upsample checked inputs; see :meth:`forward`. The image is normalised here."""

    def own_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors of a file of released weights under this upsampler's names; by default they are the file's."""
        return state

    def forward(
        self, features: Tensor, image: Tensor, size: Sequence[int] | None = None, *, chunk: int | None = None
    ) -> Tensor:
        """Bring ``features`` to a size, guided by ``image``.

        Args:
            features: ``(B, C, h, w)``, floating point, as the encoder gives them.
            image: ``(B, 3, Hi, Wi)`` in [0, 1], the one that the features are of, at any size.
            size: ``(H, W)`` of the result, at least that of the features; by default that of the image.
            chunk: rows of the result that are computed at a time, without gradients; bounds the memory besides
                the result's own. By default everything is computed at once.

        Returns:
            ``(B, C, H, W)`` of the dtype of ``features``.

        Raises:
            TypeError: for integer maps.
            ValueError: for wrong rank, channels, batch, device or size, and for ``chunk`` while gradients are
                computed.
        """
        check_map("features", features)
        check_map("image", image)
        check_pair("features", features, "image", image)
        check_filled("features", features)
        check_filled("image", image)
        if image.shape[1] != 3:
            raise ValueError(f"image must have 3 channels (B, 3, H, W) in [0, 1], got {image.shape[1]}")
        if self.channels not in (None, features.shape[1]):
            raise ValueError(
                f"features have {features.shape[1]} channels, this {type(self).__name__} was built for "
                f"{self.channels}; build it with channels={features.shape[1]}"
            )
        size = image.shape[-2:] if size is None else size
        size = tuple(size) if isinstance(size, Iterable) else (size,)
        if len(size) != 2:
            raise ValueError(f"size must be (H, W), got {size}")
        size = (check_count("size", size[0]), check_count("size", size[1]))
        coarse = tuple(features.shape[-2:])
        if size[0] < coarse[0] or size[1] < coarse[1]:
            raise ValueError(
                f"size {size} is smaller than the features' {coarse}; give a larger size or a larger image"
            )
        if chunk is not None:
            chunk = check_count("chunk", chunk)
            if torch.is_grad_enabled() and (
                features.requires_grad
                or image.requires_grad
                or any(parameter.requires_grad for parameter in self.parameters())
            ):
                raise ValueError(
                    "chunk is for use without gradients: call under torch.no_grad(), or leave chunk out to train"
                )
        image = normalise(image, self.mean, self.std)
        return self.upsample(features, image, size, chunk).to(features.dtype)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(image - mean) / std``, per colour.

    Raises:
        ValueError: unless both are of three colours and the deviations are over 0.
    """
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise ValueError(
            f"mean and std must be three numbers each, one per colour, std over 0; got {mean} and {std}"
        )
    centre, scale = (image.new_tensor(values)[:, None, None] for values in (mean, std))
    return (image - centre) / scale
