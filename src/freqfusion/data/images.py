"""Reading pictures and label maps of every common kind into tensors."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

_LIMIT_LOCK = threading.Lock()


class BadSampleError(ValueError):
    """A file of a dataset that cannot be used; the message names the file and the mend."""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The decoded, upright picture at ``path``; whatever fails in between is a :class:`BadSampleError`."""
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
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception as error:  # broken files make decoders raise almost anything
        raise BadSampleError(
            f"{path}: cannot be read as a picture ({type(error).__name__}: {error}). "
            "The file is truncated, damaged or of another kind; replace it with a good copy."
        ) from error
    yield upright


def read_image(path: str | Path) -> Tensor:
    """Read a picture as RGB.

    EXIF orientation is applied; greyscale, 1-bit, palette, CMYK and so on become RGB; an alpha channel is
    dropped; 16-bit greyscale is scaled to 8 bit by 255 / 65535. Of an animation, the first frame is read.

    Returns:
        ``(3, H, W)`` uint8.

    Raises:
        BadSampleError: if the file is missing, broken or of an unknown kind.
    """
    path = Path(path)
    with _opened(path) as picture:
        if picture.mode.startswith("I"):  # 16-bit greyscale; older Pillow opens it as 32-bit "I"
            grey = np.asarray(picture).astype(np.int64)
            if grey.min() < 0 or grey.max() > 65535:
                raise BadSampleError(
                    f"{path}: holds values from {grey.min()} to {grey.max()}, expected 16 bits (0 to 65535). "
                    "Save it with 8 or 16 bits a channel."
                )
            pixels = np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
        elif picture.mode == "F":
            raise BadSampleError(f"{path}: holds floating-point values. Save it with 8 or 16 bits a channel.")
        else:
            if "transparency" in picture.info:
                picture = picture.convert("RGBA")
            pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_mask(path: str | Path, *, brightness: bool = False) -> Tensor:
    """Read a label map as the values stored in the file. EXIF orientation is applied, as to images.

    Args:
        path: a picture with one value a pixel.
        brightness: of a palette picture give the brightness of its colours, not the indices: of a map in black and
            white, which may have either at index 0.

    Returns:
        ``(H, W)`` int64.

    Raises:
        BadSampleError: if the file is missing, broken or holds colours instead of one value a pixel.
    """
    path = Path(path)
    with _opened(path) as picture:
        if len(picture.getbands()) != 1 or picture.mode == "F":
            raise BadSampleError(
                f"{path}: is a picture of mode {picture.mode}, expected one class index a pixel. "
                "Save it as an 8-bit greyscale or palette PNG whose values are the class indices."
            )
        if brightness and picture.mode == "P":
            picture = picture.convert("L")
        return torch.from_numpy(np.asarray(picture).astype(np.int64))
