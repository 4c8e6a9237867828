"""One thread a worker: the suite runs two workers on two cores, and small tensors gain nothing from more.

Without a GPU the Triton kernels are run by Triton's interpreter.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from fast_interpreter import replace_language_once

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton and freqfusion are imported
    replace_language_once()


@pytest.fixture
def tiny_networks() -> None:
    """Networks ``noisy`` and ``plain``, known to ``create_model``."""
    import tiny_training  # noqa: F401
