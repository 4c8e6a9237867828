"""Checkpoints of the authors' releases: recognised, checked tensor by tensor, and made into models of ours.

Nothing is downloaded and no file can run code. A family of published models is one file beside this one.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from freqfusion._optional import require
from freqfusion._untrusted import building
from freqfusion.weights.files import read_state_dict
from freqfusion.weights.fill import fill_
from freqfusion.zoo.official import detectors, mask2former, segnext
from freqfusion.zoo.official.base import Family, Plan, Shapes
from freqfusion.zoo.pretrained import CONFIG, WEIGHTS, save_pretrained
from freqfusion.zoo.spec import spec_of

__all__ = ["FAMILIES", "Conversion", "convert_official", "read_official"]

FAMILIES: tuple[Family, ...] = (segnext.FAMILY, mask2former.FAMILY, detectors.FAMILY)
"""The known families, in the order in which they are tried."""

MAX_NUMBERS = 2**29
"""Limit for a file whose tensors are views of a few numbers; more than any published model has."""


@dataclass(frozen=True)
class Conversion:
    """What an official checkpoint was found to be, and what became of it."""

    title: str
    """Variant, number of classes and what else was found."""
    parameters: int
    tensors: int
    """How many tensors of the file are in the model."""
    unneeded: Mapping[str, int]
    """How many others there were, by the reason why the model has no place for them."""
    files: tuple[Path, ...]
    """That were written."""


def convert_official(path: str | Path, directory: str | Path) -> Conversion:
    """Write an official checkpoint as :func:`freqfusion.from_pretrained` reads it.

    Args:
        path: see :func:`read_official`.
        directory: made if it does not exist; a model in it is left alone.

    Returns:
        What was found and written.

    Raises:
        FileExistsError: if ``directory`` holds a model already.
        FileNotFoundError: if there is no such file.
        ImportError: if safetensors or a library that has the model is not installed.
        NotADirectoryError: if ``directory`` is a file.
        ValueError: see :func:`read_official`.
    """
    require("safetensors.torch", "hub")
    folder = Path(directory)
    files = (folder / WEIGHTS, folder / CONFIG)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to write the model to")
    for file in files:
        if file.exists():
            raise FileExistsError(
                f"{folder} holds a model already ({file.name}); name another folder, or delete it"
            )
    plan, tensors, unneeded = read_official(path)
    save_pretrained(plan.model, folder)
    parameters = sum(parameter.numel() for parameter in plan.model.parameters())
    return Conversion(plan.title, parameters, tensors, unneeded, files)


def find_family(state: Mapping[str, Tensor]) -> Family | None:
    """The family of published models that a file's tensors are of, if any."""
    shapes = Shapes({key: tuple(value.shape) for key, value in state.items()})
    return next((family for family in FAMILIES if family.recognises(shapes)), None)


def read_official(path: str | Path) -> tuple[Plan, int, Counter[str]]:
    """The model of an official checkpoint, with its weights, in evaluation mode on the CPU.

    Args:
        path: a file of :data:`FAMILIES`, in a layout of :func:`~freqfusion.weights.read_state_dict`.

    Returns:
        The plan, whose ``model`` is in the dtype of the file and whose classes it has; how many tensors that took,
        and how many others there were by the reason why the model has no place for them.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if a library that has the model is not installed.
        ValueError: if the file cannot be read, holds another model, or does not fit in every tensor.
    """
    path = Path(path)
    state = read_state_dict(path)
    family = find_family(state)
    if family is None:
        known = "\n".join(f"  {family.title}" for family in FAMILIES)
        raise ValueError(
            f"{path} holds no known model; its {len(state)} tensors begin with "
            f"{', '.join(list(state)[:4])}. Known are\n{known}"
        )
    numbers = sum(value.numel() for value in state.values())
    if numbers > max(MAX_NUMBERS, path.stat().st_size):
        raise ValueError(f"{path} claims {numbers:,} numbers, more than it has bytes: it is damaged")
    with building(4 * numbers, f"{path} looks like one of {family.title}, but "):
        plan = family.plan(Shapes({key: tuple(value.shape) for key, value in state.items()}))
        double = any(value.dtype == torch.float64 for value in state.values())
        plan.model.to(torch.float64 if double else torch.float32)
        unneeded = fill_(plan.model, state, plan.title, plan.own_keys, plan.unneeded, plan.kept)
    plan.model.eval()
    plan.model.spec = replace(spec_of(plan.model), classes=plan.classes)  # type: ignore[assignment]
    return plan, len(state) - unneeded.total(), unneeded
