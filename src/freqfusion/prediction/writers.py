"""What ``predict`` writes for each image and in the end, for each kind of task."""

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from freqfusion._files import write_atomically
from freqfusion._optional import require
from freqfusion._text import readable
from freqfusion.drawing.detections import colour_segments, draw_objects
from freqfusion.drawing.figures import (
    beside,
    colour_mask,
    format_share,
    legend,
    overlay,
    save_index_png,
    save_png,
)
from freqfusion.metrics import write_panoptic_image
from freqfusion.models.inference import ObjectInference
from freqfusion.prediction.inputs import ImageRecord
from freqfusion.prediction.pixels import predict_mask
from freqfusion.tasks.base import ClassTask
from freqfusion.tasks.object_task import ObjectTask
from freqfusion.tasks.semantic import SegmentationModule


class Writer(ABC):
    """Predicts images and writes the results into a folder.

    Args:
        module: a trained network, on the device to use.
        out: the folder.
    """

    def __init__(self, module: ClassTask, out: Path) -> None:
        self.module, self.out = module, out

    @abstractmethod
    def add(self, picture: ImageRecord, image: Tensor) -> None:
        """Predict one image ``(3, H, W)`` uint8 and write what belongs to it."""

    @abstractmethod
    def finish(self) -> Table:
        """Write what belongs to all images; returns a summary for the screen."""

    def legend(self, counts: Tensor, total: int, height: int) -> Any:
        """The picture of the classes present, by the pixels that each has, with their shares."""
        present = [index for index in counts.argsort(descending=True, stable=True).tolist() if counts[index]]
        return legend(
            [self.module.classes[index] for index in present],
            [self.module.palette[index] for index in present],
            [float(counts[index]) / total for index in present],
            font_size=min(max(height // 40, 12), 72),
            height=height,
        )


class SemanticWriter(Writer):
    """The class of every pixel.

    Args:
        module: of semantic segmentation.
        out: the folder.
        settings: arguments of :func:`freqfusion.prediction.pixels.predict_mask`; the size is the module's where it
            has one.
        checkpoint: where the network comes from, for the record.
    """

    module: SegmentationModule

    def __init__(
        self, module: SegmentationModule, out: Path, settings: Mapping[str, Any], checkpoint: Path
    ) -> None:
        super().__init__(module, out)
        self.settings, self.checkpoint = settings, checkpoint
        self.counts: dict[str, Tensor] = {}

    def add(self, picture: ImageRecord, image: Tensor) -> None:
        palette = self.module.palette
        size = self.module.judged_size(image.shape[-2], image.shape[-1])
        settings = {**self.settings, **({} if size is None else {"resize": size})}
        mask = predict_mask(self.module.network, image, **settings)
        count = torch.bincount(mask.flatten(), minlength=len(self.module.classes))
        self.counts[picture.name.as_posix()] = count
        file = f"{picture.name}.png"
        save_index_png(self.out / "masks" / file, mask, palette)
        save_png(self.out / "colours" / file, colour_mask(mask, palette))
        key = self.legend(count, mask.numel(), mask.shape[0])
        save_png(self.out / "overlays" / file, beside(overlay(image.permute(1, 2, 0), mask, palette), key))

    def finish(self) -> Table:
        classes = self.module.classes
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "class_index", "class", "pixels", "share"])
        for name, count in self.counts.items():
            total = int(count.sum())
            for index, pixels in enumerate(count.tolist()):
                writer.writerow([name, index, classes[index], pixels, f"{pixels / total:.6f}"])
        write_atomically(self.out / "class_shares.csv", text.getvalue().encode("utf-8"))
        content = {
            "checkpoint": str(self.checkpoint),
            "classes": list(classes),
            "shares": {name: (count / count.sum()).tolist() for name, count in self.counts.items()},
        }
        _write_json(self.out / "class_shares.json", content)
        every = torch.stack(list(self.counts.values()))
        total_counts = every.sum(0)
        table = Table(title="class shares", title_justify="left")
        table.add_column("class")
        table.add_column("share of the pixels", justify="right")
        table.add_column("in images", justify="right")
        for index in total_counts.argsort(descending=True, stable=True).tolist():
            if total_counts[index]:
                share = format_share(float(total_counts[index] / total_counts.sum()))
                table.add_row(Text(readable(classes[index])), share, str(int((every[:, index] > 0).sum())))
        return table


