"""Models in files: weights as safetensors, and in plain JSON how the model is made and upgraded again."""

from freqfusion.checkpoints.hosts import create_host, load_backbone_
from freqfusion.checkpoints.pretrained import from_pretrained, push_to_hub, save_pretrained

__all__ = ["create_host", "from_pretrained", "load_backbone_", "push_to_hub", "save_pretrained"]
