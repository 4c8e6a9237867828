"""Tiny networks and runs for the tests of training; as a script, runs that end by kill -9 or use two processes."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from freqfusion import register_model
from freqfusion.models import PixelModel
from freqfusion.tasks import FSDP, SegmentationData, SegmentationModule
from freqfusion.training import create_trainer
from two_processes import run_in_two


@register_model("noisy")
class NoisyNet(PixelModel):
    """Everything that makes an exact resume hard: batch statistics, dropout, random numbers in each pass."""

    def __init__(self, num_classes: int, fusion: str = "") -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3)
        )
        self.decode_head = nn.Conv2d(6, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.backbone(image)
        return self.decode_head(x * (1 + 0.2 * torch.rand(x.shape[0], x.shape[1], 1, 1)))


@register_model("plain")
class PlainNet(PixelModel):
    """No batch statistics and no randomness: the gradient of a batch is the mean of its images'."""

    def __init__(self, num_classes: int, fusion: str = "") -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.GELU())
        self.decode_head = nn.Conv2d(6, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.decode_head(self.backbone(image))


def tiny_data(length: int = 22, **options: Any) -> SegmentationData:
    settings = {"crop_size": (16, 24), "batch_size": 4, "workers": 0, **options}
    return SegmentationData("synthetic", dataset_options={"length": length, "size": (24, 32)}, **settings)


def tiny_fit(
    out: Path,
    network: str,
    *,
    resume: Path | None = None,
    data: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], L.Trainer]:
    """Train; returns the final weights and the trainer."""
    torch.manual_seed(0 if resume is None else 99)  # what comes from the checkpoint must not depend on it
    datamodule = tiny_data(**(data or {}))
    module_settings: dict[str, Any] = {"lr": 0.1, "warmup_steps": 2, **(settings or {})}
    module = SegmentationModule(network, num_classes=datamodule.num_classes, **module_settings)
    trainer = create_trainer(
        out,
        **{
            "checkpoint_steps": 1,
            "log_steps": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            **options,
        },
    )
    trainer.fit(module, datamodule, ckpt_path=None if resume is None else str(resume))
    return {key: value.clone() for key, value in module.state_dict().items()}, trainer


def read_history(folder: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` without the clock's column."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) > 0
    return rows


def run_script(*words: Any) -> None:
    """This file as a script, in two processes; the words are what to do, and the run folder."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


class RunHere:
    """A run of a race in this process, in place of one of its own, which would import everything again."""

    def __init__(self, command: list[str], **options: Any) -> None:
        from freqfusion.cli.main import main

        assert command[:3] == [sys.executable, "-m", "freqfusion"]
        self.code = main(command[3:])

    def poll(self) -> int:
        return self.code


class Kill(L.Callback):
    """``kill -9`` after some batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def fit_in_shards(out: Path, **options: Any) -> int:
    """Train in two processes, from the last checkpoint if there is one; returns their exit code."""
    last = out / "last.ckpt"

    def fit() -> None:
        tiny_fit(
            out,
            "plain",
            data={"length": 11},
            resume=last if last.exists() else None,
            max_epochs=2,
            strategy=FSDP(process_group_backend="gloo"),
            devices=2,
            gradient_clip_val=0.5,
            **{"logger": False, **options},
        )

    return run_in_two(fit)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    if sys.argv[1] == "killed":
        tiny_fit(folder, "noisy", max_epochs=3, checkpoint_steps=2, callbacks=[Kill(after=8)])
    elif sys.argv[1] == "sharded":
        assert fit_in_shards(folder / "sharded") == 0
        assert fit_in_shards(folder / "resumed", callbacks=[Kill(after=3)]) == -signal.SIGKILL
        assert torch.load(folder / "resumed" / "last.ckpt", weights_only=True)["global_step"] == 3
        assert fit_in_shards(folder / "resumed") == 0
    elif sys.argv[1] == "logged":
        assert fit_in_shards(folder, logger=["tensorboard", "csv"]) == 0
    else:
        tiny_fit(folder, "plain", data={"length": 11}, max_epochs=2, strategy="ddp", devices=2)