class ObjectWriter(Writer):
    """Boxes and, if the network has them, masks.

    Args:
        module: of detection or mask classification.
        out: the folder.
        inference: how objects are found.
        score: least score of what is drawn and written.
    """

    def __init__(self, module: ObjectTask, out: Path, inference: ObjectInference, score: float) -> None:
        super().__init__(module, out)
        self.network, self.inference = module.network, inference
        self.score = score
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, picture: ImageRecord, image: Tensor) -> None:
        found = _cpu(self.network.find([_scaled(image, self.module)], self.inference)[0])
        sure = found["scores"] >= self.score
        boxes, scores, labels = (found[key][sure] for key in ("boxes", "scores", "labels"))
        masks = found["masks"][sure].squeeze(1) > 0.5 if "masks" in found else None
        drawn = draw_objects(
            image.permute(1, 2, 0), boxes, labels, self.module.classes, self.module.palette, scores, masks
        )
        save_png(self.out / "overlays" / f"{picture.name}.png", drawn)
        height, width = image.shape[1:]
        number = len(self.images) + 1
        annotations = []
        for i, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
            left, top, right, bottom = boxes[i].tolist()
            annotation: dict[str, Any] = {
                "id": len(self.annotations) + i + 1,
                "image_id": number,
                "category_id": self.module.category_ids[label],
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
                "score": score,
            }
            if masks is not None:
                annotation["area"] = int(masks[i].sum())
                annotation["segmentation"] = _rle(masks[i])
            annotations.append(annotation)
        self.annotations += annotations
        self.images.append({"id": number, "file_name": picture.file, "height": height, "width": width})

    def finish(self) -> Table:
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": _categories(self.module),
        }
        _write_json(self.out / "predictions.json", content)
        labels = {category_id: label for label, category_id in enumerate(self.module.category_ids)}
        rows = [
            (annotation["image_id"], labels[annotation["category_id"]], annotation["score"])
            for annotation in self.annotations
        ]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "class_index", "class", "objects", "mean_score"])
        for image in self.images:
            for label, name in enumerate(self.module.classes):
                scores = [score for number, found, score in rows if (number, found) == (image["id"], label)]
                mean = f"{sum(scores) / len(scores):.4f}" if scores else ""
                writer.writerow([image["file_name"], label, name, len(scores), mean])
        write_atomically(self.out / "object_counts.csv", text.getvalue().encode("utf-8"))
        table = Table(title=f"objects with a score of at least {self.score}", title_justify="left")
        table.add_column("class")
        for title in ("objects", "in images", "mean score"):
            table.add_column(title, justify="right")
        for label, name in enumerate(self.module.classes):
            of_class = [(number, score) for number, found, score in rows if found == label]
            if of_class:
                mean = f"{sum(score for _, score in of_class) / len(of_class):.3f}"
                images = len({number for number, _ in of_class})
                table.add_row(Text(readable(name)), str(len(of_class)), str(images), mean)
        return table


class PanopticWriter(Writer):
    """Segments that fill the image without overlap.

    Args:
        module: of panoptic segmentation.
        out: the folder.
        inference: how segments are found.
    """

    def __init__(self, module: ObjectTask, out: Path, inference: ObjectInference) -> None:
        super().__init__(module, out)
        self.network, self.inference = module.network, inference
        self.things = list(module.things)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.segments: list[tuple[int, Tensor, Tensor]] = []
        """Number of the image, labels and pixels of its segments."""

    def add(self, picture: ImageRecord, image: Tensor) -> None:
        found = _cpu(self.network.find([_scaled(image, self.module)], self.inference)[0])
        segments, labels, scores = (found[key] for key in ("segments", "segment_labels", "segment_scores"))
        pixels = torch.bincount(segments.flatten(), minlength=len(labels) + 1)[1:]
        drawn = colour_segments(
            segments, labels, self.module.palette, self.things, image=image.permute(1, 2, 0)
        )
        counts = torch.bincount(labels, pixels.double(), minlength=len(self.module.classes)).long()
        key = self.legend(counts, segments.numel(), segments.shape[0])
        file = f"{picture.name}.png"
        save_png(self.out / "overlays" / file, beside(drawn, key))
        number = len(self.images) + 1
        height, width = image.shape[1:]
        self.images.append({"id": number, "file_name": picture.file, "height": height, "width": width})
        folder, name = (self.out / "panoptic" / file).parent, Path(file).name
        categories = [self.module.category_ids[label] for label in labels.tolist()]
        entry = write_panoptic_image(folder, number, name, segments, categories)
        entry["file_name"] = Path(file).as_posix()
        for info in entry["segments_info"]:
            place = info["id"] - 1
            thing = self.things[int(labels[place])]
            info |= {"area": int(pixels[place]), "isthing": int(thing), "score": float(scores[place])}
        self.annotations.append(entry)
        self.segments.append((number, labels, pixels))

    def finish(self) -> Table:
        categories = [
            {**category, "isthing": int(thing)}
            for category, thing in zip(_categories(self.module), self.things, strict=True)
        ]
        content = {"images": self.images, "annotations": self.annotations, "categories": categories}
        _write_json(self.out / "panoptic.json", content)
        table = Table(title="segments", title_justify="left")
        table.add_column("class")
        for title in ("segments", "in images", "share of the pixels"):
            table.add_column(title, justify="right")
        total = sum(image["height"] * image["width"] for image in self.images)
        for label, name in enumerate(self.module.classes):
            of_class = [
                (number, int(area))
                for number, labels, pixels in self.segments
                for area in pixels[labels == label].tolist()
            ]
            if of_class:
                share = format_share(sum(area for _, area in of_class) / total)
                images = len({number for number, _ in of_class})
                table.add_row(Text(readable(name)), str(len(of_class)), str(images), share)
        return table


def _scaled(image: Tensor, module: ClassTask) -> Tensor:
    """An image as detectors take it: float32 in [0, 1], on the network's device."""
    return image.to(module.device).float() / 255


def _cpu(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.cpu() for key, value in found.items()}


def _rle(mask: Tensor) -> dict[str, Any]:
    encode = require("pycocotools.mask", "train").encode
    rle = encode(mask.to(torch.uint8).t().contiguous().t().numpy())  # it takes columns
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def _categories(module: ClassTask) -> list[dict[str, Any]]:
    return [
        {"id": number, "name": name} for number, name in zip(module.category_ids, module.classes, strict=True)
    ]


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
