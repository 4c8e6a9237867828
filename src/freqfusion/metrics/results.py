"""Result files in the forms that COCO's evaluation servers take."""

import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqfusion._files import write_atomically
from freqfusion._optional import require
from freqfusion._rle import run_lengths

LARGEST_ID = 256**3 - 1
"""The largest segment id that the three colours of a panoptic PNG can hold."""


def is_whole(value: Any) -> bool:
    """Whether it is an integer; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_id(value: Any) -> bool:
    """Whether it can name an image: an integer or a text."""
    return is_whole(value) or isinstance(value, str)


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


def shown(value: Any) -> str:
    """The value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_rle(mask: Any, name: str, size: tuple[int, int] | None = None) -> None:
    """Refuse what is no compressed RLE of a mask: decoders read beyond their memory on a damaged one.

    Args:
        mask: what should be ``{"size": [H, W], "counts": "..."}``.
        name: what to call it in the error.
        size: ``(H, W)`` that it must have, if known.

    Raises:
        ValueError: if it is anything else, has another size, or its runs do not fill it.
    """
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
        raise ValueError(
            f'{name} must be a compressed RLE {{"size": [height, width], "counts": "..."}} with counts as text, got '
            f"{shown(mask)}; polygons and lists of counts can be converted with pycocotools.mask.frPyObjects"
        )
    height_width = mask.get("size")
    if (
        not isinstance(height_width, (list, tuple))
        or len(height_width) != 2
        or not all(is_whole(length) and length > 0 for length in height_width)
    ):
        raise ValueError(f"{name} needs a size [height, width] above 0, got {shown(height_width)}")
    if size is not None and tuple(height_width) != size:
        raise ValueError(
            f"{name} is of {height_width[0]} x {height_width[1]} pixels (height x width), but its image of "
            f"{size[0]} x {size[1]}; bring masks to the size of the image"
        )
    try:
        runs = run_lengths(mask["counts"])
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if min(runs, default=0) < 0 or sum(runs) != math.prod(height_width):
        raise ValueError(
            f"{name} is damaged: its runs add up to {sum(runs)} pixels, not to {height_width[0]} x {height_width[1]}"
        )


def check_box(box: Any, name: str) -> None:
    """Refuse what is no ``[x, y, width, height]``.

    Raises:
        ValueError: if it is anything but four finite numbers, or width or height is below 0.
    """
    if (
        not isinstance(box, (list, tuple))
        or len(box) != 4
        or not all(is_number(value) for value in box)
        or min(box[2:]) < 0
    ):
        raise ValueError(
            f"{name} must be [x, y, width, height], finite and with a size of 0 or more, got {shown(box)}"
        )


def check_detection(entry: Any, name: str) -> None:
    """Refuse an entry of a result list that an evaluator could not take.

    Raises:
        ValueError: naming ``name`` and what is wrong.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{name} must be an object with image_id, category_id and so on, got {shown(entry)}")
    if not is_id(entry.get("image_id")):
        raise ValueError(
            f"{name}: image_id must be a whole number or text, got {shown(entry.get('image_id'))}"
        )
    if not is_whole(entry.get("category_id")):
        raise ValueError(f"{name}: category_id must be a whole number, got {shown(entry.get('category_id'))}")
    if not is_number(entry.get("score")):
        raise ValueError(f"{name}: score must be a finite number, got {shown(entry.get('score'))}")
    if "bbox" not in entry and "segmentation" not in entry:
        raise ValueError(f"{name} has neither bbox nor segmentation, got {sorted(entry)}")
    if "bbox" in entry:
        check_box(entry["bbox"], f"{name}: bbox")
    if "segmentation" in entry:
        check_rle(entry["segmentation"], f"{name}: segmentation")


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def write_detections(path: str | Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Write detections as one JSON list, atomically.

    Args:
        path: the file.
        results: as :meth:`~freqfusion.metrics.CocoMetric.results` gives them: ``image_id``, ``category_id``,
            ``score`` and ``bbox`` ``[x, y, width, height]`` or ``segmentation`` (compressed RLE), or both.

    Raises:
        ValueError: for an entry that an evaluator could not take; nothing is written.
    """
    results = list(results)
    for index, entry in enumerate(results):
        check_detection(entry, f"{path}: entry {index}")
    write_atomically(path, _json_bytes(results))


