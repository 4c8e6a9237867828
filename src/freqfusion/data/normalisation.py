"""Mean and deviation of images."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of the red, green and blue of ImageNet's images, in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviations of the same."""


class Normalisation(NamedTuple):
    """What is taken from an image in [0, 1], and what it is then divided by, per colour."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @classmethod
    def of(cls, mean: Iterable[float], std: Iterable[float]) -> "Normalisation":
        """From any numbers, tensors of one too."""
        return cls(tuple(map(float, mean)), tuple(map(float, std)))

    @classmethod
    def from_json(cls, content: Any, source: str) -> "Normalisation":
        """Read what ``_asdict()`` gave, in a file that may be somebody else's.

        Raises:
            ValueError: unless it holds three finite means and as many deviations above 0.
        """
        parts = content if isinstance(content, Mapping) else {}
        lists = [parts.get(name) for name in cls._fields]
        if not all(isinstance(x, list | tuple) and len(x) == 3 and all(map(_is_number, x)) for x in lists):
            raise ValueError(f"{source} was changed: normalisation is {content!r:.80}. Copy it again")
        found = cls.of(*lists)  # type: ignore[arg-type]
        if min(found.std) <= 0:
            raise ValueError(f"{source} was changed: normalisation.std is {list(found.std)}. Copy it again")
        return found


IMAGENET = Normalisation()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
