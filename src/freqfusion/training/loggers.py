"""Loggers by name, and what they get: hyperparameters, figures, pictures."""

import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from freqfusion._files import write_atomically
from freqfusion._optional import require
from freqfusion._spread import spread
from freqfusion.data import BadSampleError
from freqfusion.drawing.figures import Picture
from freqfusion.tasks.image_data import ImageData
from freqfusion.tasks.pictures import draw_side_by_side, read_sample
from freqfusion.tasks.rng import fixed_randomness
from freqfusion.training.callbacks import log_metrics, run_facts
from freqfusion.training.checkpoints import LAST

LOGGERS = ("tensorboard", "wandb", "mlflow", "csv")
IDS = "loggers.json"
"""Names of the run at wandb and mlflow, by which a resumed run goes on in them."""
PROJECT = "freqfusion"
PICTURES = 3
_COLUMNS = "image_truth_prediction"
"""What the pictures show from left to right: the first part of their names."""
_MOST = 1000
"""How many figures mlflow takes at once."""

Given = str | Logger | Iterable[str | Logger] | bool | None
"""What a trainer's ``logger`` may be."""


def create_loggers(given: Given, out: Path) -> list[Logger] | bool | None:
    """The loggers that are named in ``given``, which write into the run folder; others as they are.

    - ``tensorboard`` writes ``tensorboard/``.
    - ``wandb`` writes ``wandb/``, offline unless the variable ``WANDB_MODE`` says otherwise.
    - ``mlflow`` writes ``mlflow/``: a database and the pictures; or to where ``MLFLOW_TRACKING_URI`` points.
    - ``csv`` writes ``csv/version_0/`` (after a resume ``version_1/`` and so on).

    Args:
        given: a name, a logger, several of both, or what else a trainer takes.
        out: the run folder. Where it holds ``last.ckpt``, wandb and mlflow go on in the run of before.

    Raises:
        ImportError: where a package is absent; the message says how to install it.
        ValueError: for an unknown name.
    """
    if given is None or isinstance(given, bool):
        return given
    several = [given] if isinstance(given, str | Logger) else list(given)
    return [_create(logger, out) if isinstance(logger, str) else logger for logger in several]


def _create(name: str, out: Path) -> Logger:
    if name not in LOGGERS:
        raise ValueError(
            f"unknown logger {name!r}; choose one of {', '.join(LOGGERS)}, or give the path of a class"
        )
    if name == "csv":
        return CSVLogger(out, name="csv")
    if getattr(rank_zero_only, "rank", 0):
        return DummyLogger()  # two processes must not make one database
    server, mode = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("WANDB_MODE", "offline")
    if server is None:
        os.environ.setdefault(
            "MLFLOW_DISABLE_TELEMETRY", "true"
        )  # both are read when the package is imported
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    require(name, name)
    if name == "tensorboard":
        return TensorBoardLogger(out, name="", version="tensorboard", default_hp_metric=False)
    run, folder = _read_ids(out).get(name), (out / "mlflow").absolute()
    if name == "wandb":
        out.mkdir(parents=True, exist_ok=True)  # else it writes among the system's temporary files
        run = run or secrets.token_hex(4)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return WandbLogger(str(out), str(out), run, project=project, mode=mode)
    if server is not None:
        return _MLFlow(PROJECT, str(out), server, run_id=run)
    folder.mkdir(parents=True, exist_ok=True)
    database, pictures = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
    return _MLFlow(PROJECT, str(out), database, artifact_location=pictures, run_id=run)


def _read_ids(out: Path) -> dict[str, str]:
    path = out / IDS
    return dict(json.loads(path.read_text())) if path.is_file() and (out / LAST).is_file() else {}


