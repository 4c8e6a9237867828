"""The run lengths in the text of COCO's compressed masks."""

import re

_COMPRESSED = re.compile(r"(?:[P-o]{0,5}[0-O])+")
"""The characters of one number: those with the bit for "more follows", then one without."""


def run_lengths(counts: str) -> list[int]:
    """The run lengths of a compressed RLE, of zeros first.

    Mask decoders cannot be left to refuse a damaged text: pycocotools refuses runs beyond the image alone; what they
    do not cover it leaves as it finds it in memory, and at a text that is cut off it may read on.

    Each number is written in groups of five bits, lowest first, as characters from ``"0"`` on; a sixth bit says that
    more follow, the fifth of the last group is the sign. From the fourth number on it is the difference to the
    number two before (COCO API, ``maskApi.c``).

    Raises:
        ValueError: for a text that holds other characters or is cut off.

    Example:
        >>> run_lengths(";230009")  # a mask of 5 x 7 pixels with a rectangle of 2 x 3
        [11, 2, 3, 2, 3, 2, 12]
    """
    import numpy as np

    if not counts:
        return []
    if not _COMPRESSED.fullmatch(counts):
        raise ValueError("it is cut off or holds a character that does not occur in a compressed RLE")
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    runs: list[int] = numbers.tolist()
    return runs
