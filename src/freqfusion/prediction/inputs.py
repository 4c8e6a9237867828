"""The images to predict: a file, a folder, a pattern, or the frames of a video."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqfusion.data import BadSampleError, read_image
from freqfusion.data.images import PICTURE_SUFFIXES

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
"""What is read as a video."""


@dataclass(frozen=True)
class ImageRecord:
    """An image to predict."""

    name: Path
    """Relative path for its results, without suffix."""
    file: str
    """Its file, as a path below the folder that was named; of a frame the video's, with the frame's number."""
    read: Callable[[], Tensor]
    """Its pixels, ``(3, H, W)`` uint8; raises :class:`~freqfusion.data.BadSampleError`."""


@dataclass(frozen=True)
class Source:
    """Images to predict, in order."""

    count: int | None
    """How many there are; None for a video that does not tell."""
    pictures: Iterator[ImageRecord]


def open_source(source: str | Path, out: Path, videos: bool = True) -> Source:
    """The images at ``source``, each with the name of its results.

    A folder is searched through all its subfolders in sorted order; ``out`` is left out where it lies inside.
    Images that differ in the suffix alone keep it (``a.jpg``, ``a.png``), so that no result overwrites another.
    The frames of a video ``clip.mp4`` are named ``clip/000000``, ``clip/000001``, ...

    Args:
        source: an image, a video, a folder of images, or a pattern such as ``photos/**/*.jpg``.
        out: folder of the results.
        videos: whether ``source`` may be a video.

    Raises:
        FileNotFoundError: if nothing is there.
        ImportError: for a video, if neither PyAV nor OpenCV is installed.
        ValueError: if ``source`` is empty, a folder within ``out``, or a video that may not be one.
    """
    wanted = f"give an image, {'a video, ' if videos else ''}a folder or a pattern"
    if not str(source).strip():  # would be the working directory
        raise ValueError(f"no source is named: {wanted}")
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() in VIDEO_SUFFIXES:
            if not videos:
                raise ValueError(
                    f"{source} is a video, expected images: save the frames to look at as images"
                )
            return _open_video(path)
        return Source(1, iter([_picture(path, path.parent, Path(path.stem))]))
    if path.is_dir():
        found: Iterable[Path] = path.rglob("*")
        top: Path | None = path
        nothing = f"there is no image in {source} or its subfolders"
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"the images are within the folder of the results, {out}: give another one")
    elif glob.has_magic(str(source)):
        found = map(Path, glob.iglob(str(source), recursive=True))
        top = None
        nothing = f"no image fits the pattern {source}"
    else:
        raise FileNotFoundError(f"{source} does not exist; {wanted}")
    results = out.resolve()
    files = [
        file
        for file in sorted(found)
        if file.suffix.lower() in PICTURE_SUFFIXES
        and not file.name.startswith(".")
        and file.is_file()
        and results not in file.resolve().parents
    ]
    if not files:
        raise FileNotFoundError(f"{nothing}; looked for {', '.join(sorted(PICTURE_SUFFIXES))}")
    if top is None:
        top = Path(os.path.commonpath([file.parent for file in files]))
    relative = [file.relative_to(top) for file in files]
    # Compared without case, because some file systems do.
    uses = Counter(str(name.with_suffix("")).lower() for name in relative)
    names = [
        name if uses[str(name.with_suffix("")).lower()] > 1 else name.with_suffix("") for name in relative
    ]
    return Source(len(files), map(_picture, files, repeat(top), names))


def _picture(path: Path, top: Path, name: Path) -> ImageRecord:
    return ImageRecord(name, path.relative_to(top).as_posix(), partial(read_image, path))


def _open_video(path: Path) -> Source:
    if find_spec("av") is not None:
        count, frames = _frames_by_av(path)
    elif find_spec("cv2") is not None:
        count, frames = _frames_by_opencv(path)
    else:
        raise ImportError(
            f"{path} is a video, which takes PyAV (or OpenCV) to read. "
            'Run: python -m pip install "freqfusion[video]"'
        )

    def pictures() -> Iterator[ImageRecord]:
        for number, pixels in enumerate(frames):
            frame = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()
            yield ImageRecord(Path(path.stem, f"{number:06d}"), f"{path.name} frame {number}", frame.clone)

    return Source(count, pictures())


def _frames_by_av(path: Path) -> tuple[int | None, Iterator[Any]]:
    import av

    try:
        container: Any = av.open(str(path))
        stream = next(iter(container.streams.video))
    except (av.FFmpegError, StopIteration) as error:
        raise BadSampleError(
            f"{path}: cannot be read as a video ({error or 'it has no pictures'}). The file is truncated, damaged or "
            "of another kind; replace it with a good copy."
        ) from error

    def frames() -> Iterator[Any]:
        with container:
            try:
                for frame in container.decode(stream):
                    yield upright(frame.to_ndarray(format="rgb24"), frame.rotation)
            except av.FFmpegError as error:
                raise BadSampleError(f"{path}: breaks off ({error}); replace it with a good copy.") from error

    return stream.frames or None, frames()


def upright(pixels: Any, rotation: int) -> Any:
    """A frame ``(H, W, 3)`` as a player shows it, which turns it counterclockwise by ``rotation`` degrees."""
    return np.rot90(pixels, rotation // 90)


def _frames_by_opencv(path: Path) -> tuple[int | None, Iterator[Any]]:
    import cv2

    video: Any = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise BadSampleError(f"{path}: cannot be read as a video. Replace it with a good copy.")

    def frames() -> Iterator[Any]:
        while True:
            there, frame = video.read()
            if not there:
                video.release()
                return
            yield frame[..., ::-1]

    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    return count if count > 0 else None, frames()
