"""Random state: derived seeds, isolation of evaluation from training, and saving it for an exact resume."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """A well-mixed seed of 32 bits from whole numbers such as ``(seed, epoch, index)``.

    torch's generator on the CPU reads no more than 32 bits.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Draw from torch's global CPU generator as after ``manual_seed(seed)``; its state is put back after."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def fixed_randomness(device: torch.device) -> Iterator[None]:
    """Run with the same random numbers every time, without disturbing those of the training around it.

    Evaluation runs inside: a network that draws random numbers in its forward pass (the starting bases of
    the Hamburger head) then gives the same answer for an image whenever, and in whichever process, it is met.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def get_rng_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators that training on ``device`` draws from, as tensors of bytes."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `get_rng_state` returned; a CUDA state is ignored on other devices."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
