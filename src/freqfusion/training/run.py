"""The trainer with all that a run of this project needs."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer

from freqfusion._settings import check_settings
from freqfusion.training.callbacks import ClassReport, History, RunFacts, RunProgress
from freqfusion.training.checkpoints import AtomicCheckpointIO, Checkpoints
from freqfusion.training.finite import FiniteNumbers
from freqfusion.training.loggers import RunLog, create_loggers


def create_trainer(
    out: str | Path,
    checkpoint_steps: int = 500,
    log_steps: int = 50,
    stop_at_nan: bool = True,
    **options: Any,
) -> L.Trainer:
    """A Lightning trainer that writes a run folder.

    The folder gets ``last.ckpt`` and ``best.ckpt``, ``run.json``, ``metrics.csv``, ``learning_curve.png``, and
    the figures of each class as ``val_metrics.json`` and ``val_classes.csv`` (``test_...`` for a test).

    Args:
        out: The run folder; made where it is missing.
        checkpoint_steps: Optimiser steps between two of ``last.ckpt``.
        log_steps: Optimiser steps over which the training loss is averaged into one row of ``metrics.csv``.
        stop_at_nan: End the run when the loss or a weight is no longer finite; ``last.ckpt`` is then of
            before.
        **options: Further arguments of ``lightning.Trainer``; callbacks and plugins are added to ours. ``logger`` may
            name one or several of ``tensorboard``, ``wandb``, ``mlflow`` and ``csv``, which write into the run folder
            (:func:`~freqfusion.training.loggers.create_loggers`).

    Raises:
        ImportError: for a logger whose package is absent.
        ValueError: for a number out of bounds, or an unknown logger.
    """
    check_settings("fit", {"checkpoint_steps": checkpoint_steps, "log_steps": log_steps})
    check_settings("trainer", options)
    options = {
        "default_root_dir": str(out),
        "logger": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **options,
    }
    options["logger"] = create_loggers(options["logger"], Path(out))
    shown = options.get("enable_progress_bar") is not False
    callbacks = [
        *_listed(options.pop("callbacks", None)),
        *([RunProgress()] if shown else []),  # it ends before the others print
        RunFacts(out),
        RunLog(out),  # before the clock of the history goes on
        History(out, log_steps),
        ClassReport(out),
    ]
    checkpoints = None
    if options.get("enable_checkpointing") is not False:
        checkpoints = Checkpoints(out, checkpoint_steps)
        callbacks.append(checkpoints)
    callbacks.append(FiniteNumbers(checkpoints, stop_at_nan))
    plugins = [*_listed(options.pop("plugins", None)), AtomicCheckpointIO()]
    trainer = L.Trainer(callbacks=callbacks, plugins=plugins, **options)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            raise ValueError(f"max_time is {options['max_time']!r}, expected a time above 0")
    return trainer


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
