"""Cases of the upsamplers of frozen features: inputs, weights and results of the authors' code."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from support import load_golden

KEPT = ("rope.freqs", "periods", "num_batches_tracked", "range_temp", "sigma_spatial")


def _unit(number: int, count: int) -> Tensor:
    """``count`` numbers in [-1, 1), the same wherever they are computed."""
    mask = np.uint64(2**32 - 1)
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2654435761)
    x = (x + np.uint64((number + 1) * 2654404609)) & mask
    for shift, factor in ((16, 2246822519), (13, 3266489917)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & mask
    x ^= x >> np.uint64(16)
    return torch.from_numpy(x / 2**31 - 1)


def _by_formula(key: str, number: int, shape: list[int]) -> Tensor:
    u = _unit(number, int(np.prod(shape))).reshape(shape)
    if key.endswith("running_var"):
        return 1 + 0.3 * u
    if len(shape) >= 2:
        return 1.5 * u / (u.numel() / shape[0]) ** 0.5
    return 1 + 0.2 * u if key.endswith("weight") else 0.2 * u


class Case:
    """A golden file: a module filled with its weights, its inputs as leaves, and what is expected of both."""

    def __init__(self, name: str) -> None:
        self.meta, self.arrays = load_golden(name)
        self.is_full = "state_dict_shapes" in self.meta

    @property
    def options(self) -> dict[str, Any]:
        return self.meta["constructor"]

    def fill(self, module: nn.Module) -> nn.Module:
        """Load the weights strictly, in float64; in the mode of the case."""
        module = module.double().train(self.meta.get("training_mode", False))
        if self.is_full:
            shapes = self.meta["state_dict_shapes"]
            state = module.state_dict()
            assert list(state) == list(shapes)
            for number, key in enumerate(sorted(shapes)):
                if not key.endswith(KEPT):
                    state[key] = _by_formula(key, number, shapes[key])
        else:
            state = {
                key.partition("/")[2]: value
                for key, value in self.arrays.items()
                if key.startswith(("param/", "buffer/"))
            }
        module.load_state_dict(state)
        return module

    def inputs(self) -> dict[str, Tensor]:
        if self.is_full:
            shapes = self.meta["input_shapes"].items()
            made = {
                name: 1.5 * _unit(1000 + i, int(np.prod(shape))).reshape(shape)
                for i, (name, shape) in enumerate(shapes)
            }
        else:
            made = {key[3:]: value for key, value in self.arrays.items() if key.startswith("in/")}
        return {name: value.clone().requires_grad_() for name, value in made.items()}

    def check(self, module: nn.Module, inputs: dict[str, Tensor], out: Tensor) -> None:
        """Compare the output and all gradients of ``sum(out * cot)``."""
        if self.is_full:
            cotangent = _unit(2000, out.numel()).reshape(out.shape)
        else:
            cotangent = self.arrays["cot"]
        assert list(out.shape) == self.meta.get("out_shape", list(out.shape))
        self._compare("out", out, 1e-9)
        (out * cotangent).sum().backward()
        places = {f"in/{name}": value for name, value in inputs.items()}
        places |= {f"param/{name}": value for name, value in module.named_parameters()}
        compared = 0
        for name, value in places.items():
            if f"grad/{name}" in self.arrays or f"grad/{name}/index" in self.arrays:
                assert value.grad is not None, f"{name} has no gradient"
                self._compare(f"grad/{name}", value.grad, 1e-8)
                compared += 1
        expected = {
            key.split("/index")[0].split("/value")[0] for key in self.arrays if key.startswith("grad/")
        }
        assert compared == len({key.removesuffix("/sum") for key in expected})
        for name, value in module.named_buffers():
            if f"buffer_after/{name}" in self.arrays:
                self._compare(f"buffer_after/{name}", value, 1e-9)

    def _compare(self, name: str, actual: Tensor, tolerance: float) -> None:
        actual = actual.detach()
        if self.is_full:
            expected = self.arrays[f"{name}/value"]
            chosen = actual.flatten()[self.arrays[f"{name}/index"]]
            sums = torch.stack([actual.sum(), actual.abs().sum()])
            scale = max(float(expected.abs().max()), 1.0)
            torch.testing.assert_close(sums, self.arrays[f"{name}/sum"], rtol=1e-9, atol=1e-6)
            if "image" in name:
                tolerance = 1e-8
        else:
            expected, chosen = self.arrays[name], actual
            scale = max(float(expected.abs().max()), 1e-3) if name.startswith("grad/") else 1.0
        error = float((chosen - expected).abs().max()) / scale
        assert chosen.shape == expected.shape, name
        assert error <= tolerance, f"{name}: {error:.2e}"
