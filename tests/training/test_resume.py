"""An interrupted run ends with the very weights of an uninterrupted one."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_training
from freqfusion.training.checkpoints import AtomicCheckpointIO
from tiny_training import read_history, tiny_fit

pytestmark = pytest.mark.usefixtures("tiny_networks")


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        {
            "max_steps": 6,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "accumulate_grad_batches": 2,
        },
        {"max_epochs": 2, "val_check_interval": 2},
    ],
    ids=["epochs", "accumulated", "steps", "judged_in_mid_epoch"],
)
def test_from_every_checkpoint(tmp_path, monkeypatch, options):
    """5 batches an epoch: last.ckpt falls within epochs, on their ends and beside validations."""
    save = AtomicCheckpointIO.save_checkpoint
    moments: list[Path] = []

    def save_and_keep(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path)
        if path.name == "last.ckpt":
            moments.append(shutil.copytree(path.parent, tmp_path / f"moment{len(moments)}"))

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_keep)
        whole, trainer = tiny_fit(tmp_path / "whole", "noisy", **options)
    assert len(moments) >= trainer.global_step - 2
    history = read_history(tmp_path / "whole")
    best = torch.load(tmp_path / "whole" / "best.ckpt", weights_only=True)
    for moment in moments[1:-1:2] + moments[4:5]:
        resumed, again = tiny_fit(moment, "noisy", resume=moment / "last.ckpt", **options)
        for key, value in whole.items():
            assert torch.equal(resumed[key], value), (moment, key)
        assert again.global_step == trainer.global_step
        assert read_history(moment) == history, moment
        assert torch.load(moment / "best.ckpt", weights_only=True)["global_step"] == best["global_step"]


def test_after_kill_9(tmp_path):
    tests = Path(tiny_training.__file__).parent
    killed = subprocess.run(
        [sys.executable, tiny_training.__file__, "killed", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    last = tmp_path / "run" / "last.ckpt"
    # killed in the batch after step 8 of 15, the third of the second epoch
    assert torch.load(last, weights_only=True)["global_step"] == 8
    resumed, _ = tiny_fit(tmp_path / "run", "noisy", resume=last, max_epochs=3, checkpoint_steps=2)
    whole, _ = tiny_fit(tmp_path / "whole", "noisy", max_epochs=3, checkpoint_steps=2)
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
    assert read_history(tmp_path / "run") == read_history(tmp_path / "whole")
    classes = [(tmp_path / run / "val_classes.csv").read_text() for run in ("run", "whole")]
    assert classes[0] == classes[1]
