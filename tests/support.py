"""Helpers shared by the tests."""

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
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


def run_compiling(script: str, *arguments: str) -> Any:
    """The JSON that a script prints in a process where Triton compiles instead of interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


KEPT_BY_FILL_RULE = {"num_batches_tracked", "init_pos", "hamming_lowpass", "hamming_highpass"}


def value_by_rule(key: str, shape: Sequence[int]) -> Tensor | None:
    """What the golden files' rule gives the entry of this name, in float64; None where it is kept as constructed."""
    name = key.rpartition(".")[2]
    if name in KEPT_BY_FILL_RULE:
        return None
    noise = np.asarray(np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape)))
    if name == "running_mean":
        filled = 0.1 * noise
    elif name == "running_var":
        filled = 1 + 0.1 * np.abs(noise)
    elif name.startswith("layer_scale"):
        filled = 0.5 + 0.1 * noise
    elif len(shape) >= 2:
        filled = noise / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("bias"):
        filled = 0.02 * noise
    else:
        filled = 1 + 0.1 * noise
    return torch.from_numpy(np.asarray(filled))


def fill_by_rule(module: nn.Module, official_names: Mapping[str, str] | None = None) -> nn.Module:
    """Give every parameter and statistic the value that the golden files' rule derives from its name.

    Args:
        module: filled in place.
        official_names: the released name of each entry, where it is not ours.
    """
    state = module.state_dict()
    for key, value in state.items():
        filled = value_by_rule(official_names[key] if official_names else key, value.shape)
        if filled is not None:
            state[key] = filled.to(value.dtype)
    module.load_state_dict(state)
    return module


def png_bytes(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG, also of kinds that Pillow cannot write, and one that claims another size than it has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def load_model(text: str) -> Any:
    """A model by a line of text; one of a library without a wrapper."""
    from freqfusion.zoo.build import build
    from freqfusion.zoo.spec import ModelSpec

    return build(ModelSpec.parse(text))


def build_host(name: str, num_classes: int, **options: Any) -> Any:
    """A model of another library with fresh weights, before any upgrade and without a wrapper."""
    from dataclasses import replace

    from freqfusion.zoo.build import build
    from freqfusion.zoo.create import for_classes
    from freqfusion.zoo.spec import ModelSpec

    spec = ModelSpec.parse(name)
    return build(for_classes(replace(spec, options={**spec.options, **options}), num_classes))
