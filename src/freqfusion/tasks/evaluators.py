"""How predictions of objects and segments are judged over a data set and over processes, and written to files."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqfusion._files import write_atomically
from freqfusion.drawing.detections import plot_precision_recall
from freqfusion.drawing.figures import figure_bytes
from freqfusion.metrics import (
    CocoMetric,
    panoptic_counts,
    score_panoptic,
    write_detections,
    write_panoptic,
    write_panoptic_image,
)
from freqfusion.metrics.detection import IouType
from freqfusion.tasks.base import ClassMetric

Prediction = Mapping[str, Tensor]
Sample = Mapping[str, Any]


class Evaluator(ABC):
    """Takes predictions image by image, and says how good they are."""

    metric_labels: Mapping[str, str]
    """The numbers among what :meth:`compute` returns, with their labels; the first one counts."""
    class_metrics: Sequence[ClassMetric]

    @abstractmethod
    def start(self, dataset: Any, files: Path | None) -> None:
        """Forget everything; the images of ``dataset`` are next.

        Args:
            dataset: An object data set.
            files: Where to write the predictions in the forms of the official servers: a folder and the beginning
                of the files' names.
        """

    @abstractmethod
    def update(self, sample: Sample, prediction: Prediction) -> None:
        """Take the prediction for a sample of the data set."""

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """Figures over all processes: floats in [0, 1], and lists with a number per class."""


_KINDS: dict[IouType, tuple[str, str]] = {"bbox": ("box", "box AP"), "segm": ("mask", "mask AP")}
_NUMBERS = {
    "ap": ("AP", ""),
    "ap50": ("AP50", "50"),
    "ap75": ("AP75", "75"),
    "ap_small": ("APs", " small"),
    "ap_medium": ("APm", " medium"),
    "ap_large": ("APl", " large"),
}


class DetectionEvaluator(Evaluator):
    """COCO's average precision of boxes and, if there are any, masks.

    Args:
        masks: judge masks too; the precision of these is then the figure that counts.
        max_detections: how many detections of a class count in an image.
    """

    def __init__(self, masks: bool, max_detections: int = 100) -> None:
        self.kinds: tuple[IouType, ...] = ("segm", "bbox") if masks else ("bbox",)
        self.max_detections = max_detections
        self.metric_labels = {
            f"{_KINDS[kind][0]}_{name}": _KINDS[kind][1] + suffix
            for kind in self.kinds
            for name, (_, suffix) in _NUMBERS.items()
        }
        self.class_metrics = [
            ClassMetric(
                _KINDS[kind][1] + suffix,
                f"{_KINDS[kind][0]}_{name}",
                f"{_KINDS[kind][0]}_{name}_per_class",
                f"{_KINDS[kind][0]}_{name}",
            )
            for kind in self.kinds
            for name, suffix in (("ap", ""), ("ap50", "50"))
        ]

    def start(self, dataset: Any, files: Path | None) -> None:
        if "segm" in self.kinds and not (dataset.has_masks or dataset.is_panoptic):
            raise ValueError(
                "the network predicts masks, but the data has none to judge them by: use a network without masks "
                "(faster_rcnn), or data whose annotations have a segmentation"
            )
        self.files = files
        truth = dataset.ground_truth()
        # the evaluator takes numbers alone: files with text ids get some
        self.numbers: dict[Any, int] = {image["id"]: image["id"] for image in truth["images"]}
        if not all(isinstance(image_id, int) for image_id in self.numbers):
            self.numbers = {image_id: number for number, image_id in enumerate(self.numbers, 1)}
            for entry, key in [(x, "id") for x in truth["images"]] + [
                (x, "image_id") for x in truth["annotations"]
            ]:
                entry[key] = self.numbers[entry[key]]
        self.metric = CocoMetric(truth, iou_types=self.kinds, max_detections=self.max_detections)
        # of panoptic data the truth has things alone
        self.labels = list(dataset.things) if dataset.is_panoptic else list(range(len(dataset.categories)))
        self.classes = len(dataset.categories)
        self.places = torch.full((self.classes,), -1)
        self.places[self.labels] = torch.arange(len(self.labels))

    def update(self, sample: Sample, prediction: Prediction) -> None:
        masks = prediction["masks"].squeeze(1) if "segm" in self.kinds else None
        places = self.places[prediction["labels"].cpu()]
        known = places >= 0
        self.metric.update(
            self.numbers[sample["image_id"]],
            prediction["boxes"].cpu()[known],
            prediction["scores"].cpu()[known],
            places[known],
            None if masks is None else masks.cpu()[known] > 0.5,
        )

    def compute(self) -> dict[str, Any]:
        for kind in self.kinds:
            for results in of_other_processes(self.metric.results(kind)):
                self.metric.extend(results)
        values: dict[str, Any] = {}
        curves: dict[str, Any] = {}
        computed = self.metric.compute()
        for kind in self.kinds:
            (name, _), scores = _KINDS[kind], computed[kind]
            values |= {f"{name}_{figure}": scores[key] for figure, (key, _) in _NUMBERS.items()}
            for figure in ("ap", "ap50"):
                of_all = torch.full((self.classes,), torch.nan, dtype=torch.float64)
                of_all[self.labels] = scores[f"{_NUMBERS[figure][0]}_per_class"]
                values[f"{name}_{figure}_per_class"] = of_all.tolist()
            curves[f"{name}, IoU 0.5"] = scores["precision50"]
            curves[f"{name}, IoU 0.75"] = scores["precision75"]
        if self.files is not None and is_first_process():
            for kind in self.kinds:
                path = with_ending(self.files, f"_{_KINDS[kind][0]}_results.json")
                ids = {number: image_id for image_id, number in self.numbers.items()}
                results = self.metric.results(kind)
                write_detections(path, [{**entry, "image_id": ids[entry["image_id"]]} for entry in results])
            known = {name: curve for name, curve in curves.items() if not curve.isnan().any()}
            if known:  # else there was nothing to find
                picture = figure_bytes(plot_precision_recall(known))
                write_atomically(with_ending(self.files, "_precision_recall.png"), picture)
        return values


class PanopticEvaluator(Evaluator):
    """Panoptic quality.

    Args:
        things: for each class whether it is a thing.
    """

    def __init__(self, things: Sequence[bool]) -> None:
        self.metric_labels = {
            "pq": "PQ",
            "sq": "SQ",
            "rq": "RQ",
            "pq_things": "PQ things",
            "pq_stuff": "PQ stuff",
        }
        self.class_metrics = [
            ClassMetric(name.upper(), name, f"{name}_per_class", name) for name in ("pq", "sq", "rq")
        ]
        self.things = list(things)

    def start(self, dataset: Any, files: Path | None) -> None:
        self.counts = torch.zeros(len(self.things), 4, dtype=torch.float64)
        self.category_ids = [category.id for category in dataset.categories]
        self.files = files
        self.entries: list[dict[str, Any]] = []
        self.times = Counter(Path(dataset.name(i)).name for i in range(len(dataset))) if files else Counter()

    def update(self, sample: Sample, prediction: Prediction) -> None:
        segments, labels = prediction["segments"].cpu(), prediction["segment_labels"].cpu()
        truth, truth_labels, crowd = (sample[key].cpu() for key in ("segments", "labels", "iscrowd"))
        self.counts += panoptic_counts(segments, labels, truth, truth_labels, crowd, len(self.things))
        if self.files is not None:
            categories = [self.category_ids[label] for label in labels.tolist()]
            name = sample["name"]  # COCO's servers want the bare name
            bare = Path(name).name
            file = (
                f"{bare}.png"
                if self.times[bare] == 1
                else f"{name.replace('/', '_')}_{sample['image_id']}.png"
            )
            folder = with_ending(self.files, "_panoptic")
            self.entries.append(write_panoptic_image(folder, sample["image_id"], file, segments, categories))

    def compute(self) -> dict[str, Any]:
        scores = score_panoptic(sum(of_other_processes(self.counts), self.counts), self.things)
        if self.files is not None:
            entries = self.entries + [entry for some in of_other_processes(self.entries) for entry in some]
            if is_first_process():
                json_file, folder = (
                    with_ending(self.files, f"_panoptic{ending}") for ending in (".json", "")
                )
                write_panoptic(json_file, folder, entries)
        values: dict[str, Any] = {name: float(scores[name]) for name in self.metric_labels}
        return values | {figure.per_class: scores[figure.per_class].tolist() for figure in self.class_metrics}


def with_ending(files: Path, ending: str) -> Path:
    """The path of one of several files whose names begin alike."""
    return files.with_name(files.name + ending)


def is_first_process() -> bool:
    """Whether this process writes what all have found together."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def of_other_processes(value: Any) -> list[Any]:
    """What the other processes have in the place of this one's value; each must call this."""
    if not torch.distributed.is_initialized():
        return []
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return [other for rank, other in enumerate(values) if rank != torch.distributed.get_rank()]
