"""A folder of pictures without truth."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from torchvision import tv_tensors

from freqfusion.data.base import Sample, SampleFiles
from freqfusion.data.images import PICTURE_SUFFIXES, decode_image

HELD_OUT = 10
"""Of a folder without splits every so many-th picture is kept for validation."""


class Picture(NamedTuple):
    """A picture's file."""

    name: str
    image: Path


class Pictures(SampleFiles[Picture]):
    """Pictures alone: a sample is ``image`` (``tv_tensors.Image``, ``(3, H, W)`` uint8) and ``name``.

    They are those in ``root/<split>/images`` or else ``root/<split>``, so the split may be any folder of the data,
    such as ``train2017``. A folder without such splits serves too: of the pictures in it and below, in the order of
    their paths, every tenth is ``val`` and the others are ``train``. For arguments and errors see
    :class:`~freqfusion.data.base.SampleFiles`.
    """

    layout: ClassVar[str] = (
        "Pictures are read from ROOT/<split>/images or ROOT/<split>; or from ROOT and all folders in it, where every "
        "tenth is for the split val and the others for train."
    )
    splits: ClassVar[tuple[str, ...]] = ()

    def find(self) -> Iterator[Picture]:
        """The pictures of the split."""
        folder = next(
            (
                place
                for place in (self.root / self.split / "images", self.root / self.split)
                if place.is_dir()
            ),
            None,
        )
        if folder is None and self.split not in ("train", "val"):
            self.require_folder(self.root / self.split)
        top = folder or self.root
        paths = sorted(
            path
            for path in top.rglob("*")
            if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file() and not path.name.startswith(".")
        )
        if folder is None:
            held_out = paths[HELD_OUT - 1 :: HELD_OUT] or paths[-1:]
            paths = held_out if self.split == "val" else [path for path in paths if path not in held_out]
        for path in paths:
            yield Picture(path.relative_to(top).with_suffix("").as_posix(), path)

    def files(self, entry: Picture) -> Sequence[Path]:
        """The picture."""
        return [entry.image]

    def read(self, entry: Picture) -> Sample:
        """Read a picture."""
        return {"image": tv_tensors.Image(decode_image(entry.image).pixels), "name": entry.name}
