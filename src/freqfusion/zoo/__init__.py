"""Names and files to models."""

from freqfusion.zoo.hosts import create_host, load_backbone_
from freqfusion.zoo.pretrained import from_pretrained, push_to_hub, save_pretrained

__all__ = ["create_host", "from_pretrained", "load_backbone_", "push_to_hub", "save_pretrained"]
