"""Reading pictures and label maps of every common kind into tensors."""

import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

PICTURE_SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("bmp", "gif", "jfif", "jp2", "jpeg", "jpg", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff")
) | {".webp"}
"""Endings of the pictures that folders are searched for; case does not matter."""
_LIMIT_LOCK = threading.Lock()
_LARGE_PIXELS = 2**27
_PIXELS_A_BYTE = 10_000
"""Of a large picture a file's byte holds fewer: deflate reaches a ratio of 1032 and 8 pixels a byte (zlib.net)."""


_BYTES_A_PIXEL = 12
"""What reading a picture in colours takes at its peak."""


class BadSampleError(ValueError):
    """A file of a dataset that cannot be used; the message names the file and the mend."""


class Decoded(NamedTuple):
    """The pixels of a picture, upright by its EXIF orientation."""

    pixels: Tensor
    """``(..., H, W)``."""
    orientation: int
    """1 to 8 as EXIF counts them; 1 turns nothing."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, upright."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width as stored in the file."""
        height, width = self.size
        return (width, height) if self.orientation >= 5 else (height, width)

    def as_stored(self) -> Tensor:
        """The pixels as stored in the file."""
        pixels = self.pixels
        if self.orientation in (2, 3):
            pixels = pixels.flip(-1)
        if self.orientation in (3, 4):
            pixels = pixels.flip(-2)
        if self.orientation >= 5:
            pixels = pixels.transpose(-1, -2)
            if self.orientation in (6, 7):
                pixels = pixels.flip(-2)
            if self.orientation in (7, 8):
                pixels = pixels.flip(-1)
        return pixels.contiguous()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture at ``path``, not decoded yet; whatever fails in between is a :class:`BadSampleError`."""
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file. Restore it, or correct the path.")
    try:
        with _LIMIT_LOCK:  # Pillow refuses very large pictures by default; these are the user's own
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                picture = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        with picture:
            pixels, file_size = picture.width * picture.height, path.stat().st_size
            if pixels > max(_LARGE_PIXELS, _PIXELS_A_BYTE * file_size):
                raise ValueError(
                    f"it claims {picture.width}x{picture.height} pixels, which its {file_size} bytes cannot hold"
                )
            if pixels > _LARGE_PIXELS and _BYTES_A_PIXEL * pixels > free_memory():
                raise MemoryError
            yield picture
    except BadSampleError:
        raise
    except MemoryError as error:
        raise BadSampleError(
            f"{path}: needs more memory than there is. Make it smaller, or cut it into parts."
        ) from error
    except Exception as error:  # broken files make decoders raise almost anything
        raise BadSampleError(
            f"{path}: cannot be read as a picture ({type(error).__name__}: {error}). "
            "The file is truncated, damaged or of another kind; replace it with a good copy."
        ) from error


def free_memory() -> float:
    """Bytes that are free, where the system tells: it may end the process that asks for more."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


def _orientation(picture: Image.Image) -> int:
    # the method of Image: that of a PNG decodes the whole picture first
    value: Any = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
    return value if value in range(1, 9) else 1


def _decoded(path: Path, convert: Callable[[Image.Image, str], Any]) -> Decoded:
    """Decode a picture.

    Args:
        path: its file.
        convert: makes an array of the upright picture and a text that names its format and how pixels are stored.
    """
    with _opened(path) as picture:
        orientation, layout = _orientation(picture), f"{picture.format} {getattr(picture, 'tile', '')}"
        if orientation >= 5 and layout.startswith("TIFF") and "'raw'" in layout:
            raise BadSampleError(
                f"{path}: Pillow mixes up the pixels of an uncompressed TIFF with the orientation {orientation}. "
                "Save it upright, without the tag."
            )
        picture.load()
        orientation = max(orientation, _orientation(picture))  # it may stand behind the pixels
        pixels = torch.from_numpy(convert(ImageOps.exif_transpose(picture), layout))
    return Decoded(pixels, orientation)


