"""The Lightning data module of images without truth."""

from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms import v2

from freqfusion.data.transforms import RandomCover
from freqfusion.tasks.image_data import ImageData, Sample


class FeatureData(ImageData):
    """Images in [0, 1] for training, validation and test; no truth is used.

    Images are scaled until they cover the crop, further in training by a random factor, and cut: at random in
    training, in the middle in evaluation.

    Args:
        dataset: pictures, any folder of images: ROOT/<split>/images, ROOT/<split>, or all in ROOT, every tenth for
            validation. Or another name of `freqfusion.data.create_dataset`, whose images are taken.
        crop_size: Height and width of the crops: multiples of the encoder's patch.
        ratio_range: Smallest and largest random scale of a training image, where 1 just covers the crop.
        **options: Those of :class:`ImageData`.
    """

    def __init__(
        self,
        dataset: str = "pictures",
        *,
        crop_size: tuple[int, int] = (448, 448),
        ratio_range: tuple[float, float] = (1.0, 2.0),
        **options: Any,
    ) -> None:
        super().__init__(**options)

    kind = None

    @staticmethod
    def collate(samples: list[Sample]) -> Sample:
        """Stack images; an empty list becomes a batch without images."""
        batch: Sample = {"name": [sample["name"] for sample in samples]}
        if samples:
            batch["image"] = torch.stack([sample["image"] for sample in samples])
        return batch

    def transform(self, stage: str) -> Callable[[Sample], Sample]:
        options = self.hparams
        size = tuple(options["crop_size"])
        place: list[Any] = [RandomCover(size, (1.0, 1.0)), v2.CenterCrop(size)]
        if stage == "train":
            cover = RandomCover(size, options["ratio_range"])
            place = [cover, v2.RandomCrop(size), v2.RandomHorizontalFlip(options["flip"])]
        return v2.Compose([_image_alone, *place, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def _image_alone(sample: Sample) -> Sample:
    return {key: sample[key] for key in ("image", "name")}