def write_panoptic_image(
    folder: str | Path, image_id: int | str, file_name: str, segments: Tensor, category_ids: Sequence[int]
) -> dict[str, Any]:
    """Write the segments of one image as a PNG, atomically, for COCO's panoptic form.

    A pixel of the segment with the id ``i`` has the colour ``(i % 256, i // 256 % 256, i // 65536)``; black is void.

    Args:
        folder: where the PNGs of the set are.
        image_id: of the ground truth.
        file_name: of the PNG, without a folder.
        segments: ``(H, W)``, integers: j for the j-th segment, from 1; 0 for void.
        category_ids: the category of each segment, as the ground truth numbers them.

    Returns:
        The entry for :func:`write_panoptic`: ``image_id``, ``file_name`` and ``segments_info`` of the segments that
        have a pixel (the benchmark's evaluator refuses others).

    Raises:
        TypeError: for segments or categories that are no integers.
        ValueError: for a wrong shape, a segment without a category, or a file name with a folder or without
            ``.png``.
    """
    if segments.is_floating_point() or segments.is_complex() or segments.dtype == torch.bool:
        raise TypeError(f"segments must have an integer dtype, got {segments.dtype}")
    if not all(is_whole(category) for category in category_ids):
        raise TypeError(f"category_ids must be whole numbers, got {shown(list(category_ids))}")
    if segments.ndim != 2 or not segments.numel():
        raise ValueError(f"segments must have the shape (H, W), got {tuple(segments.shape)}")
    segments = segments.long().cpu()
    present = segments.unique().tolist()
    if present[0] < 0 or present[-1] > min(len(category_ids), LARGEST_ID):
        raise ValueError(
            f"segments must hold 0 (void) or the place, from 1, of one of the {len(category_ids)} category_ids (at "
            f"most {LARGEST_ID}), got values from {present[0]} to {present[-1]}"
        )
    entry = {
        "image_id": image_id,
        "file_name": file_name,
        "segments_info": [{"id": j, "category_id": category_ids[j - 1]} for j in present if j],
    }
    _check_panoptic(entry, f"the entry of image {image_id!r}")
    colours = torch.stack([segments % 256, segments // 256 % 256, segments // 256**2], dim=2)
    buffer = io.BytesIO()
    image = require("PIL.Image", "train").fromarray(colours.to(torch.uint8).numpy())
    image.save(buffer, format="PNG")
    write_atomically(Path(folder) / file_name, buffer.getvalue())
    return entry


def _check_panoptic(entry: Any, name: str) -> None:
    """Refuse an entry of a panoptic result that the evaluator could not take."""
    if not isinstance(entry, dict) or set(entry) != {"image_id", "file_name", "segments_info"}:
        raise ValueError(f"{name} must have image_id, file_name and segments_info alone, got {shown(entry)}")
    if not is_id(entry["image_id"]):
        raise ValueError(f"{name}: image_id must be a whole number or text, got {shown(entry['image_id'])}")
    file_name = entry["file_name"]
    if (
        not isinstance(file_name, str)
        or Path(file_name).name != file_name
        or Path(file_name).suffix != ".png"
    ):
        raise ValueError(
            f"{name}: file_name must be the name of a PNG without a folder, got {shown(file_name)}"
        )
    segments = entry["segments_info"]
    if not isinstance(segments, (list, tuple)):
        raise ValueError(f"{name}: segments_info must be a list, got {shown(segments)}")
    ids = set()
    for segment in segments:
        if not isinstance(segment, dict) or set(segment) != {"id", "category_id"}:
            raise ValueError(f"{name}: a segment must have id and category_id alone, got {shown(segment)}")
        if not is_whole(segment["id"]) or not 0 < segment["id"] <= LARGEST_ID or segment["id"] in ids:
            raise ValueError(
                f"{name}: ids of segments must differ and be from 1 to {LARGEST_ID}, got {shown(segment['id'])}"
            )
        if not is_whole(segment["category_id"]):
            raise ValueError(
                f"{name}: category_id must be a whole number, got {shown(segment['category_id'])}"
            )
        ids.add(segment["id"])


def write_panoptic(path: str | Path, folder: str | Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write the JSON of a panoptic result, atomically, once the PNGs of all its images are there.

    Args:
        path: the JSON file.
        folder: where the PNGs are.
        entries: one per image, as :func:`write_panoptic_image` returns them; of several processes, those of all.

    Raises:
        FileNotFoundError: if the PNG of an entry is missing.
        ValueError: for an entry that the benchmark's evaluator could not take, or two of one image or file.
    """
    entries = list(entries)
    images: set[int | str] = set()
    files: set[str] = set()
    for index, entry in enumerate(entries):
        name = f"{path}: entry {index}"
        _check_panoptic(entry, name)
        image_id, file_name = entry["image_id"], entry["file_name"]
        if image_id in images or file_name in files:
            raise ValueError(f"{name}: the image {image_id!r} or the file {file_name} has an entry already")
        if not (Path(folder) / file_name).is_file():
            raise FileNotFoundError(
                f"{Path(folder) / file_name}: no such file, but {name} names it. Write it with write_panoptic_image "
                "first."
            )
        images.add(image_id)
        files.add(file_name)
    write_atomically(path, _json_bytes({"annotations": entries}))
