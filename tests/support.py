"""Helpers shared by the tests."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(meta, arrays)`` of one golden file, arrays as float64 where they are floating point."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        meta = json.loads(str(archive["meta"]))
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
    return meta, {
        key: value.double() if value.is_floating_point() else value for key, value in arrays.items()
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest entry of ``expected``."""
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare with a named message; NaN and shape differences are reported as such."""
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3e} exceeds {tolerance:.1e}"


KEPT_BY_FILL_RULE = {"num_batches_tracked", "init_pos", "hamming_lowpass", "hamming_highpass"}


def fill_by_rule(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic the value that the golden files' rule derives from its name."""
    state = module.state_dict()
    for key, value in state.items():
        name = key.rpartition(".")[2]
        if name in KEPT_BY_FILL_RULE:
            continue
        seed = zlib.crc32(key.encode())
        noise = np.asarray(np.random.RandomState(seed).standard_normal(tuple(value.shape)))
        if name == "running_mean":
            filled = 0.1 * noise
        elif name == "running_var":
            filled = 1 + 0.1 * np.abs(noise)
        elif name.startswith("layer_scale"):
            filled = 0.5 + 0.1 * noise
        elif value.ndim >= 2:
            filled = noise / np.sqrt(np.prod(value.shape[1:]))
        elif name.endswith("bias"):
            filled = 0.02 * noise
        else:
            filled = 1 + 0.1 * noise
        state[key] = torch.from_numpy(np.asarray(filled)).to(value.dtype)
    module.load_state_dict(state)
    return module
