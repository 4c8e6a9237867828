"""Names and files to models."""

from freqfusion.zoo.build import list_models, register_model
from freqfusion.zoo.create import create_model
from freqfusion.zoo.pretrained import from_pretrained, push_to_hub, save_pretrained
from freqfusion.zoo.released import list_released, load_released
from freqfusion.zoo.spec import ModelSpec

__all__ = [
    "ModelSpec",
    "create_model",
    "from_pretrained",
    "list_models",
    "list_released",
    "load_released",
    "push_to_hub",
    "register_model",
    "save_pretrained",
]
