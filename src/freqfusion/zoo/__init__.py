"""Names and files to models."""

from freqfusion.zoo.build import list_models, register_model
from freqfusion.zoo.create import create_model
from freqfusion.zoo.pretrained import from_pretrained, push_to_hub, save_pretrained
from freqfusion.zoo.spec import ModelSpec

__all__ = [
    "ModelSpec",
    "create_model",
    "from_pretrained",
    "list_models",
    "push_to_hub",
    "register_model",
    "save_pretrained",
]