class _MLFlow(MLFlowLogger):
    """Leaves hyperparameters of a resumed run as they are: mlflow refuses to change them."""

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        known = self.experiment.get_run(self.run_id).data.params
        super().log_hyperparams({name: x for name, x in _flat(params).items() if name not in known})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as ``a/b``; what is not a number or a truth value as text.

    >>> _flat({"lr": 0.1, "network_options": {"width": [8, 8], "norm": None}})
    {'lr': 0.1, 'network_options/width': '[8, 8]', 'network_options/norm': 'None'}
    """
    flat: dict[str, bool | int | float | str] = {}
    for name, x in values.items():
        if isinstance(x, Mapping) and x:
            flat |= _flat(x, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = x if isinstance(x, bool | int | float) else str(x)
    return flat


class RunLog(Callback):
    """Gives the trainer's loggers what Lightning does not.

    When training starts: the facts of ``run.json`` as hyperparameters. At each validation: its figures, those of each
    class as ``val_FIGURE_per_class/CLASS``, and a few pictures as ``image_truth_prediction/NUMBER NAME``.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        facts = {
            **run_facts(trainer, pl_module),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
        }
        for logger in trainer.loggers:
            logger.log_hyperparams(facts)
            if isinstance(logger, TensorBoardLogger):
                _log_table(logger, [f"val_{name}" for name in pl_module.metric_labels])
        named = {"wandb": WandbLogger, "mlflow": MLFlowLogger}
        ids = {
            name: logger.version
            for name, kind in named.items()
            for logger in trainer.loggers
            if isinstance(logger, kind)
        }
        if ids:
            write_atomically(self.folder / IDS, (json.dumps(_read_ids(self.folder) | ids) + "\n").encode())

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.loggers and not trainer.sanity_checking:
            _log_results(trainer, pl_module, "val")
            if trainer.state.fn == "fit":
                self._log_pictures(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        _log_results(trainer, pl_module, "test")

    def _log_pictures(self, trainer: L.Trainer, module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        # every process predicts, for the network may be in shards; the others' loggers are dummies
        holding = (TensorBoardLogger, WandbLogger, MLFlowLogger, DummyLogger)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, holding)]
        if not loggers or not isinstance(data, ImageData):
            return
        split = data.hparams["val_split"]
        for number, index in enumerate(spread(len(data.dataset(split)), PICTURES)):
            try:
                with fixed_randomness(module.device), torch.no_grad():
                    sample = read_sample(data, split, index)
                    with trainer.precision_plugin.val_step_context():
                        picture = draw_side_by_side(module, data, sample)
            except BadSampleError:
                continue  # it is left out of the validation too, or that has raised the error
            if trainer.is_global_zero:
                name = f"{_COLUMNS}/{number} {_plain([str(sample['name'])])[0]}"
                for logger in loggers:
                    _log_picture(logger, name, picture, trainer.global_step)


def _log_results(trainer: L.Trainer, module: Any, stage: str) -> None:
    """The figures of an evaluation, and those of each class, all that are defined."""
    figures = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith(f"{stage}_")}
    names = _plain(module.classes)
    for figure in module.class_metrics:
        values = zip(names, module.results[figure.per_class], strict=True)
        figures |= {f"{stage}_{figure.name}_per_class/{name}": x for name, x in values}
    defined = [(name, x) for name, x in figures.items() if not math.isnan(x)]
    for start in range(0, len(defined), _MOST):
        log_metrics(trainer, dict(defined[start : start + _MOST]))


def _plain(names: Sequence[str]) -> list[str]:
    """Names in the letters that all loggers take, each its own.

    >>> _plain(["traffic light", "car/van"]), _plain(["straße", "stra?e"])
    (['traffic light', 'car_van'], ['0 stra_e', '1 stra_e'])
    """
    plain = [re.sub(r"[^-\w. ]+", "_", name, flags=re.ASCII) for name in names]
    if len(set(plain)) < len(plain):
        plain = [f"{number} {name}" for number, name in enumerate(plain)]
    return plain


def _log_picture(logger: Logger, name: str, picture: Picture, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [picture], step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, picture, key=name, step=step)


def _log_table(logger: TensorBoardLogger, metrics: list[str]) -> None:
    """The hyperparameters for TensorBoard's page of these, beside metrics that are yet to come."""
    from torch.utils.tensorboard.summary import hparams

    writer = logger.experiment._get_file_writer()
    for summary in hparams(_flat(dict(logger.hparams)), dict.fromkeys(metrics, 0.0)):
        writer.add_summary(summary)
