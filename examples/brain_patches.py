"""Patches of a brain with grey and white matter, from the template ICBM 2009a (1 mm) in the package nilearn.

The back of the head is for training, the front for testing: the template's two sides are mirror images. A voxel has
the class with the largest share in it. python -m pip install nilearn brings the template (BSD-3-Clause).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch.utils.data import Dataset


class BrainPatches(Dataset):
    """As ``SyntheticVolumes``; at least a fifth is brain, and a patch depends on split, seed and index alone."""

    classes = ("other", "grey", "white")

    def __init__(self, split: str, length: int, size: Sequence[int], seed: int = 0) -> None:
        folder = Path(find_spec("nilearn").origin).parent / "datasets" / "data"
        names = (f"mni_icbm152_{part}_tal_nlin_sym_09a_converted.nii.gz" for part in ("t1", "gm", "wm"))
        image, grey, white = (torch.tensor(np.asarray(nibabel.load(folder / name).dataobj)) for name in names)
        shares = torch.stack((255 - (grey.int() + white).clamp(max=255), grey, white))
        middle = image.shape[1] // 2
        half = slice(middle) if split == "train" else slice(middle, None)
        self.image, self.mask = image[:, half].float() / 255, shares.argmax(0)[:, half]
        self.length, self.size, self.seed = length, size, (seed, split == "train")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = np.random.default_rng((*self.seed, index))
        while True:
            starts = [
                draw.integers(full - side + 1) for full, side in zip(self.mask.shape, self.size, strict=True)
            ]
            part = tuple(slice(start, start + side) for start, side in zip(starts, self.size, strict=True))
            if (self.mask[part] > 0).float().mean() > 0.2:
                return {"image": self.image[part][None], "mask": self.mask[part]}
