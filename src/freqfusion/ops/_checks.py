"""Argument checks and small rules shared by the operators. A message says what came, what was needed, what to do."""

import functools
from collections.abc import Callable
from numbers import Integral
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

Constructor = TypeVar("Constructor", bound=Callable[..., None])

MAX_SIDE = 2**15 - 1
"""Of a window: its taps can be counted in 32 bits."""
MAX_OPTION = 2**20
"""Of channels, groups and the like: no module is that large."""


def check_whole(name: str, value: int) -> int:
    """A whole number, of Python or NumPy, as an int; sizes that are known only at run time pass."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name} must be a whole number, got {_shown(value)} of type {type(value).__name__}; pass an int"
        )
    return int(value)


def check_count(name: str, value: int) -> int:
    """A whole number from 1, as an int."""
    value = check_whole(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor()"
        )


def checked_options(build: Constructor) -> Constructor:
    """A constructor whose ``int`` arguments must be whole numbers from 1 and whose ``bool`` ones True or False."""
    kinds = build.__annotations__

    def checked(name: str, value: Any) -> Any:
        if kinds.get(name) is int:
            value = check_count(name, value)
            if value > MAX_OPTION:
                raise ValueError(f"{name} must be at most {MAX_OPTION}, got {value}")
            return value
        if kinds.get(name) is bool and not isinstance(value, bool):
            raise TypeError(
                f"{name} must be True or False, got {_shown(value)} of type {type(value).__name__}; pass a bool"
            )
        return value

    names = build.__code__.co_varnames[: build.__code__.co_argcount]

    @functools.wraps(build)
    def check_and_build(*args: Any, **options: Any) -> None:
        given = [checked(name, value) for name, value in zip(names, args, strict=False)]
        build(*given, *args[len(names) :], **{name: checked(name, value) for name, value in options.items()})

    return cast(Constructor, check_and_build)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


AXES = {2: "(B, C, H, W)", 3: "(B, C, D, H, W)"}
"""Shape of a map by its spatial dimensions."""


def check_map(name: str, x: Tensor, spatial_dims: tuple[int, ...] = (2,)) -> None:
    """A floating point map ``(B, C, H, W)``, or another of ``spatial_dims``."""
    check_tensor(name, x)
    if x.ndim - 2 not in spatial_dims:
        first, *others = (f"{dims + 2} dimensions {AXES[dims]}" for dims in spatial_dims)
        volumes = f"; a volume has {others[0]}" if others else ""
        raise ValueError(f"{name} must have {first}, got {x.ndim} with shape {tuple(x.shape)}{volumes}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")


def check_pair(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Two maps of as many dimensions, of one batch size and on one device."""
    if x.ndim != other.ndim:
        raise ValueError(
            f"{name} has {x.ndim} dimensions and {other_name} has {other.ndim}; both must be images or both volumes"
        )
    if x.device != other.device:
        raise ValueError(
            f"{name} is on {x.device} and {other_name} on {other.device}; move them to one device"
        )
    if x.shape[0] != other.shape[0]:
        raise ValueError(f"batch sizes differ: {name} has {x.shape[0]}, {other_name} has {other.shape[0]}")


def check_filled(name: str, x: Tensor) -> None:
    """A map to read from."""
    if any(side < 1 for side in x.shape[2:]):
        raise ValueError(f"{name} has an empty side: shape {tuple(x.shape)}; there is nothing to read")


def check_kernel_size(name: str, kernel_size: int) -> int:
    """The side of a window, as an int."""
    kernel_size = check_whole(name, kernel_size)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{name} must be odd and at least 1 (a window needs a centre), got {kernel_size}")
    if kernel_size > MAX_SIDE:
        raise ValueError(f"{name} must be at most {MAX_SIDE}, got {kernel_size}; choose a smaller window")
    return kernel_size


def check_padding_mode(padding_mode: str) -> bool:
    """Whether it is ``"reflect"``."""
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f'padding_mode must be "zeros" or "reflect", got {padding_mode!r}')
    return padding_mode == "reflect"


def check_groups(name: str, channels: int, groups: int) -> int:
    """A number of groups of channels, as an int."""
    groups = check_whole("groups", groups)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"groups must divide the channels of {name}, got {groups} groups for {channels} channels"
        )
    return groups


def check_taps(name: str, channels: int, kernel_size: int, groups: int, dims: int = 2) -> None:
    needed = groups * kernel_size**dims
    if channels != needed:
        raise ValueError(
            f"{name} must have groups * kernel_size**{dims} = {groups} * {kernel_size}**{dims} = {needed} channels, "
            f"got {channels}"
        )


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 for half precision inputs, otherwise the widest dtype among them."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _innermost(x: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if x.ndim == 5 else torch.channels_last


def is_channels_last(x: Tensor) -> bool:
    """Whether channels lie innermost; False inside ``torch.func.vmap``, where a tensor does not tell."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.is_contiguous(memory_format=_innermost(x)) and not x.is_contiguous()


def layout(x: Tensor) -> torch.memory_format:
    """The memory layout that results take from ``x``."""
    return _innermost(x) if is_channels_last(x) else torch.contiguous_format


TORCHSCRIPT = (
    "freqfusion does not support TorchScript (torch.jit, torch.onnx.export with dynamo=False), which keeps the sizes "
    "of its example; use freqfusion.export.export_onnx or export_program, with dynamic=True for any size"
)


def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, which torch 2.8 takes for True in all that it compiles."""
    return torch.compiler._is_exporting_flag


def refuse_torchscript() -> None:
    """Raise while ``torch.jit.trace`` runs, or what is built on it, such as torch's older exporter to ONNX."""
    if torch.jit.is_tracing():
        raise RuntimeError(TORCHSCRIPT)


class NotScriptable:
    """Mix-in for modules: ``torch.jit.script`` says what to use instead."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Called for every module inside the one that is scripted."""
        raise RuntimeError(TORCHSCRIPT)
