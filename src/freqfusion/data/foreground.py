"""Pictures of many separate objects, as foreground and background."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from freqfusion.data.base import FileDataset, Pair, Palette


class ForegroundFolder(FileDataset):
    """Images with instance maps, read as two classes: background and the objects.

    ``root/<split>/images/NAME.jpg`` (or ``.png``, ``.tif``) and ``root/<split>/instances/NAME.png``, an 8- or
    16-bit greyscale PNG that holds 0 on the background and the number of the object elsewhere: the form in
    which microscopy data (nuclei, cells) is often kept. For arguments and errors see
    :class:`~freqfusion.data.base.FileDataset`.

    Args:
        foreground: name of the objects' class.
    """

    layout: ClassVar[str] = (
        "A foreground dataset expects ROOT/<split>/images/NAME.jpg (or .png, .tif) and "
        "ROOT/<split>/instances/NAME.png, 0 on the background and above 0 on the objects."
    )
    values: Mapping[int, int] = {}
    palette: Palette = ((45, 50, 60), (240, 200, 80))

    def __init__(
        self, root: str | Path, split: str, *, foreground: str = "object", skip_bad: bool = False
    ) -> None:
        self.classes = ("background", foreground)
        super().__init__(root, split, skip_bad=skip_bad)

    def find(self) -> Iterator[Pair]:
        """Every image of the split."""
        images = self.require_folder(self.root / self.split / "images")
        instances = self.require_folder(self.root / self.split / "instances")
        for name in sorted(self.names(images)):
            yield Pair(name, self.file(images, name, ".png"), self.file(instances, name, ".png"))

    def _decode(self, stored: Tensor, path: Path) -> Tensor:
        return (stored > 0).to(torch.uint8)
