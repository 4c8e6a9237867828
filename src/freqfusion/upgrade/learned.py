"""Hosts that upsample the coarse map by learned weights, such as a transposed convolution.

Those weights are kept and stay in use. The fusion gets the host's upsampled map averaged back to the coarse size:
features like those that the next layer was trained with, through which gradients reach all the weights. With
``init="identity"`` the gates start from the upsampled map itself.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from freqfusion.ops._windows import part


def averaged(enlarged: Tensor, size: Sequence[int]) -> Tensor:
    """A map ``(B, C, H, W)`` or ``(B, C, D, H, W)`` averaged to ``size``, which divides its sides."""
    pool = F.avg_pool2d if enlarged.ndim == 4 else F.avg_pool3d
    return pool(enlarged, [fine // side for fine, side in zip(enlarged.shape[2:], size, strict=True)])


def fitted(enlarged: Tensor, size: Sequence[int]) -> Tensor:
    """A map ``(B, C, H, W)`` or ``(B, C, D, H, W)`` at the size of a fine one whose odd sides a factor does not meet.

    A surplus is cropped, what is missing is filled with the border's values, at the end of each axis.
    """
    missing = []
    for side, fine in zip(enlarged.shape[:1:-1], size[::-1], strict=True):  # the last axis first
        missing += [0, max(fine - side, 0)]
    if any(missing):  # a padding by nothing copies, and loses the layout that a compiler has chosen
        enlarged = F.pad(enlarged, missing, "replicate")
    return part(enlarged, [0] * len(size), size)
