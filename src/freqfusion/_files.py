"""Files that are either there in full or not there at all, and texts in any form of Unicode."""

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` as :func:`replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to, which takes its place at the end; missing folders are made.

    A reader, or a process killed half-way, never sees a half-written file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        ValueError: for a file in another encoding; the message names it and the mend.
    """
    data = path.read_bytes()
    marks = {  # the first of UTF-32 begins with one of UTF-16
        "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
        "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    }
    encoding = next((name for name, mark in marks.items() if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
        if "\0" in text:
            raise ValueError("it holds characters of the code 0")
    except ValueError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}). Save it as UTF-8.") from error
    return text
