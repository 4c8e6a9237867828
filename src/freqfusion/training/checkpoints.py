"""Checkpoints: written whole or not at all, read without running anything in them."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from freqfusion.training.module import SegmentationModule

LAST = "last.ckpt"
BEST = "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, and reads plain data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            torch.save(checkpoint, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint that this package wrote, on the CPU.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that is cut off, refuses to load as plain data, or is not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: give the path of a .ckpt file")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a complete checkpoint (cut off while copying, or another kind of file): "
            "copy it again, or take last.ckpt or best.ckpt of a run folder"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and loading it could run foreign code; it was "
            "not loaded. Take a checkpoint written by freqfusion fit"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy it again") from error
    missing = {"state_dict", "hyper_parameters", "classes", "palette"} - set(
        content if isinstance(content, dict) else ()
    )
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint of freqfusion fit (it lacks {', '.join(sorted(missing))}): "
            "take last.ckpt or best.ckpt of a run folder"
        )
    return content


def load_checkpoint(
    path: str | Path,
) -> tuple[SegmentationModule, tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Rebuild what ``freqfusion fit`` saved: nothing but the file is needed.

    Args:
        path: A ``.ckpt`` file.

    Returns:
        The module in evaluation mode on the CPU, the names of its classes, and one RGB colour a class.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that is cut off, unsafe to load, or not one of ours.
    """
    content = read_checkpoint(path)
    try:
        module = SegmentationModule(**content["hyper_parameters"])
        module.load_state_dict(content["state_dict"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not fit this version of freqfusion ({error}): use the version that wrote it"
        ) from error
    module.resize = content.get("datamodule_hyper_parameters", {}).get("resize")
    module.classes = tuple(content["classes"])
    module.palette = tuple((red, green, blue) for red, green, blue in content["palette"])
    return module.eval(), module.classes, module.palette


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt``, from which a run goes on exactly, and ``best.ckpt``, the best validation so far.

    ``last.ckpt`` is written every ``every_steps`` optimiser steps and after each validation.

    Args:
        folder: Where the files go.
        every_steps: Optimiser steps between two of ``last.ckpt``.
        monitor: The figure, the greater the better, that decides on ``best.ckpt``.
    """

    def __init__(self, folder: str | Path, every_steps: int = 500, monitor: str = "val_miou") -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}")
        self.folder, self.every_steps, self.monitor = Path(folder), every_steps, monitor
        self.best_score: float | None = None
        self._step = 0
        self._saved_step = 0

    @property
    def last(self) -> Path:
        """The file to go on from."""
        return self.folder / LAST

    @property
    def best(self) -> Path:
        """The file with the best validation figure."""
        return self.folder / BEST

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        # Only right after a step: gradients that are still being accumulated are in no file.
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if stepped and self._step % self.every_steps == 0 and not self._validation_follows(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and (self.best_score is None or float(score) > self.best_score):
            self.best_score = float(score)
            # Before last.ckpt, which knows of this score: a run that goes on from there must find the file.
            trainer.save_checkpoint(self.best, weights_only=False)
        if trainer.is_last_batch or (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.last, weights_only=False)

    @staticmethod
    def _validation_follows(trainer: L.Trainer) -> bool:
        """Whether this batch ends an epoch or a validation comes next, after which ``last.ckpt`` is due anyway.

        Lightning's counters, restored from a file written just before, would skip that validation.
        """
        if trainer.is_last_batch:
            return True
        every = trainer.val_check_batch
        if not every or every == float("inf"):
            return False
        loop = trainer.fit_loop
        batch = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
        return (batch + 1) % every == 0
