"""Frozen encoders, whose features are upsampled."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from freqfusion.features.extract import extract_features
from freqfusion.zoo.encoders import load_encoder

_PROBED = 224
"""Side of the image that tells an encoder's channels and stride: a multiple of 7, 14, 16 and 32."""


class FrozenEncoder:
    """An encoder in evaluation mode that nothing trains.

    It is no module, so that a module which holds one neither trains nor saves it.

    Args:
        name: as :func:`~freqfusion.zoo.encoders.load_encoder` takes it.
        weights: as that takes them; None for fresh ones.
        layers: whose features are taken, see :func:`~freqfusion.features.extract.extract_features`.

    Attributes:
        channels: of its features.
        stride: pixels of the image for each pixel of the features.
        fingerprint: tells weights apart; ``""`` for fresh ones.
    """

    def __init__(self, name: str, weights: str | None = None, layers: Sequence[int] | None = None) -> None:
        self.name, self.layers = name, layers
        self.network = load_encoder(name, weights)
        self.fingerprint = "" if weights is None else _fingerprint(self.network)
        probed = self(torch.zeros(1, 3, _PROBED, _PROBED))
        self.channels = probed.shape[1]
        self.stride = round(_PROBED / probed.shape[2])

    def __call__(self, image: Tensor) -> Tensor:
        """Features ``(B, channels, ceil(H / stride), ceil(W / stride))`` of images ``(B, 3, H, W)`` in [0, 1]."""
        return extract_features(self.network, image, self.layers)


def _fingerprint(network: nn.Module) -> str:
    """A checksum of all weights and statistics."""
    found = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        found.update(key.encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
