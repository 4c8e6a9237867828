"""Average precision of boxes and masks as COCO defines it."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from freqfusion._optional import require
from freqfusion.metrics.results import check_box, check_detection, check_rle, is_number, is_whole, shown

IouType = Literal["bbox", "segm"]

_SHAPES = {"bbox": "bbox", "segm": "segmentation"}
"""The key of a result that each kind of IoU is formed of."""


class CocoMetric:
    """Average precision and recall of detections over a whole set, by COCO's rules.

    The evaluator is ``faster_coco_eval``, whose numbers are those of COCO's own ``pycocotools``. Exactly the images
    of the ground truth are judged: where no detections were given for one, nothing was found in it.

    Every image is given once, all its detections together. Nothing is exchanged between processes by itself: in a
    distributed run each process updates with its own images, exchanges its :meth:`results` (for example by
    ``torch.distributed.all_gather_object``) and adds those of the others with :meth:`extend`. An image that is there
    already is refused, so the sampler must give each image to one process only.

    Args:
        ground_truth: COCO instances: ``images`` (``id``, and for masks ``height`` and ``width``), ``categories``
            (``id``, ``name``) and ``annotations`` (``image_id``, ``category_id``, ``area``, ``iscrowd``, ``bbox``
            ``[x, y, width, height]`` for boxes, ``segmentation`` for masks). It is not changed.
        iou_types: ``"bbox"``, ``"segm"`` (masks) or both.
        max_detections: how many detections of a class, the best first, count in an image. COCO has 100; images with
            more objects of one class need more.

    Attributes:
        classes: names of the K classes, which are the categories sorted by id.

    Raises:
        ValueError: for an unknown IoU type, ``max_detections`` below 1 or a ground truth that cannot be evaluated.
        ImportError: if masks are given, or at :meth:`compute`, if ``faster_coco_eval`` is not installed.

    Example:
        >>> box = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 8, 8], "area": 64, "iscrowd": 0}
        >>> truth = {"images": [{"id": 7}], "categories": [{"id": 3, "name": "cell"}], "annotations": [box]}
        >>> metric = CocoMetric(truth)
        >>> metric.update(7, torch.tensor([[0.0, 0.0, 8.0, 6.0]]), torch.tensor([0.9]), torch.tensor([0]))
        >>> scores = metric.compute()["bbox"]
        >>> round(scores["AP"], 4), scores["AP50"], scores["APl"]
        (0.6, 1.0, nan)
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any],
        *,
        iou_types: Sequence[IouType] = ("bbox",),
        max_detections: int = 100,
    ) -> None:
        if not iou_types or set(iou_types) - set(get_args(IouType)):
            raise ValueError(f'iou_types must be "bbox", "segm" or both, got {tuple(iou_types)}')
        if max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {max_detections}")
        self.iou_types = tuple(iou_types)
        self.max_detections = max_detections
        self._truth = _checked(ground_truth, self.iou_types)
        self._sizes: dict[int, tuple[int, int]] = {
            image["id"]: (image.get("height", 0), image.get("width", 0)) for image in self._truth["images"]
        }
        self.classes = tuple(category["name"] for category in self._truth["categories"])
        self._category_ids = [category["id"] for category in self._truth["categories"]]
        self.reset()

    def reset(self) -> None:
        """Forget all detections."""
        self._results: dict[str, dict[int, list[dict[str, Any]]]] = {kind: {} for kind in self.iou_types}

    def update(
        self, image_id: int, boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor | None = None
    ) -> None:
        """Add the detections of one image, none included.

        Args:
            image_id: of the ground truth.
            boxes: ``(N, 4)``, corners ``x1, y1, x2, y2`` in pixels of the original image.
            scores: ``(N,)``, higher is surer.
            labels: ``(N,)``, integers ``0..K-1``: places in :attr:`classes`.
            masks: ``(N, H, W)`` bool or uint8 (not 0 is inside) in the size of the original image; needed for
                ``"segm"`` only.

        Raises:
            TypeError: for labels or masks of a wrong dtype.
            ValueError: for an image that is not in the ground truth or was given before, wrong shapes, a box that
                is not finite or of negative size, a score that is not finite, a label that is no class, or missing
                masks.
        """
        image_id = operator.index(image_id)
        self._check_image(image_id, self.iou_types)
        count = len(boxes)
        for name, values, shape in (
            ("boxes", boxes, (count, 4)),
            ("scores", scores, (count,)),
            ("labels", labels, (count,)),
        ):
            if values.shape != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(values.shape)}")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels must have an integer dtype, got {labels.dtype}")
        corners, confidences = boxes.detach().cpu().double(), scores.detach().cpu().double()
        if not (corners.isfinite().all() and confidences.isfinite().all()):
            raise ValueError(
                f"boxes and scores must be finite, those of image {image_id} are not; did training diverge?"
            )
        sides = corners[:, 2:] - corners[:, :2]
        if (sides < 0).any():
            worst = corners[(sides < 0).any(1)][0].tolist()
            raise ValueError(
                f"boxes must be corners x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, got {worst} in image {image_id}; "
                'torchvision.ops.box_convert(boxes, "xywh", "xyxy") makes them of x, y, width, height'
            )
        if count and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ValueError(
                f"labels must be 0..{len(self.classes) - 1}, places among the categories sorted by id, got "
                f"{int(labels.min())} to {int(labels.max())} in image {image_id}"
            )
        shapes: dict[str, list[Any]] = {"bbox": torch.cat([corners[:, :2], sides], dim=1).tolist()}
        if "segm" in self.iou_types:
            shapes["segm"] = self._encoded(image_id, masks, count)
        categories = [self._category_ids[label] for label in labels.tolist()]
        for kind in self.iou_types:
            self._results[kind][image_id] = [
                {"image_id": image_id, "category_id": category, _SHAPES[kind]: shape, "score": score}
                for category, shape, score in zip(categories, shapes[kind], confidences.tolist(), strict=True)
            ]

    def _check_image(self, image_id: int, kinds: Iterable[str]) -> None:
        if image_id not in self._sizes:
            raise ValueError(
                f"the image {image_id} is not in the ground truth, which has {len(self._sizes)} images; evaluate "
                "with the annotations of the data that the detections come from"
            )
        for kind in kinds:
            if image_id in self._results[kind]:
                raise ValueError(
                    f"the image {image_id} has its {kind} detections already; give all detections of an image once, "
                    "with a sampler that repeats no image, and call reset() before another evaluation"
                )

    def _encoded(self, image_id: int, masks: Tensor | None, count: int) -> list[dict[str, Any]]:
        if masks is None:
            if count:
                raise ValueError('masks are needed for the IoU type "segm", got none')
            return []
        if masks.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"masks must be bool or uint8, got {masks.dtype}; use e.g. masks > 0.5")
        shape = (count, *self._sizes[image_id])
        if masks.shape != shape:
            raise ValueError(
                f"masks of image {image_id} must have the shape {shape}, got {tuple(masks.shape)}; bring them to the "
                "size of the original image"
            )
        encode = require("faster_coco_eval", "train").mask.encode
        encoded = []
        for mask in masks:  # one by one: as bytes, hundreds of large masks would fill the memory
            rle = encode((mask != 0).cpu().to(torch.uint8).numpy())
            encoded.append({"size": list(shape[1:]), "counts": rle["counts"].decode()})
        return encoded

    def results(self, iou_type: IouType) -> list[dict[str, Any]]:
        """All detections as COCO's servers take them.

        Returns:
            ``image_id``, ``category_id`` (of the ground truth), ``score``, and ``bbox`` ``[x, y, width, height]`` or
            ``segmentation`` (compressed RLE with ``counts`` as text) for each. Masks come without boxes: evaluators
            would take the areas of these for theirs.

        Raises:
            ValueError: for an IoU type that is not among those of the metric.
        """
        if iou_type not in self.iou_types:
            raise ValueError(f"iou_type must be one of {self.iou_types}, got {iou_type!r}")
        return [entry for entries in self._results[iou_type].values() for entry in entries]

    def extend(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Add detections of images that have none yet, from another process or a file.

        Args:
            results: as :meth:`results` returns them. An entry with ``bbox`` counts for ``"bbox"``, one with
                ``segmentation`` for ``"segm"``, one with both for both.

        Raises:
            ValueError: for an entry that is not as it must be, or of an image or category that is not in the ground
                truth, or an image that was given before. Nothing is added then.
        """
        new: dict[str, dict[int, list[dict[str, Any]]]] = {kind: {} for kind in self.iou_types}
        for index, entry in enumerate(results):
            name = f"results: entry {index}"
            check_detection(entry, name)
            kinds = [kind for kind in self.iou_types if _SHAPES[kind] in entry]
            if not kinds:
                wanted = " or ".join(_SHAPES[kind] for kind in self.iou_types)
                raise ValueError(
                    f"{name} must have {wanted} for iou_types {self.iou_types}, got {sorted(entry)}"
                )
            image_id, category_id = entry["image_id"], entry["category_id"]
            if category_id not in self._category_ids:
                raise ValueError(f"{name}: the category {category_id} is not in the ground truth")
            for kind in kinds:
                if image_id not in new[kind]:
                    self._check_image(image_id, [kind])
                if kind == "segm":
                    check_rle(entry["segmentation"], f"{name}: segmentation", self._sizes[image_id])
                new[kind].setdefault(image_id, []).append(
                    {key: entry[key] for key in ("image_id", "category_id", _SHAPES[kind], "score")}
                )
        for kind in self.iou_types:
            self._results[kind].update(new[kind])

    def compute(self) -> dict[str, dict[str, Any]]:
        """Evaluate all detections so far.

        Returns:
            For each IoU type a dict of

            - ``AP`` (mean over the IoU thresholds 0.5, 0.55, ..., 0.95), ``AP50``, ``AP75`` (at one threshold);
              ``APs``, ``APm``, ``APl``: of objects below 32 x 32, below 96 x 96, and larger;
            - ``AR1``, ``AR10``, ``AR100``: the recall, mean over the thresholds, with so many detections of a class
              an image. With another ``max_detections`` M the last is called ``AR<M>``, e.g. ``AR369``, and those of
              more than M are left out; ``ARs``, ``ARm``, ``ARl`` and every AP are with M detections;
            - ``AP_per_class``, ``AP50_per_class``: ``(K,)`` float64;
            - ``precision50``, ``precision75``, ``precision``: ``(101,)`` float64, the mean over the classes of the
              precision at the recalls 0, 0.01, ..., 1 with the threshold 0.5, 0.75, and over all thresholds. Their
              means are AP50, AP75 and AP.

            Numbers are floats in [0, 1]. What no object in the ground truth stands for is NaN (COCO's evaluator
            says -1) and left out of the means; where there are objects and no detections, it is 0.

        Raises:
            ImportError: if ``faster_coco_eval`` is not installed.
        """
        return {kind: self._evaluated(kind) for kind in self.iou_types}

    def _evaluated(self, kind: IouType) -> dict[str, Any]:
        coco = require("faster_coco_eval", "train")
        # the evaluator writes into the dicts that it gets, and its matches need ids from 1
        truth = self._truth | {
            "annotations": [
                {"id": number, **annotation}
                for number, annotation in enumerate(self._truth["annotations"], 1)
            ]
        }
        truth = coco.COCO(truth, print_function=_silent)
        found = truth.loadRes([dict(entry) for entry in self.results(kind)])
        evaluator = coco.COCOeval_faster(truth, found, kind, print_function=_silent)
        limits = [limit for limit in (1, 10) if limit < self.max_detections] + [self.max_detections]
        evaluator.params.maxDets = limits
        evaluator.evaluate()
        evaluator.accumulate()

        # thresholds, recalls, classes, areas (all, small, medium, large), limits; -1 is "no such object"
        precision = torch.as_tensor(evaluator.eval["precision"], dtype=torch.float64)[..., -1]
        recall = torch.as_tensor(evaluator.eval["recall"], dtype=torch.float64)
        precision = precision.where(precision > -1, torch.nan)
        recall = recall.where(recall > -1, torch.nan)
        every, at_50, at_75 = precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]
        scores: dict[str, Any] = {"AP": every, "AP50": at_50, "AP75": at_75}
        scores |= {f"AP{letter}": precision[..., area] for area, letter in enumerate("sml", 1)}
        scores |= {f"AR{limit}": recall[..., 0, place] for place, limit in enumerate(limits)}
        scores |= {f"AR{letter}": recall[..., area, -1] for area, letter in enumerate("sml", 1)}
        return {name: values.nanmean().item() for name, values in scores.items()} | {
            "AP_per_class": every.mean((0, 1)),
            "AP50_per_class": at_50.mean(0),
            "precision50": at_50.nanmean(1),
            "precision75": at_75.nanmean(1),
            "precision": every.nanmean((0, 2)),
        }


def _silent(*_: object) -> None:
    """In the place of the evaluator's print."""


def _checked(ground_truth: Mapping[str, Any], iou_types: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """A copy of what the evaluator needs; a ground truth that it would misread or crash on is refused."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(ground_truth.get(key), (list, tuple)):
            raise ValueError(
                f"the ground truth must be a dict of COCO instances with a list of {key}, got "
                f"{type(ground_truth.get(key)).__name__} in its place"
            )
    images, categories = (_by_id(ground_truth[key], key) for key in ("images", "categories"))
    if not images or not categories:
        raise ValueError("the ground truth must have at least one image and one category")
    if "segm" in iou_types:
        for identity, image in images.items():
            if not all(is_whole(image.get(side)) and image[side] > 0 for side in ("height", "width")):
                raise ValueError(f"the image {identity} of the ground truth needs height and width for masks")
    annotations = []
    for index, annotation in enumerate(ground_truth["annotations"]):
        name = f"annotations: entry {index} of the ground truth"
        if not isinstance(annotation, dict):
            raise ValueError(f"{name} must be a dict, got {shown(annotation)}")
        name += f" (id {annotation.get('id')!r})"
        for key, ids in (("image_id", images), ("category_id", categories)):
            if not is_whole(annotation.get(key)) or annotation[key] not in ids:
                raise ValueError(f"{name}: there is no such {key}: {shown(annotation.get(key))}")
        if not is_number(annotation.get("area")) or annotation["area"] < 0:
            raise ValueError(f"{name} needs its area in pixels, got {shown(annotation.get('area'))}")
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise ValueError(f"{name}: iscrowd must be 0 or 1, got {annotation['iscrowd']!r}")
        kept = {key: annotation[key] for key in ("image_id", "category_id", "area")}
        kept["iscrowd"] = int(annotation.get("iscrowd", 0))
        if "bbox" in iou_types:
            check_box(annotation.get("bbox"), f"{name}: bbox")
            kept["bbox"] = annotation["bbox"]
        if "segm" in iou_types:
            image = images[annotation["image_id"]]
            _check_mask(annotation.get("segmentation"), name, (image["height"], image["width"]))
            kept["segmentation"] = annotation["segmentation"]
        annotations.append(kept)
    return {
        "images": [
            {key: image[key] for key in ("id", "height", "width") if key in image}
            for image in images.values()
        ],
        "categories": [
            {"id": identity, "name": str(categories[identity].get("name", identity))}
            for identity in sorted(categories)
        ],
        "annotations": annotations,
    }


def _by_id(entries: Sequence[Any], key: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        identity: Any = entry.get("id") if isinstance(entry, dict) else None
        if not is_whole(identity) or identity in found:
            raise ValueError(
                f"{key}: entry {index} of the ground truth needs a whole number of its own as id, got "
                f"{shown(identity)}"
            )
        found[identity] = entry
    return found


def _check_mask(mask: Any, name: str, size: tuple[int, int]) -> None:
    """Refuse what is neither polygons nor an RLE, compressed or not, of an image of that size."""
    if isinstance(mask, dict) and isinstance(mask.get("counts"), list):
        runs = mask["counts"]
        whole = all(is_whole(run) and run >= 0 for run in runs)
        if mask.get("size") not in (list(size), size) or not whole or sum(runs) != size[0] * size[1]:
            raise ValueError(
                f"{name}: the RLE is damaged or not of its image's {size[0]} x {size[1]} pixels (height x width)"
            )
    elif isinstance(mask, dict):
        check_rle(mask, f"{name}: segmentation", size)
    elif (
        not isinstance(mask, list)
        or not mask
        or not all(isinstance(polygon, list) and len(polygon) >= 6 for polygon in mask)
        or not all(len(polygon) % 2 == 0 and all(map(is_number, polygon)) for polygon in mask)
    ):
        raise ValueError(
            f"{name} has no mask: segmentation must be an RLE or a list of polygons [x1, y1, x2, y2, x3, y3, ...], "
            f'got {shown(mask)}; for boxes alone use iou_types=("bbox",)'
        )
