"""A few pictures of coloured shapes on noise, in COCO's formats, for the tests of detectors."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = ((220, 60, 50), (60, 90, 220))
NAMES = ("disc", "block")


def write_coco(root: Path, split: str = "train", count: int = 4, size: tuple[int, int] = (64, 80)) -> Path:
    """Discs (category 3) and blocks (category 7), two to four in a picture, with polygons or RLE as masks."""
    (root / split).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(split))
    images, annotations = [], []
    for number in range(count):
        height, width = size if number % 2 == 0 else size[::-1]
        picture = rng.integers(90, 130, (height, width, 3)).astype(np.uint8)
        rows, columns = np.mgrid[:height, :width]
        taken = np.zeros((height, width), bool)
        for _ in range(20):
            kind = int(rng.integers(2))
            half = int(rng.integers(7, 13))
            y, x = int(rng.integers(half, height - half)), int(rng.integers(half, width - half))
            if kind == 0:
                mask = (rows - y) ** 2 + (columns - x) ** 2 <= half**2
            else:
                mask = (abs(rows - y) < half) & (abs(columns - x) < half)
            if (mask & taken).any() or taken.sum() > height * width // 3:
                continue
            taken |= mask
            picture[mask] = COLOURS[kind]
            ys, xs = np.where(mask)
            left, top, right, bottom = (int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
            polygon = [left, top, right, top, right, bottom, left, bottom]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + number,
                    "category_id": (3, 7)[kind],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": _rle(mask) if kind == 0 else [polygon],
                }
            )
        name = f"{split}_{number}.png"
        Image.fromarray(picture).save(root / split / name)
        images.append({"id": 10 + number, "file_name": name, "width": width, "height": height})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": NAMES[0]}, {"id": 7, "name": NAMES[1]}],
    }
    (root / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def write_panoptic(root: Path, split: str = "train", count: int = 4) -> Path:
    """The same pictures with ground (category 9, stuff) around the objects."""
    write_coco(root, split, count)
    content = json.loads((root / f"instances_{split}.json").read_text())
    folder = root / f"panoptic_{split}"
    folder.mkdir(exist_ok=True)
    annotations = []
    for image in content["images"]:
        picture = np.asarray(Image.open(root / split / image["file_name"])).astype(int)
        ids = np.full(picture.shape[:2], 200)
        segments = [{"id": 200, "category_id": 9, "iscrowd": 0}]
        objects = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        for number, entry in enumerate(objects, 1):
            left, top, width, height = entry["bbox"]
            colour = COLOURS[(3, 7).index(entry["category_id"])]
            box = (slice(top, top + height), slice(left, left + width))
            ids[box][(picture[box] == colour).all(-1)] = number
            segments.append({"id": number, "category_id": entry["category_id"], "iscrowd": 0})
        for segment in segments:
            segment["area"] = int((ids == segment["id"]).sum())
        colours = np.stack([ids % 256, ids // 256, ids * 0], axis=-1).astype(np.uint8)
        Image.fromarray(colours).save(folder / image["file_name"])
        annotations.append(
            {"image_id": image["id"], "file_name": image["file_name"], "segments_info": segments}
        )
    categories = [{**category, "isthing": 1} for category in content["categories"]]
    categories.append({"id": 9, "name": "ground", "isthing": 0})
    truth = {"images": content["images"], "annotations": annotations, "categories": categories}
    (root / f"panoptic_{split}.json").write_text(json.dumps(truth))
    return root


def _rle(mask: Any) -> dict[str, Any]:
    """COCO's uncompressed form: lengths of runs down the columns, zeros first."""
    flat = np.concatenate(([0], mask.T.reshape(-1).astype(int), [0]))
    edges = np.flatnonzero(np.diff(flat))
    ends = np.concatenate((edges, [mask.size])) if not len(edges) or edges[-1] != mask.size else edges
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate(([0], ends))).tolist()}


SMALL_DETECTOR: dict[str, Any] = {
    "channels": 32,
    "head_channels": 64,
    "min_size": 64,
    "max_size": 96,
    "rpn_pre_nms_top_n": (200, 200),
    "rpn_post_nms_top_n": (64, 64),
    "rpn_batch_size_per_image": 64,
    "box_batch_size_per_image": 64,
}


def tiny_detection(
    root: Path, network: str = "mask_rcnn_r18", data: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any]:
    """A detector and its data, made for the pictures above."""
    from freqfusion.tasks import DetectionModule, ObjectData

    datamodule = ObjectData(
        "coco",
        root=str(root),
        **{
            "val_split": "train",
            "test_split": "train",
            "short_sides": [64],
            "max_size": 96,
            "batch_size": 4,
            "flip": 0.0,
            "workers": 0,
            **(data or {}),
        },
    )
    module = DetectionModule(
        network,
        num_classes=datamodule.num_classes,
        things=datamodule.things,
        network_options=SMALL_DETECTOR,
        **{"optimizer": "adamw", "lr": 2e-3, "lr_batch_size": None, "warmup_steps": 2, **options},
    )
    return module, datamodule


def train_in_two(root: Path, out: Path) -> None:
    from freqfusion.training import create_trainer

    network, objects = tiny_detection(root, data={"batch_size": 2, "val_split": "val"})
    trainer = create_trainer(
        out, accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, enable_progress_bar=False
    )
    trainer.fit(network, objects)
    trainer.validate(network, objects, verbose=False)


if __name__ == "__main__":
    from two_processes import run_in_two

    sys.exit(run_in_two(lambda: train_in_two(Path(sys.argv[1]), Path(sys.argv[2]))))
