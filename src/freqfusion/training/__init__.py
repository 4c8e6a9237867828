"""The loop on Lightning: trainer, callbacks and checkpoints. The names load on first use (extra ``train``)."""

from typing import TYPE_CHECKING

from freqfusion._optional import lazy

if TYPE_CHECKING:
    from freqfusion.training.checkpoints import load_checkpoint
    from freqfusion.training.run import create_trainer

__all__ = ["create_trainer", "load_checkpoint"]

__getattr__ = lazy(__name__, {"checkpoints": "load_checkpoint", "run": "create_trainer"}, "train")