def header_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, upright, from the header of its file.

    Raises:
        BadSampleError: if the file is missing, broken or of an unknown kind.
    """
    with _opened(path) as picture:
        width, height = picture.size
        turned = picture.format != "TIFF" and _orientation(picture) >= 5  # Pillow gives a TIFF's size upright
    return (width, height) if turned else (height, width)


def _note_depth(path: Path, bits: int) -> None:
    """Say so if few of the 16 bits that a picture stores are used."""
    if bits <= 14:
        warnings.warn(
            f"{path.parent}: holds 16-bit pictures that use only {bits} bits. Values are scaled by 255 / 65535, "
            f"alike in all pictures, which leaves about {max(2 ** (bits - 8), 1)} of 256 grey levels. Multiply them "
            "by one power of two (16 for 12 bits) in all pictures, those to train on and those to predict.",
            stacklevel=2,
        )


def _grey_of_many_bits(picture: Image.Image, layout: str, path: Path) -> Any:
    grey = np.asarray(picture).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise BadSampleError(
            f"{path}: holds values from {grey.min()} to {grey.max()}, expected 16 bits (0 to 65535). "
            "Save it with 8 or 16 bits a channel."
        )
    full = 4095 if "I;12" in layout else 65535  # a TIFF may say that it has 12 bits
    if full == 65535 and grey.any():
        _note_depth(path, int(grey.max()).bit_length())
    return np.repeat(((grey * 255 + full // 2) // full).astype(np.uint8)[None], 3, axis=0)


def decode_image(path: Path) -> Decoded:
    """Read a picture as RGB, ``(3, H, W)`` uint8; see :func:`read_image`."""

    def convert(picture: Image.Image, layout: str) -> Any:
        if picture.mode.startswith("I"):  # 16-bit greyscale; older Pillow opens it as 32-bit "I"
            return _grey_of_many_bits(picture, layout, path)
        if picture.mode == "F":
            raise BadSampleError(f"{path}: holds floating-point values. Save it with 8 or 16 bits a channel.")
        if "transparency" in picture.info:
            picture = picture.convert("RGBA")
        pixels = np.array(picture.convert("RGB"))
        top = int(pixels.max())
        if ";16" in layout:  # of 16-bit colours Pillow gives the upper 8
            _note_depth(path, 8 + top.bit_length())
        elif re.search(
            r"'ppm(_plain)?'.*\b65535\b", layout
        ):  # and of a PPM, which names its maximum, it rounds
            _note_depth(path, (257 * top - 128).bit_length())
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    return _decoded(path, convert)


def read_image(path: str | Path) -> Tensor:
    """Read a picture as RGB.

    EXIF orientation is applied; greyscale, 1-bit, palette, CMYK and so on become RGB; an alpha channel is
    dropped; 16-bit greyscale is scaled to 8 bit by 255 / 65535, with a warning if it holds 14 bits or fewer (the
    scale is that of the file's format, not of the picture's own values, so that pictures keep their relation). Of
    an animation, the first frame is read.

    Returns:
        ``(3, H, W)`` uint8.

    Raises:
        BadSampleError: if the file is missing, broken, too large for the memory or of an unknown kind.
    """
    return decode_image(Path(path)).pixels


def decode_mask(path: Path, brightness: bool = False) -> Decoded:
    """Read a label map, ``(H, W)`` int64; see :func:`read_mask`."""

    def convert(picture: Image.Image, layout: str) -> Any:
        if layout.startswith(("JPEG ", "MPO ")):
            raise BadSampleError(
                f"{path}: is a JPEG, which changes labels at their borders. Save it as an 8-bit PNG whose values are "
                "the class indices; of a mask in black and white, set grey values to the nearer of the two first."
            )
        if len(picture.getbands()) != 1 or picture.mode == "F":
            raise BadSampleError(
                f"{path}: is a picture of mode {picture.mode}, expected one class index per pixel. "
                "Save it as an 8-bit greyscale or palette PNG whose values are the class indices."
            )
        if picture.mode == "P" and (brightness or layout.startswith("GIF")):
            grey = picture.convert("L")
            if not brightness and (np.asarray(picture.convert("RGB")) != np.asarray(grey)[..., None]).any():
                raise BadSampleError(
                    f"{path}: is a GIF in colours, whose indices depend on the program that wrote it. "
                    "Save it as an 8-bit greyscale or palette PNG whose values are the class indices."
                )
            picture = grey
        return np.asarray(picture).astype(np.int64)

    return _decoded(path, convert)


def read_mask(path: str | Path, *, brightness: bool = False) -> Tensor:
    """Read a label map as the values stored in the file. EXIF orientation is applied, as to images.

    Args:
        path: a picture with one value per pixel.
        brightness: of a palette picture give the brightness of its colours, not the indices: of a map in black and
            white, which may have either at index 0. Of a GIF, which numbers its greys anew, it is always that.

    Returns:
        ``(H, W)`` int64.

    Raises:
        BadSampleError: if the file is missing, broken or holds colours instead of one value per pixel.
    """
    return decode_mask(Path(path), brightness).pixels
