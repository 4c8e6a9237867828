"""What an export gave."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from freqfusion.data.normalisation import Normalisation


class SizeCheck(NamedTuple):
    """The file's results beside torch's at one size."""

    size: tuple[int, int]
    """Height and width of the (finer) input."""
    max_abs_error: float
    """Largest difference from torch in float32, over all outputs."""
    max_abs: float
    """Largest value of torch's outputs. Every output is judged by its own."""


@dataclass(frozen=True)
class ExportReport:
    """A file that was written, and how it compares with torch."""

    path: Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: str
    """Which sizes it takes, in words."""
    precision: str
    nodes: int
    """Operators in the graph."""
    checks: tuple[SizeCheck, ...]
    normalisation: Normalisation | None = None
    """Of the images, which are the caller's to normalise; None for a part of a model."""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.format}, {self.precision}, {self.nodes} operators, {self.sizes}",
            f"inputs {', '.join(self.inputs)}; outputs {', '.join(self.outputs)}",
            *_told(self.normalisation),
            "",
            f"{'size':>11}  {'max abs error':>13}  {'largest value':>13}",
        ]
        for (height, width), error, largest in self.checks:
            lines.append(f"{f'{height}x{width}':>11}  {error:>13.1e}  {largest:>13.4g}")
        return "\n".join(lines)


def _told(normalisation: Normalisation | None) -> list[str]:
    """What has to be done to images, in one line if there is something."""
    if normalisation is None:
        return []
    mean, std = (", ".join(f"{value:g}" for value in values) for values in normalisation)
    return [f"images in [0, 1], minus the mean {mean}, divided by the deviation {std}"]
