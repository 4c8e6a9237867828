"""How close upsampled features are to those that an encoder gives of a larger image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class FeatureMetrics(Metric):
    """Relative squared error and cosine similarity of features, over all pixels of all images.

    The relative squared error is the sum of ``(features - target)**2`` by the sum of ``target**2``: 0 for the target
    itself, 1 for zeros. The cosine is of a pixel's channels, and its mean over the pixels is the score.

    Example:
        >>> metric = FeatureMetrics()
        >>> metric.update(torch.tensor([3.0, 0.0]).reshape(1, 2, 1, 1), torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'cosine': 0.6, 'relative_mse': 0.64}
    """

    is_differentiable = False
    full_state_update = False

    error: Tensor
    power: Tensor
    cosine: Tensor
    pixels: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # the sums move to the device that evaluates, and MPS has no float64
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        for name in ("error", "power", "cosine", "pixels"):
            self.add_state(name, torch.tensor(0.0, dtype=dtype), dist_reduce_fx="sum")

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add images.

        Args:
            features: ``(B, C, H, W)``.
            target: the same, what they should be.

        Raises:
            ValueError: for different shapes.
        """
        if features.shape != target.shape:
            raise ValueError(f"features are {tuple(features.shape)}, their target {tuple(target.shape)}")
        features, target = features.float(), target.float()
        self.error += (features - target).square().sum()
        self.power += target.square().sum()
        self.cosine += F.cosine_similarity(features, target, dim=1).sum()
        self.pixels += target[:, 0].numel()

    def compute(self) -> dict[str, Tensor]:
        """``cosine`` and ``relative_mse``; NaN where there was no image."""
        return {"cosine": self.cosine / self.pixels, "relative_mse": self.error / self.power}
