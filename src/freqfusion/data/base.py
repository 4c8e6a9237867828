"""What all datasets share: the sample, the checks of files and the choice of what to do with bad ones."""

import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from freqfusion._files import read_text
from freqfusion.data.images import PICTURE_SUFFIXES, BadSampleError, Decoded, decode_image, decode_mask

_log = logging.getLogger(__name__)

Sample = dict[str, Any]
Palette = tuple[tuple[int, int, int], ...]


def voc_colour(index: int) -> tuple[int, int, int]:
    """The colour of an index in Pascal VOC's colour map (VOC development kit, ``VOClabelcolormap``).

    The bits of the index are dealt out to red, green and blue, from the top bit of each downwards, so that
    any number of indices up to 255 get distinct colours.

    Example:
        >>> [voc_colour(index) for index in (0, 1, 2, 15)]
        [(0, 0, 0), (128, 0, 0), (0, 128, 0), (192, 128, 128)]
    """
    red = green = blue = 0
    for step in range(8):
        red |= (index >> (3 * step) & 1) << (7 - step)
        green |= (index >> (3 * step + 1) & 1) << (7 - step)
        blue |= (index >> (3 * step + 2) & 1) << (7 - step)
    return red, green, blue


class SegmentationDataset(Dataset[Sample]):
    """Base of the datasets.

    A sample is a dict of ``image`` (``tv_tensors.Image``, ``(3, H, W)`` uint8), ``mask``
    (``tv_tensors.Mask``, ``(H, W)`` uint8, classes ``0..K-1`` or ``ignore_index``) and ``name`` (str).
    """

    classes: tuple[str, ...]
    """Names of the K classes, by index."""
    palette: Palette
    """One RGB colour a class, 0..255."""
    ignore_index: int = 255
    """The mask value of pixels without truth."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError


class Pair(NamedTuple):
    """The files of one sample, existing or not."""

    name: str
    image: Path
    mask: Path


class _Listed(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=_Listed)


class SampleFiles(Dataset[Sample], Generic[Entry]):
    """Base of the datasets that live in files: finds, checks and reads samples, and deals with bad ones.

    A subclass says where the files are (:meth:`find`, :meth:`files`) and how a sample is read (:meth:`read`);
    this class checks them, so that every dataset answers a bad file with the same words.

    Args:
        root: folder of the data.
        split: ``"train"``, ``"val"`` or ``"test"``, as far as the dataset has labels for it.
        skip_bad: leave bad files out with a warning instead of raising :class:`BadSampleError`. Samples with
            a missing file are dropped at the start. In ``train`` a sample found bad on reading is replaced by
            the next good one; of the other splits every sample is read once at the start and dropped if bad,
            so that no score counts a sample twice.

    Raises:
        ValueError: for a split that the dataset does not have.
        FileNotFoundError: if a folder or list of the layout is missing.
        BadSampleError: for a missing file, unless ``skip_bad``; while reading, for a broken, mismatched or
            mislabelled one. The message names the file and the mend.
    """

    layout: ClassVar[str]
    """One sentence on the expected files, for error messages."""
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    """The splits there are; none listed where that is up to the files."""

    def __init__(self, root: str | Path, split: str, *, skip_bad: bool = False) -> None:
        self.root = Path(root)
        self.split = split
        self.skip_bad = skip_bad
        self._replaces_bad = skip_bad and split == "train"
        if self.splits and split not in self.splits:
            raise ValueError(
                f"{type(self).__name__} has no labelled split {split!r}; "
                f"choose one of {', '.join(self.splits)}"
            )
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder. {self.layout}")
        self._listings: dict[Path, dict[str, list[Path]]] = {}
        self._reported: set[str] = set()
        found = list(self.find())
        if not found:
            raise FileNotFoundError(f"{self.root}: no sample of the split {split!r} in it. {self.layout}")
        self.entries = [entry for entry in found if self._usable(entry)]
        if not self.entries:
            raise BadSampleError(
                f"{self.root}: none of the {len(found)} samples of the split {split!r} can be used; "
                "see the warnings, or leave out skip_bad to see the first error."
            )

    def find(self) -> Iterable[Entry]:
        """The files of every sample of the split, in a fixed order, whether they exist or not."""
        raise NotImplementedError

    def files(self, entry: Entry) -> Sequence[Path]:
        """All files of a sample."""
        raise NotImplementedError

    def read(self, entry: Entry) -> Sample:
        """Read a sample.

        Raises:
            BadSampleError: for files that cannot be used.
        """
        raise NotImplementedError

    def labels(self, entry: Entry) -> Iterable[int]:
        """The labels that occur in the truth of a sample, which is read alone; crowds do not count.

        Raises:
            BadSampleError: for files that cannot be used.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        for step in range(len(self)):
            entry = self.entries[(index + step) % len(self)]
            try:
                return self.read(entry)
            except BadSampleError as error:
                if not self._replaces_bad:
                    raise
                self._report(entry, error)
        raise BadSampleError(f"{self.root}: none of the {len(self)} samples can be read; see the warnings.")

    def require_folder(self, folder: Path) -> Path:
        """``folder``, if it exists; else an error that names the layout."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder. {self.layout}")
        return folder

    def read_lines(self, path: Path) -> list[str]:
        """The lines of a text file that are not blank; an error that names the layout if it is missing."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file. {self.layout}")
        lines = re.split(r"\r\n|\r|\n", read_text(path))
        return [line.strip() for line in lines if line.strip()]

    def names(self, folder: Path, end: str = "") -> set[str]:
        """The names of the pictures in a folder, without their endings and without ``end`` before it."""
        return {
            _normal(path.stem).removesuffix(end)
            for paths in self._listing(folder).values()
            for path in paths
            if path.suffix.lower() in PICTURE_SUFFIXES and _normal(path.stem).endswith(end)
        }

    def file(
        self,
        folder: Path,
        name: str,
        ending: str,
        *,
        endings: Collection[str] = PICTURE_SUFFIXES,
        any_case: bool = False,
    ) -> Path:
        """The file of a name in a folder, whatever its ending and the Unicode normal form of its name.

        Args:
            folder: where to look.
            name: without an ending.
            ending: of the path that is given where there is no such file.
            endings: those to look for; case does not matter.
            any_case: take a file whose name differs in case alone, where there is no better one.

        Raises:
            ValueError: if there are several, or the name leads out of the folder.
        """
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"{name!r} is listed as a sample, expected the name of a file below {folder}")
        beside = [path for path in self._beside(folder, name) if path.suffix.lower() in endings]
        found = [path for path in beside if _normal(path.stem) == _normal(name)] or (
            beside if any_case else []
        )
        if len(found) > 1:
            raise ValueError(
                f"{found[1]}: has the name of {found[0]} too; keep one of them, or rename one with its partner"
            )
        return found[0] if found else folder / f"{name}{ending}"

    def _listing(self, folder: Path) -> dict[str, list[Path]]:
        """The files in a folder by their names without ending, in small letters."""
        if folder not in self._listings:
            listing: dict[str, list[Path]] = {}
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    names = sorted(
                        entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()
                    )
                for name in names:
                    listing.setdefault(_normal(Path(name).stem).casefold(), []).append(folder / name)
            self._listings[folder] = listing
        return self._listings[folder]

    def _beside(self, folder: Path, name: str) -> list[Path]:
        """The files in a folder whose names are alike but for ending, case and normal form."""
        return self._listing(folder).get(_normal(name).casefold(), [])

    def in_frame(self, picture: Decoded, path: Path, size: tuple[int, int], orientation: int = 1) -> Tensor:
        """The pixels of a picture as its truth was drawn: upright, or as stored where only that size fits.

        Args:
            picture: what was read.
            path: its file.
            size: height and width of the truth.
            orientation: of the truth's own file.
        """
        if picture.orientation == orientation or picture.stored_size != size:
            return picture.pixels
        if picture.size == size:
            self._note(
                "EXIF",
                f"{path}: its EXIF orientation is {picture.orientation}, that of its truth {orientation}, and the "
                "size of the truth fits the picture upright and as stored. Pictures are taken upright; if the truth "
                "was drawn on the stored pixels, remove the orientation from the pictures' files (exiftool "
                "-Orientation= FILES). This is said of the first such picture alone.",
            )
            return picture.pixels
        self._note(
            "EXIF as stored",
            f"{path}: its truth fits the pixels as stored, without the EXIF orientation {picture.orientation}; such "
            "pictures are read without it. (predict turns pictures upright.) This is said of the first one alone.",
        )
        return picture.as_stored()

    def _note(self, key: str, text: str) -> None:
        """Log a warning once."""
        if key not in self._reported:
            self._reported.add(key)
            _log.warning("%s", text)

    def _usable(self, entry: Entry) -> bool:
        paths = self.files(entry)
        try:
            for path in paths:
                if not path.is_file():
                    partners = [str(partner) for partner in paths if partner != path]
                    of = (
                        f"the partner of {partners[0]}"
                        if partners
                        else f"the file of the sample {entry.name}"
                    )
                    beside = ", ".join(map(str, self._beside(path.parent, path.stem)))
                    raise BadSampleError(
                        f"{path}: missing, {of}{f' (there is {beside})' if beside else ''}. Restore it, or remove "
                        "the sample, or leave such samples out with skip_bad (--skip-bad)."
                    )
            if self.skip_bad and not self._replaces_bad:
                self.read(entry)
        except BadSampleError as error:
            if not self.skip_bad:
                raise
            self._report(entry, error)
            return False
        return True

    def _report(self, entry: Entry, error: BadSampleError) -> None:
        self._note(f"sample {entry.name}", f"left out the sample {entry.name}: {error}")


