"""Whether a run still computes with finite numbers."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from freqfusion.training.checkpoints import Checkpoints, greatest_weight


class FiniteNumbers(Callback):
    """Ends a run whose loss or weights are no longer finite: nothing good would come of it.

    Args:
        checkpoints: what keeps the last good weights, if there is something.
        stop: end the run; else warn once and go on.
    """

    def __init__(self, checkpoints: Checkpoints | None, stop: bool = True) -> None:
        self.checkpoints, self.stop = checkpoints, stop
        self._step = 0
        self._warned = False

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._step = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self._warned:
            return
        values = torch.stack([outputs["loss"].detach().float(), greatest_weight(pl_module).float()])
        # of all processes, so that these stop together
        loss, weight = trainer.strategy.reduce(values, reduce_op="sum").tolist()
        if not math.isfinite(loss):
            self._tell(trainer, f"the loss is {loss}")
        elif not math.isfinite(weight):
            self._tell(trainer, f"a weight is {weight}")

    def _tell(self, trainer: L.Trainer, what: str) -> None:
        told = f"{what} at step {self._step} of {trainer.estimated_stepping_batches}"
        kept = self.checkpoints
        saved = "nothing was saved before"
        if kept is not None and kept.last.exists():
            saved = f"{kept.last} holds step {kept.saved_step}"
        if self.stop:
            raise ValueError(
                f"{told}, so training has ended; {saved}. Start anew with a lower learning rate, a longer warm-up or "
                "trainer.gradient_clip_val, and look for broken data; stop_at_nan false goes on all the same"
            )
        self._warned = True
        rank_zero_warn(f"{told}; the run goes on. {saved}, which stays until all weights are finite again")
