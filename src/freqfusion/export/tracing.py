"""A model as a graph of torch's own operators, for one size or many."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from freqfusion.fusion import Fusion

Inputs = Callable[[int, int], tuple[Tensor, ...]]
Size = tuple[int, int]

STRIDE = 32
"""Stride of most backbones' coarsest map."""


def default_inputs(model: nn.Module) -> Inputs:
    """Random float32 arguments of ``model`` by height and width.

    The fine map ``(1, hr_channels, H, W)`` and the coarse map of half the size, rounded up, of a fusion module;
    else an image ``(1, 3, H, W)``.
    """

    if isinstance(model, Fusion):
        fusion: Fusion = model
        return lambda height, width: (
            torch.randn(1, fusion.hr_channels, height, width),
            torch.randn(1, fusion.lr_channels, -(-height // 2), -(-width // 2)),
        )
    return lambda height, width: (torch.randn(1, 3, height, width),)


def seeded(inputs: Inputs) -> Inputs:
    """``inputs`` that give the same numbers each time and leave the global generator as it was."""

    def make(height: int, width: int) -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return inputs(height, width)

    return make


def input_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """Names of the arguments in the exported file."""
    if isinstance(model, Fusion):
        return "hr_feat", "lr_feat"
    return ("image",) if count == 1 else tuple(f"input_{i}" for i in range(count))


def named_outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The tensors that ``model`` returns, flat, by name; without what a fusion module passes on unchanged."""
    output = model(*inputs)
    if isinstance(model, Fusion):
        refined = {"fused_hr": output.hr_feat} if model.refines_hr else {}
        return {**refined, "fused_lr": output.lr_feat}
    return dict(_flatten(output, ""))


def _flatten(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _flatten(value, f"{name}_{key}" if name else str(key))
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from _flatten(value, f"{name or 'output'}_{index}")
    elif output is not None:
        raise ValueError(
            f"the model returns a {type(output).__name__}, which no file can hold; export a part of it that "
            "returns tensors"
        )


class FlatModel(nn.Module):
    """``model`` with a tuple of tensors for its result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(named_outputs(self.model, inputs).values())


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, float32, on the CPU; the model itself stays as it is."""
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


def check_sizes(size: Size, dynamic: int) -> list[Size]:
    """The sizes at which a file is compared with torch: ``size``, and two others where it takes them.

    Those have an odd number of steps per side, and another shape.
    """
    if min(size) < 1 or dynamic < 0:
        raise ValueError(f"size must be positive and dynamic not negative, got {size} and {dynamic}")
    if not dynamic:
        return [size]
    if any(side % dynamic for side in size):
        raise ValueError(f"dynamic={dynamic} needs a size of multiples of {dynamic}, got {size[0]}x{size[1]}")
    height, width = (side // dynamic for side in size)
    others = ((height + 1) | 1, (width + 3) | 1), (2 * height, max(2, width // 2))
    return [size, *((rows * dynamic, columns * dynamic) for rows, columns in others)]


def trace(
    model: nn.Module, inputs: Inputs, size: Size, dynamic: int, dtype: torch.dtype
) -> tuple[ExportedProgram, tuple[Tensor, ...]]:
    """Export ``model`` with ``torch.export``; the program and the arguments that it was traced with.

    Raises:
        ValueError: if torch cannot; the message says what to try.
    """
    size = _traced_size(size, dynamic)
    example = cast(inputs(*size), dtype)
    flat = FlatModel(model)
    shapes = (_dynamic_shapes(example, size, dynamic),) if dynamic else None
    try:
        with torch.no_grad():
            return torch.export.export(flat, example, dynamic_shapes=shapes), example
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch.export cannot trace this {type(model).__name__} ({type(error).__name__}: {reason})"
            f'{hint(dynamic)}; or export a part, such as a detector\'s "backbone" (--module backbone)'
        ) from error


def hint(dynamic: int) -> str:
    """What to try where a file for any size fails."""
    return "; try multiples of 32 by dynamic=32 (--dynamic 32), or one size alone" if dynamic == 1 else ""


def _traced_size(size: Size, dynamic: int) -> Size:
    """A size at which nothing is true by chance that is false at others, such as a map being twice another."""
    if dynamic == 1:  # one more than a multiple of the stride: odd at every level that rounds up
        height, width = (max(side // STRIDE, 2) * STRIDE + 1 for side in size)
        return height, width + STRIDE
    if dynamic:  # no side of one step: torch.export takes a 1 for a constant
        return max(size[0], 2 * dynamic), max(size[1], 2 * dynamic)
    return size


def _dynamic_shapes(example: tuple[Tensor, ...], size: Size, dynamic: int) -> tuple[dict[int, Any], ...]:
    if dynamic == 1:
        return tuple({x.ndim - 2: Dim.DYNAMIC, x.ndim - 1: Dim.DYNAMIC} for x in example)
    steps = [side // dynamic for side in size]
    names = Dim("height_steps"), Dim("width_steps")
    shapes = []
    for x in example:
        shape = {}
        for axis, name, count in zip((x.ndim - 2, x.ndim - 1), names, steps, strict=True):
            if x.shape[axis] % count:
                raise ValueError(
                    f"a side of an input of shape {tuple(x.shape)} is not a multiple of the {count} steps of "
                    f"{dynamic} pixels; choose an even dynamic="
                )
            factor = x.shape[axis] // count
            shape[axis] = name if factor == 1 else factor * name
        shapes.append(shape)
    return tuple(shapes)


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Floating point tensors in ``dtype``, others as they are."""
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
