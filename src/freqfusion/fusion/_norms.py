"""Normalisation of the maps before they are projected."""

import math

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Of 32 groups, or as many as divide the channels.

    Takes a single pixel in groups of one channel too, which torch's refuses: the result is the bias.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(32, channels), channels)

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
