"""The models that the contract of ``upgrade_`` is held on; a file here for every host library."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOSTS = {
    "monai": "monai",
    "nnunet": "dynamic_network_architectures",
    "smp": "segmentation_models_pytorch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "transformers_masks": "transformers",
    "ultralytics": "ultralytics",
}
"""File here: package that must be installed."""


@dataclass(frozen=True)
class HostCase:
    """A small model of a host, with random weights and few channels: a forward pass takes well under 0.1 s.

    ``call`` runs it: model and image batch in, any nest of tensors out. ``odd_size`` is a size that no stride
    divides; where the host itself refuses such, it is None and ``limit`` is a part of the host's message.
    With both, the host refuses that size and the upgraded model takes it.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor], Any] = lambda model, image: model(image)
    size: tuple[int, ...] = (64, 96)
    odd_size: tuple[int, ...] | None = (61, 87)
    limit: str = ""
    channels: int = 3
    """Of the image."""
    compiles: str = ""
    """Compile this submodule instead of the model."""
    pickles: bool = True
    """Whether the host itself can be pickled."""
    sites: int = 1
    """How many sites are used."""
    slow: bool = False
    """Takes a minute or more, and is left to ``-m slow``."""
    skipped: int = 0

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    @property
    def spatial_dims(self) -> int:
        return len(self.size)

    def image(self, size: tuple[int, ...] | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.rand(2, self.channels, *(size or self.size), generator=generator)

    def run(self, model: nn.Module, image: Tensor) -> list[Tensor]:
        return list(tensors(self.call(model, image)))


def installed_cases() -> Iterator[HostCase]:
    for file, package in HOSTS.items():
        if importlib.util.find_spec(package) is not None:
            yield from importlib.import_module(f"host_cases.{file}").CASES


def build(name: str) -> nn.Module:
    """The model of a case, for ``host="host_cases:build?name=..."``."""
    return next(case for case in installed_cases() if case.name == name).model()


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
