"""A fair comparison in minutes: one small network, trained with bilinear upsampling and with FreqFusion.

Both runs have the same scenes in the same order, the same schedule and optimiser, and start from the same
weights wherever the two networks share a parameter. Only the fusion of coarse and fine features differs.
"""

import json
import logging
import math
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

import freqfusion
from freqfusion._files import write_atomically
from freqfusion.tasks.image_data import SegmentationData
from freqfusion.tasks.semantic import SegmentationModule
from freqfusion.training.checkpoints import AtomicCheckpointIO

METHODS = {"bilinear": "Bilinear", "freqfusion": "FreqFusion"}
STEPS_A_MINUTE = 225
"""Optimiser steps of each network for a minute of ``--minutes``; fixed, so that a run can be repeated."""
BATCH = 8
SIZE = (96, 96)
LR = 2e-3
WEIGHT_DECAY = 0.01
EVALUATIONS = 5
VAL_SCENES = 96
TEST_SCENES = 400
BOUNDARY_WIDTH = 2


@dataclass
class Run:
    """What one network's run gave."""

    fusion: str
    parameters: int
    train_seconds: float = 0.0
    """Time of forward, backward and update; making scenes and evaluating are not counted."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    val_miou: list[tuple[int, float]] = field(default_factory=list)
    val_boundary_iou: list[tuple[int, float]] = field(default_factory=list)
    test: dict[str, Any] = field(default_factory=dict)
    """Scores on the test scenes, see :class:`freqfusion.metrics.SegmentationMetrics`."""


@dataclass
class Comparison:
    """Both runs by fusion method, and what is needed to show and to repeat them."""

    runs: dict[str, Run]
    modules: dict[str, SegmentationModule]
    data: SegmentationData
    minutes: float
    seed: int
    steps: int


class _Watch(L.Callback):
    """Keeps the history of a run and moves its progress bar."""

    def __init__(self, run: Run, steps: int, progress: Progress, task: TaskID) -> None:
        self.run, self.progress, self.task = run, progress, task
        self.interval = max(1, steps // 40)
        self.pending: list[float] = []
        self.began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.run.train_seconds += time.perf_counter() - self.began
        self.pending.append(float(outputs["loss"]))
        if len(self.pending) == self.interval:
            self.run.losses.append((trainer.global_step, sum(self.pending) / self.interval))
            self.pending.clear()
        self.progress.update(self.task, advance=1, loss=f"{float(outputs['loss']):.3f}")

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        step, scores = trainer.global_step, module.results
        self.run.val_miou.append((step, 100 * scores["miou"]))
        self.run.val_boundary_iou.append((step, 100 * scores["boundary_iou"]))
        self.progress.update(self.task, miou=f"{100 * scores['miou']:.1f}")
        if not self.progress.console.is_terminal:  # a log file shows no bars
            self.progress.console.print(
                f"{METHODS[self.run.fusion]}: step {step}, validation mIoU {100 * scores['miou']:.1f}"
            )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's remarks on devices, loaders and the end of the run."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            yield
    finally:
        log.setLevel(level)


def steps_for(minutes: float) -> int:
    """Optimiser steps of each network.

    >>> steps_for(4), steps_for(0.001)
    (900, 1)
    """
    if minutes <= 0:
        raise ValueError(f"minutes must be above 0, got {minutes}")
    return max(1, round(minutes * STEPS_A_MINUTE))


def _build(seed: int, steps: int, num_classes: int) -> dict[str, SegmentationModule]:
    modules = {}
    for fusion in METHODS:
        torch.manual_seed(seed)
        modules[fusion] = SegmentationModule(
            network="fpn_small",
            fusion=fusion,
            num_classes=num_classes,
            lr=LR,
            backbone_lr_factor=1.0,
            weight_decay=WEIGHT_DECAY,
            warmup_steps=steps // 20,
            boundary_width=BOUNDARY_WIDTH,
        )
    return modules


def compare(minutes: float, out: Path, seed: int, console: Console) -> Comparison:
    """Train and judge both networks; write ``results.json`` and both checkpoints.

    Args:
        minutes: length; :func:`steps_for` says what it means.
        out: folder of the results.
        seed: of the scenes, their order and the first weights.
        console: where progress is shown.
    """
    steps = steps_for(minutes)
    data = SegmentationData(
        dataset="synthetic",
        # Every scene is new: as many as there are batches to fill, each seen once.
        dataset_options={"length": max(steps * BATCH, VAL_SCENES, TEST_SCENES), "size": SIZE, "seed": seed},
        test_split="test",
        crop_size=SIZE,
        ratio_range=(1.0, 1.0),
        flip=0.0,
        photometric=False,
        batch_size=BATCH,
        eval_batch_size=BATCH,
        workers=0,
        seed=seed,
    )
    modules = _build(seed, steps, data.num_classes)
    runs = {
        fusion: Run(fusion, sum(parameter.numel() for parameter in module.network.parameters()))
        for fusion, module in modules.items()
    }
    progress = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  mIoU {task.fields[miou]}"),
        TimeRemainingColumn(),
        console=console,
    )
    with progress, _quiet_lightning():
        tasks = {
            fusion: progress.add_task(name, total=steps, start=False, loss="-", miou="-")
            for fusion, name in METHODS.items()
        }
        for fusion, module in modules.items():
            progress.start_task(tasks[fusion])
            torch.manual_seed(seed)
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=steps,
                limit_val_batches=VAL_SCENES // BATCH,
                limit_test_batches=TEST_SCENES // BATCH,
                val_check_interval=max(1, steps // EVALUATIONS),
                num_sanity_val_steps=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                plugins=[AtomicCheckpointIO()],
                callbacks=[_Watch(runs[fusion], steps, progress, tasks[fusion])],
            )
            trainer.fit(module, datamodule=data)
            trainer.save_checkpoint(out / f"{fusion}.ckpt")
            trainer.test(module, datamodule=data, verbose=False)
            runs[fusion].test = _without_nan(module.results)
    comparison = Comparison(runs, modules, data, minutes, seed, steps)
    _write_results(out, comparison)
    return comparison


def _without_nan(results: dict[str, Any]) -> dict[str, Any]:
    """The scores with None for those of absent classes, which JSON can hold."""
    return {
        name: [None if math.isnan(entry) else entry for entry in value] if isinstance(value, list) else value
        for name, value in results.items()
    }


def _write_results(out: Path, comparison: Comparison) -> None:
    content = {
        "settings": {
            "minutes": comparison.minutes,
            "steps": comparison.steps,
            "seed": comparison.seed,
            "batch": BATCH,
            "size": SIZE,
            "lr": LR,
            "boundary_width": BOUNDARY_WIDTH,
            "test_scenes": TEST_SCENES,
        },
        "versions": {
            "freqfusion": freqfusion.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "runs": {fusion: asdict(run) for fusion, run in comparison.runs.items()},
    }
    write_atomically(out / "results.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
