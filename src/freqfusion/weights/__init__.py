"""Tensors and names: files of weights, the one checker and renamer, backbones. Knows no model."""

from freqfusion.weights.files import read_state_dict

__all__ = ["read_state_dict"]
