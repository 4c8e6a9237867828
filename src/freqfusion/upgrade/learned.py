"""Hosts that upsample the coarse map by learned weights, such as a transposed convolution.

Those weights are kept and stay in use. The fusion gets the host's upsampled map averaged back to the coarse size:
features like those that the next layer was trained with, through which gradients reach all the weights. With
``init="identity"`` the gates start from the upsampled map itself.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def averaged(enlarged: Tensor, size: Sequence[int]) -> Tensor:
    """A map ``(B, C, H, W)`` averaged to ``size``, which divides its sides."""
    height, width = size
    return F.avg_pool2d(enlarged, (enlarged.shape[-2] // height, enlarged.shape[-1] // width))


def fitted(enlarged: Tensor, size: Sequence[int]) -> Tensor:
    """A map ``(B, C, H, W)`` at the size of a fine map whose odd sides a factor of two does not meet.

    A surplus is cropped, what is missing is filled with the border's values, at the bottom and right.
    """
    height, width = size
    missing = (0, max(width - enlarged.shape[-1], 0), 0, max(height - enlarged.shape[-2], 0))
    return F.pad(enlarged, missing, "replicate")[..., :height, :width]
