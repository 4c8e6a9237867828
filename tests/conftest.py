"""One thread a worker: the suite runs two workers on two cores, and small tensors gain nothing from more.

Without a GPU the Triton kernels are run by Triton's interpreter.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton and freqfusion are imported


@pytest.fixture
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks ``noisy`` and ``plain`` in place of the real ones."""
    from tiny_training import create_tiny

    monkeypatch.setattr("freqfusion.tasks.semantic.create_model", create_tiny)
