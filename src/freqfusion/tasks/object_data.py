"""The Lightning data module of images with objects: boxes, instance masks, panoptic segments."""

from collections.abc import Callable, Sequence
from typing import Any

from freqfusion.data.object_transforms import collate_objects, eval_object_transform, train_object_transform
from freqfusion.tasks.image_data import ImageData, Sample


class ObjectData(ImageData):
    """Images with objects for training, validation and test.

    Training images are resized here, those to be judged by the detector itself, which gives its results in the
    pixels of the original.

    Args:
        dataset: A name of `freqfusion.data.create_dataset`: coco, coco_panoptic, voc_boxes,
            cityscapes_panoptic, synthetic_panoptic.
        train_options: Further arguments for the training part alone.
        short_sides: Lengths in pixels of a training image's shorter side; one is drawn.
        max_size: Limit of the longer side.
        jitter: Smallest and largest random scale of large scale jitter, relative to the scale at which the image
            fits into crop_size; it takes the place of short_sides and max_size.
        crop_size: Height and width of the random crop after the jitter.
        photometric: Vary brightness, contrast, saturation and hue of training images.
        group_by_aspect: Make training batches of landscape images and of portrait images, so that little is padded.
        **options: Those of :class:`ImageData`.
    """

    def __init__(
        self,
        dataset: str = "synthetic_panoptic",
        *,
        train_options: dict[str, Any] | None = None,
        short_sides: Sequence[int] = (800,),
        max_size: int = 1333,
        jitter: tuple[float, float] | None = None,
        crop_size: tuple[int, int] | None = None,
        photometric: bool = False,
        group_by_aspect: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)

    kind = "objects"
    collate = staticmethod(collate_objects)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":  # labels are places in each file's own list
            train, val = (self.dataset(self.hparams[f"{part}_split"]).classes for part in ("train", "val"))
            if train != val:
                differing = next(
                    (
                        f"{one!r} and {other!r}"
                        for one, other in zip(train, val, strict=False)
                        if one != other
                    ),
                    f"{len(train)} and {len(val)} classes",
                )
                raise ValueError(
                    f"the training and the validation data have different categories ({differing}): give both files "
                    "the same list of categories"
                )

    @property
    def things(self) -> list[bool]:
        """Whether each class has countable objects."""
        return [category.is_thing for category in self.dataset(self.hparams["val_split"]).categories]

    @property
    def category_ids(self) -> list[int]:
        """The number of each class in the annotation file."""
        return [category.id for category in self.dataset(self.hparams["val_split"]).categories]

    def sizes(self, split: str) -> Sequence[tuple[int, int]] | None:
        if not self.hparams["group_by_aspect"]:
            return None
        dataset = self.dataset(split)
        return [dataset.size(index) for index in range(len(dataset))]

    def transform(self, stage: str) -> Callable[[Sample], Sample]:
        options = self.hparams
        if stage == "eval":
            return eval_object_transform()
        return train_object_transform(
            short_sides=options["short_sides"],
            max_size=options["max_size"],
            flip=options["flip"],
            photometric=options["photometric"],
            jitter=options["jitter"],
            crop_size=options["crop_size"],
        )