class FileDataset(SampleFiles[Pair], SegmentationDataset):
    """Base of the segmentation datasets in files; for arguments and errors see :class:`SampleFiles`.

    A subclass also says what a stored label value means (:attr:`values`).
    """

    values: Mapping[int, int]
    """Stored label value -> class index or ``ignore_index``."""

    @cached_property
    def _classes_of_values(self) -> Tensor:
        table = torch.full((256,), -1, dtype=torch.int16)
        for value, label in self.values.items():
            table[value] = label
        return table

    def files(self, entry: Pair) -> Sequence[Path]:
        """The picture and its mask."""
        return [entry.image, entry.mask]

    def read(self, entry: Pair) -> Sample:
        """Read a picture and its classes."""
        picture, mask = decode_image(entry.image), self.read_classes(entry)
        image = self.in_frame(picture, entry.image, mask.size, mask.orientation)
        if image.shape[1:] != mask.size:
            orientations = (picture.orientation, mask.orientation)
            turned = "" if orientations == (1, 1) else f" (upright; EXIF orientations {orientations})"
            raise BadSampleError(
                f"{entry.mask}: is {mask.size[1]}x{mask.size[0]} pixels, but its picture {entry.image} "
                f"is {image.shape[2]}x{image.shape[1]}{turned}. Give them one size (resize labels with nearest "
                "neighbour), or leave the sample out with skip_bad (--skip-bad)."
            )
        return {
            "image": tv_tensors.Image(image),
            "mask": tv_tensors.Mask(mask.pixels),
            "name": entry.name,
        }

    def read_classes(self, entry: Pair) -> Decoded:
        """The classes of a sample, ``(H, W)`` uint8.

        Raises:
            BadSampleError: for files that cannot be used.
        """
        stored = self._read_stored(entry.mask)
        return Decoded(self._decode(stored.pixels, entry.mask), stored.orientation)

    def labels(self, entry: Pair) -> Iterable[int]:
        """The classes of a sample, perhaps with ``ignore_index``."""
        present: list[int] = self.read_classes(entry).pixels.unique().tolist()
        return present

    def _read_stored(self, path: Path) -> Decoded:
        return decode_mask(path)

    def _decode(self, stored: Tensor, path: Path) -> Tensor:
        known = stored.clamp(0, 255)
        labels = self._classes_of_values[known]
        strange = stored[(labels < 0) | (known != stored)]
        if strange.numel():
            raise BadSampleError(
                f"{path}: holds the label values {_ranges(strange.unique().tolist())}, but "
                f"{type(self).__name__} has only {_ranges(sorted(self.values))}. Was it written for another "
                "label set, or saved in colours? Store the class indices, or leave the sample out with "
                "skip_bad (--skip-bad)."
            )
        return labels.to(torch.uint8)


def _normal(name: str) -> str:
    """The name in one Unicode normal form: systems write an accent with its letter or after it."""
    return unicodedata.normalize("NFC", name)


def _ranges(values: Sequence[int]) -> str:
    """Sorted integers as text with runs drawn together, at most ten of them.

    Example:
        >>> _ranges([0, 1, 2, 5, 255])
        '0..2, 5, 255'
    """
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    texts = [str(first) if first == last else f"{first}..{last}" for first, last in runs]
    return ", ".join(texts[:10]) + (", ..." if len(texts) > 10 else "")
