"""Detectors that are called as torchvision's are, under the contract of models that find objects."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms

from freqfusion.data.objects import segments_to_objects
from freqfusion.models.base import IGNORE_INDEX, ObjectModel
from freqfusion.models.inference import AS_SET, ObjectInference
from freqfusion.models.library import LibraryModel

Detection = dict[str, Tensor]


class Detector(ObjectModel):
    """Finds what a torchvision-style network detects."""

    backbone: Any
    rpn: Any
    roi_heads: Any
    transform: Any

    @property
    def network(self) -> Any:
        """Called with images, in training with targets too; a detector of ours is that itself."""
        return self

    @torch.no_grad()
    def find(self, images: Sequence[Tensor], inference: ObjectInference = AS_SET) -> list[Detection]:
        """See :meth:`freqfusion.models.base.ObjectModel.find`.

        The detections of several passes are merged, and non-maximum suppression within each class drops the
        lesser doubles, with the limits that the network itself has.

        Raises:
            ValueError: for several passes where segments are found, which cannot be merged, and for sizes where
                the network has one fixed size.
        """
        mirrors = (False, True) if inference.flip else (False,)
        passes = [(size, mirrored) for size in inference.sizes or (None,) for mirrored in mirrors]
        if len(passes) > 1 and self.finds == "segments":
            raise ValueError(
                "cannot merge panoptic segments of several passes: give one size and no mirrored pass"
            )
        found: list[list[Detection]] = []
        for size, mirrored in passes:
            with _resizing(self.network, size, inference.max_size):
                results: list[Detection] = self.network([x.flip(-1) if mirrored else x for x in images])
            if mirrored:
                results = [_mirror(result, x.shape[-1]) for result, x in zip(results, images, strict=True)]
            found.append(results)
        limits: Any = getattr(self.network, "roi_heads", self.network)
        merged = found[0] if len(found) == 1 else [_merge(list(x), limits) for x in zip(*found, strict=True)]
        return [{**result, "labels": result["labels"] - 1} for result in merged]

    def loss(self, images: Sequence[Tensor], samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """See :meth:`freqfusion.models.base.ObjectModel.loss`; the sum of all losses."""
        targets = [training_target(sample, self.things) for sample in samples]
        transform = self.network.transform
        before, transform._skip_resize = transform._skip_resize, True  # torchvision's option
        try:
            losses: dict[str, Tensor] = self.network(list(images), targets)
        finally:
            transform._skip_resize = before
        return torch.stack([value.float() for value in losses.values()]).sum()


class LibraryDetector(LibraryModel, Detector):
    """A detector of torchvision, upgraded or not.

    Args:
        host: the detector.
        num_classes: number of classes K without background; read from its heads if None.
        things: for each class whether it is a thing; all by default.

    Raises:
        ValueError: for another kind of model, or another number of classes.
    """

    def __init__(
        self, host: nn.Module, num_classes: int | None = None, things: Sequence[bool] | None = None
    ) -> None:
        if not is_detector(host):
            raise ValueError(
                f"this {type(host).__name__} is not a detector that is called as torchvision's are"
            )
        own = _count_classes(host)
        if num_classes not in (None, own):
            raise ValueError(f"the network predicts {own} classes, not {num_classes}")
        super().__init__(host, own)
        self.things = [True] * own if things is None else list(things)
        heads: Any = getattr(host, "roi_heads", None)
        self.finds = "instances" if heads is not None and heads.has_mask() else "boxes"

    @property
    def network(self) -> Any:
        return self.host


def is_detector(model: nn.Module) -> bool:
    """Whether a model is called as torchvision's detectors are."""
    return isinstance(getattr(model, "transform", None), GeneralizedRCNNTransform)


def _count_classes(host: Any) -> int:
    """The number of classes without the background, which torchvision counts too."""
    heads = getattr(host, "roi_heads", None)
    classifier = heads.box_predictor.cls_score if heads is not None else host.head.classification_head
    names = ("out_features", "num_classes", "num_columns")  # of R-CNNs, of RetinaNet and FCOS, of SSD
    return next(int(getattr(classifier, name)) for name in names if hasattr(classifier, name)) - 1


def training_target(sample: Mapping[str, Any], things: Sequence[bool]) -> dict[str, Tensor]:
    """What a detector is trained with, given a transformed sample.

    Args:
        sample: with ``boxes`` or ``segments``, plain tensors.
        things: for each class whether it is a thing.

    Returns:
        ``boxes`` ``(N, 4)``, ``labels`` ``(N,)`` from 1 on, ``masks`` ``(N, H, W)`` uint8 where there are some, all
        without crowds; of panoptic samples also ``semantic`` ``(H, W)`` uint8, 255 where there is no truth.
    """
    target: dict[str, Tensor] = {}
    objects = sample
    if "segments" in sample:
        segments: Tensor = sample["segments"]
        labels = [label for label, thing in enumerate(things) if thing]
        objects = segments_to_objects(segments, sample["labels"], sample["iscrowd"], labels)
        table = torch.cat((sample["labels"].new_tensor([IGNORE_INDEX]), sample["labels"]))
        target["semantic"] = table[segments].to(torch.uint8)
    single = ~objects["iscrowd"]
    target |= {key: objects[key][single] for key in ("boxes", "masks") if key in objects}
    target["labels"] = objects["labels"][single] + 1
    return target


@contextmanager
def _resizing(model: Any, size: int | None, max_size: int | None) -> Iterator[None]:
    """Let the model resize images to another size for a while."""
    if size is None:
        yield
        return
    transform = model.transform
    if transform.fixed_size is not None:
        raise ValueError(
            f"{type(model).__name__} resizes every image to {transform.fixed_size} (width, height): leave sizes out"
        )
    before = transform.min_size, transform.max_size
    usual = before[0][-1]
    transform.min_size = (size,)
    transform.max_size = round(before[1] * size / usual) if max_size is None else max_size
    try:
        yield
    finally:
        transform.min_size, transform.max_size = before


def _mirror(detection: Detection, width: int) -> Detection:
    left, top, right, bottom = detection["boxes"].unbind(1)
    mirrored = {**detection, "boxes": torch.stack((width - right, top, width - left, bottom), dim=1)}
    if "masks" in detection:
        mirrored["masks"] = detection["masks"].flip(-1)
    return mirrored


def _merge(detections: list[Detection], limits: Any) -> Detection:
    together = {key: torch.cat([detection[key] for detection in detections]) for key in detections[0]}
    keep = batched_nms(together["boxes"], together["scores"], together["labels"], limits.nms_thresh)
    return {key: x[keep[: limits.detections_per_img]] for key, x in together.items()}
