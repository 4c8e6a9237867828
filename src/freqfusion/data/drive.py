"""DRIVE: vessels in photographs of the retina."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from freqfusion.data.base import FileDataset, Pair, Palette
from freqfusion.data.images import BadSampleError, Decoded, decode_mask


class DRIVE(FileDataset):
    """Fundus photographs with vessels drawn by hand: background and vessel, ignored outside the field of view.

    The original layout is ``training`` and ``test``, each with ``images/NN_*.tif``, ``1st_manual/NN_manual1.gif``
    (the first observer) and ``mask/NN_*_mask.gif`` (the field of view); the same with other names is ``train`` and
    ``test`` with ``images/NN.jpg`` (or another kind), ``labels/NN.png`` and ``fov/NN.png``. Labels are black or not.
    There is no part for validation, so ``val`` is ``test``. Staal et al., "Ridge-based vessel segmentation in color
    images of the retina", IEEE TMI 2004. For other arguments and errors see
    :class:`~freqfusion.data.base.FileDataset`.

    Args:
        root: folder of the data.
        split: ``"train"``, ``"val"`` or ``"test"``.
        field_of_view: ignore the pixels outside the field of view, as scores are usually taken; False: all count.
        skip_bad: leave bad samples out with a warning.
    """

    layout: ClassVar[str] = (
        "DRIVE expects ROOT/training and ROOT/test with images/NN_*.tif, 1st_manual/NN_manual1.gif and "
        "mask/NN_*_mask.gif, or ROOT/train and ROOT/test with images/NN.jpg, labels/NN.png and fov/NN.png."
    )
    classes = ("background", "vessel")
    palette: Palette = ((45, 50, 60), (240, 200, 80))
    values: Mapping[int, int] = {}

    def __init__(
        self, root: str | Path, split: str, *, field_of_view: bool = True, skip_bad: bool = False
    ) -> None:
        self.field_of_view = field_of_view
        self._views: dict[str, Path] = {}
        super().__init__(root, split, skip_bad=skip_bad)

    def find(self) -> Iterator[Pair]:
        """Every photograph of the part."""
        original = (self.root / "training").is_dir()
        top = self.root / (("training" if original else "train") if self.split == "train" else "test")
        images = self.require_folder(top / "images")
        for stem in sorted(self.names(images)):
            name = stem.partition("_")[0]
            if original:
                mask = self.file(top / "1st_manual", f"{name}_manual1", ".gif")
                view = self.file(top / "mask", f"{stem}_mask", ".gif")
            else:
                mask, view = (self.file(top / folder, name, ".png") for folder in ("labels", "fov"))
            self._views[name] = view
            yield Pair(name, self.file(images, stem, ".jpg"), mask)

    def files(self, entry: Pair) -> Sequence[Path]:
        """The photograph, the drawn vessels and, where it counts, the field of view."""
        return [*super().files(entry), *([self._views[entry.name]] if self.field_of_view else [])]

    def read_classes(self, entry: Pair) -> Decoded:
        """The drawn vessels, ignored outside the field of view."""
        mask = super().read_classes(entry)
        if self.field_of_view:
            path = self._views[entry.name]
            view = self._read_stored(path)
            inside = self.in_frame(view, path, mask.size, mask.orientation)
            if inside.shape != mask.size:
                raise BadSampleError(
                    f"{path}: is {inside.shape[1]}x{inside.shape[0]} pixels, but the labels {entry.mask} are "
                    f"{mask.size[1]}x{mask.size[0]}. Give them one size, or leave the sample out with skip_bad "
                    "(--skip-bad)."
                )
            mask.pixels[inside == 0] = self.ignore_index
        return mask

    def _read_stored(self, path: Path) -> Decoded:
        return decode_mask(path, brightness=True)

    def _decode(self, stored: Tensor, path: Path) -> Tensor:
        return (stored > 0).byte()
