import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from host_cases import HostCase

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # it writes its settings when imported

with np.printoptions():  # it changes how numbers are printed, which doctests would show
    from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel
torch.set_printoptions(profile="default")

_UP = [-1, 1, "nn.Upsample", [None, 2, "nearest"]]


def config(head: list[Any]) -> dict[str, Any]:
    """A path-aggregating network with strides 4 to 16 in the words of ultralytics."""
    return {
        "nc": 3,
        "backbone": [
            [-1, 1, "Conv", [16, 3, 2]],
            [-1, 1, "Conv", [16, 3, 2]],
            [-1, 1, "Conv", [32, 3, 2]],
            [-1, 1, "Conv", [64, 3, 2]],
        ],
        "head": [
            _UP,
            [[-1, 2], 1, "Concat", [1]],
            [-1, 1, "C2f", [32]],
            _UP,
            [[1, -1], 1, "Concat", [1]],  # the coarse map comes second, as in RT-DETR
            [-1, 1, "C2f", [16]],
            [-1, 1, "Conv", [32, 3, 2]],
            [[-1, 6], 1, "Concat", [1]],  # no place for a fusion: here the fine map comes down
            [-1, 1, "C2f", [32]],
            head,
        ],
    }


def yolo() -> nn.Module:
    return DetectionModel(config([[9, 12], 1, "Detect", ["nc"]]), verbose=False)


def rtdetr() -> nn.Module:
    # width, queries, points, heads, layers, width of the feed-forward layers
    return RTDETRDetectionModel(
        config([[9, 12], 1, "RTDETRDecoder", ["nc", 32, 20, 2, 4, 1, 32]]), verbose=False
    )


def write_data(folder: Path) -> str:
    """Four pictures with a box each, and the file that describes them."""
    from PIL import Image

    for i in range(4):
        for part in ("images", "labels"):
            (folder / part).mkdir(exist_ok=True)
        image = Image.new("RGB", (64, 64), (20, 40, 60 * i))
        image.paste((250, 200, 0), (8, 16, 40, 48))
        image.save(folder / f"images/{i}.png")
        (folder / f"labels/{i}.txt").write_text("0 0.375 0.5 0.5 0.5\n")
    file = folder / "data.yaml"
    file.write_text(
        yaml.safe_dump({"path": str(folder), "train": "images", "val": "images", "names": list("abc")})
    )
    return str(file)


_REFUSED: dict[str, Any] = {"limit": "Sizes of tensors must match"}

CASES = [
    HostCase("YOLO", yolo, sites=2, **_REFUSED),
    HostCase("RTDETR", rtdetr, sites=2, **_REFUSED),
]
