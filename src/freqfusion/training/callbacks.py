"""What a run shows and leaves behind: its history, its curve, the figures of each class, its progress."""

import csv
import io
import json
import math
import platform
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import freqfusion
from freqfusion._files import write_atomically
from freqfusion._text import readable

FACTS = "run.json"
HISTORY = "metrics.csv"
CURVE = "learning_curve.png"
COLUMNS = ("step", "epoch", "seconds", "lr", "train_loss")
"""Columns of the history; the task's metrics follow as ``val_NAME``."""


class RunFacts(Callback):
    """Writes ``run.json``: the network's size, the steps to do, versions and the machine.

    Args:
        folder: Where the file goes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            facts = run_facts(trainer, pl_module)
            write_atomically(self.folder / FACTS, (json.dumps(facts, indent=1) + "\n").encode())


def run_facts(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """The network's size, the steps to do, versions and the machine, as text and numbers."""
    device = module.device
    return {
        "parameters": sum(parameter.numel() for parameter in module.network.parameters()),
        "steps": trainer.estimated_stepping_batches,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "precision": trainer.precision,
        "freqfusion": freqfusion.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class History(Callback):
    """Keeps the figures of the run and writes ``metrics.csv`` and ``learning_curve.png``.

    Loggers get the rows of training too.

    The column ``seconds`` is the time of training so far: loading, forward, backward and update, without
    validation. The history is part of the checkpoint: a run that goes on after a stop goes on writing where the
    checkpoint stood, without gap or repetition.

    Args:
        folder: Where the files go.
        every_steps: Optimiser steps over which the training loss is averaged into one row.
    """

    def __init__(self, folder: str | Path, every_steps: int = 50) -> None:
        self.folder, self.every_steps = Path(folder), every_steps
        self.rows: list[dict[str, float]] = []
        self._labels: dict[str, str] = {}
        self._headline: list[str] = []
        self._loss_sum: Tensor | float = 0.0  # stays on the device: reading it waits for the GPU
        self._loss_count = 0
        self._step = 0
        self._seconds = 0.0
        self._since = 0.0  # when the clock was started or last read
        self._drawn: dict[str, list[tuple[float, float]]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": [dict(row) for row in self.rows],
            "loss_sum": float(self._loss_sum),
            "loss_count": self._loss_count,
            "step": self._step,
            "seconds": self._seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]
        self._loss_sum, self._loss_count = state_dict["loss_sum"], state_dict["loss_count"]
        self._step = state_dict["step"]
        self._seconds = state_dict.get("seconds", 0.0)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._labels = {f"val_{name}": label for name, label in pl_module.metric_labels.items()}
        self._headline = [f"val_{name}" for name in pl_module.headline]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def curve(self, column: str) -> list[tuple[float, float]]:
        """``(step, value)`` of every row that has the column."""
        return [(row["step"], row[column]) for row in self.rows if column in row]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._loss_sum = self._loss_sum + whole_loss(trainer, outputs)
        self._loss_count += 1
        if trainer.global_step == self._step:
            return  # this batch was accumulated without a step
        self._step = trainer.global_step
        if self._step % self.every_steps == 0:
            self._add_training_row(trainer)
            self._write_rows(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._since = time.perf_counter()
        if self._loss_count:
            self._add_training_row(trainer)
        row = self._row(trainer)
        row |= {
            column: float(trainer.callback_metrics[column])
            for column in self._labels
            if column in trainer.callback_metrics
        }
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        self.write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._loss_count:
            self._add_training_row(trainer)
        self.write(trainer)

    def _write_rows(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            text = io.StringIO()
            writer = csv.DictWriter(text, (*COLUMNS, *self._labels), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomically(self.folder / HISTORY, text.getvalue().encode())

    def write(self, trainer: L.Trainer) -> None:
        """Write both files from the rows so far."""
        self._write_rows(trainer)
        if not trainer.is_global_zero:
            return
        if any(self.curve(column) for column in self._headline):
            from freqfusion.drawing.figures import learning_curve

            percent = {
                self._labels[column]: [(step, 100 * value) for step, value in self.curve(column)]
                for column in self._headline
            }
            if percent != self._drawn:
                learning_curve(percent, self.folder / CURVE, title="Validation", y_label="%")
                self._drawn = percent

    def _row(self, trainer: L.Trainer) -> dict[str, float]:
        return {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "seconds": round(self._seconds, 3),
        }

    def _add_training_row(self, trainer: L.Trainer) -> None:
        row = self._row(trainer)
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        mean = torch.as_tensor(self._loss_sum, device=trainer.strategy.root_device) / self._loss_count
        row["train_loss"] = float(trainer.strategy.reduce(mean, reduce_op="mean"))
        self._loss_sum, self._loss_count = 0.0, 0
        self.rows.append(row)
        log_metrics(trainer, row)


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Give figures of the present step to the loggers, which write in the first process alone."""
    for logger in trainer.loggers:
        logger.log_metrics({name: x for name, x in metrics.items() if name != "step"}, trainer.global_step)
        logger.save()


def whole_loss(trainer: L.Trainer, outputs: Any) -> Tensor:
    """The loss of one batch, on its device (Lightning divides it by the number of accumulated batches)."""
    loss: Tensor = outputs["loss"].detach().float() * trainer.accumulate_grad_batches
    return loss


class ClassReport(Callback):
    """Writes the figures of every evaluation, class by class, and prints them at the end of the command.

    Files: ``val_metrics.json`` and ``val_classes.csv`` (or ``test_...``).

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer, pl_module, "val", show=trainer.state.fn == "validate")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer, pl_module, "test", show=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if getattr(pl_module, "results", None) and trainer.is_global_zero:
            print_results(pl_module, "last validation")

    def _report(self, trainer: L.Trainer, pl_module: Any, stage: str, show: bool) -> None:
        if not trainer.is_global_zero:
            return
        results = pl_module.results
        columns = {figure.name: results[figure.per_class] for figure in pl_module.class_metrics}
        rows = list(zip(pl_module.classes, *columns.values(), strict=True))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", *columns])
        writer.writerows([name, *map(_blank, values)] for name, *values in rows)
        if columns:
            write_atomically(self.folder / f"{stage}_classes.csv", text.getvalue().encode())
        summary: dict[str, Any] = {
            key: _null(value) for key, value in results.items() if isinstance(value, float)
        }
        if trainer.state.fn == "fit":
            summary = {"step": trainer.global_step, **summary}
        if columns:
            summary["classes"] = {
                name: dict(zip(columns, map(_null, values), strict=True)) for name, *values in rows
            }
        write_atomically(
            self.folder / f"{stage}_metrics.json", (json.dumps(summary, indent=2) + "\n").encode()
        )
        if show:
            print_results(pl_module, stage)


def print_results(module: Any, title: str) -> None:
    """Print the figures of the module's latest evaluation as a table: one row per class, and the means."""
    results = module.results
    table = Table(title=f"{title}, %", title_justify="left")
    table.add_column("class")
    for figure in module.class_metrics:
        table.add_column(figure.label, justify="right")
    columns = [results[figure.per_class] for figure in module.class_metrics]
    for name, *values in zip(module.classes, *columns, strict=True):
        table.add_row(Text(readable(name)), *map(_percent, values))
    table.add_section()
    table.add_row("mean", *(_percent(results[figure.mean]) for figure in module.class_metrics))
    console = Console()
    console.print(table if module.class_metrics else table.title)
    shown = [
        f"{label} {_percent(results[name])}"
        for name, label in module.metric_labels.items()
        if name in results
    ]
    console.print("   ".join(shown), highlight=False)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _blank(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


class RunProgress(RichProgressBar):
    """One bar for the whole run, with time left, loss and last validation; a line after each validation.

    Where the output is not a terminal, only the lines are printed.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=4, console_kwargs={"stderr": True})
        if not Console(stderr=True).is_terminal:
            self.disable()
        self._start = (0.0, 0)
        self._loss: Tensor | None = None
        self._judged: dict[str, str] = {}
        self._drawn = 0.0

    @property
    def validation_description(self) -> str:
        return "validate"

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Leaves room in 80 columns for the figures, which come last."""
        description, bar, steps, seconds, _ = super().configure_columns(trainer)
        bar.bar_width = 16
        return [description, bar, steps, seconds]

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        first = {f"val {label}": value for label, value in list(self._judged.items())[:1]}
        return {"loss": self._shown_loss(), **first}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start = (time.monotonic(), trainer.global_step)
        if self.progress is not None:
            total = trainer.estimated_stepping_batches
            self.train_progress_bar_id = self.progress.add_task(
                "train", total=total, completed=trainer.global_step
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The bar goes on."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        loss = whole_loss(trainer, outputs)
        self._loss = loss if self._loss is None else self._loss.lerp(loss, 0.05)
        now = time.monotonic()
        if now - self._drawn > 0.25:  # reading the loss waits for the GPU
            self._drawn = now
            self._draw(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            self.teardown(trainer, pl_module, "validate")  # tables follow
        elif trainer.is_global_zero and not trainer.sanity_checking:
            self._judged = {
                pl_module.metric_labels[name]: _percent(
                    float(trainer.callback_metrics.get(f"val_{name}", math.nan))
                )
                for name in pl_module.headline
            }
            figures = "  ".join(f"{label} {value}" for label, value in self._judged.items())
            print(
                f"step {trainer.global_step}/{trainer.estimated_stepping_batches}  loss {self._shown_loss()}  "
                f"val {figures}  left {self._time_left(trainer)}",
                file=sys.stderr,
                flush=True,
            )
        super().on_validation_end(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "test")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer, pl_module)
        self.teardown(trainer, pl_module, "fit")

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """By rich's calls: Lightning's own differ between releases."""
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, completed=trainer.global_step)
            self._update_metrics(trainer, pl_module)
            self.progress.refresh()

    def _shown_loss(self) -> str:
        return "?" if self._loss is None else f"{float(self._loss):.3f}"

    def _time_left(self, trainer: L.Trainer) -> str:
        """From the speed since training began or was resumed, validations included."""
        start, first = self._start
        done = trainer.global_step - first
        total = trainer.estimated_stepping_batches
        if done < 1 or total == float("inf"):
            return "?"
        return str(timedelta(seconds=int((time.monotonic() - start) / done * (total - trainer.global_step))))
