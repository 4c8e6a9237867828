"""Models in files: weights as safetensors, and in plain JSON how the model is made and upgraded again."""

from freqfusion.checkpoints.pretrained import from_pretrained, push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
