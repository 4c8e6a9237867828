"""Peak memory of known allocations, in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch

from freqfusion.benchmarks import memory
from freqfusion.benchmarks.cases import BOTH, FORWARD, Case, Shape
from freqfusion.benchmarks.memory import probe

pytestmark = pytest.mark.skipif(not memory.STATUS.exists(), reason="only Linux tells the peak of a process")
CPU = torch.device("cpu")
MIB = 2**20


def test_a_known_allocation():
    """A passing 64 MiB counts, what was there before does not, and a meter forgets peaks before it."""
    code = """
import torch
from freqfusion.benchmarks.memory import Meter
cpu = torch.device("cpu")
held = torch.ones(32 * 2**18)
torch.ones(128 * 2**18)
meter = Meter(cpu)
torch.ones(64 * 2**18)
first = meter.peak()
second = Meter(cpu)
print(first, meter.peak(), second.peak())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, later, second = map(int, done.stdout.split())
    assert abs(first - 64 * MIB) < 2 * MIB
    assert second < 2 * MIB
    assert later < 2 * MIB  # the newer meter reset the one peak that a process has


def test_the_peer_by_hand():
    """16 maps of 1 MiB: nine copies of each, as many weighted ones, and their sum."""
    seen = probe(Case("carafe k3 x1", Shape(1, 16, (128, 128), (512, 512))), "unfold", CPU, torch.float32, 1)
    copies = 9 * 16 * MIB
    assert abs(seen.peak_bytes[FORWARD] - (2 * copies + 16 * MIB)) < 3 * MIB
    # back at least the two products that a multiplication's derivative makes, beside the copies themselves
    assert 3 * copies < seen.peak_bytes[BOTH] < 5 * copies
    assert min(seen.seconds[FORWARD], seen.seconds[BOTH]) > 0


def test_too_little_memory_is_an_answer():
    endless = Case("carafe k3 x1", Shape(1, 1, (2**20, 2**20), (2**20, 2**20)))  # 4 TiB
    with pytest.raises(RuntimeError, match="memory"):
        probe(endless, "torch", CPU, torch.float32, 1)


def test_a_process_that_dies_is_an_answer(monkeypatch):
    monkeypatch.setattr(memory, "_answer", os.abort)  # which does not take these arguments
    with pytest.raises(RuntimeError, match="its process ended with code 1"):
        probe(Case("normalize k5", Shape(1, 8, (1, 1), (1, 1))), "torch", CPU, torch.float32, 1)


def test_cuda_is_measured_in_this_process(monkeypatch):
    """Torch counts there what it allocates; an error is an answer too, its first line."""
    monkeypatch.setattr(memory.multiprocessing, "get_context", None)  # whoever starts a process fails
    case, cuda = Case("normalize k5", Shape(1, 8, (1, 1), (1, 1))), torch.device("cuda")
    monkeypatch.setattr(memory, "_run", lambda *arguments: arguments)
    assert probe(case, "torch", cuda, torch.float16, 1) == (case, "torch", cuda, torch.float16)

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(memory, "_run", fail)
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory\.$"):
        probe(case, "torch", cuda, torch.float16, 1)
