"""Argument checks and small rules shared by the operators. A message says what came, what was needed, what to do."""

from typing import NoReturn

import torch
from torch import Tensor


def check_map(name: str, x: Tensor) -> None:
    """A floating point map ``(B, C, H, W)``."""
    if x.ndim != 4:
        raise ValueError(
            f"{name} must have 4 dimensions (B, C, H, W), got {x.ndim} with shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")


def check_pair(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Two maps of one batch size on one device."""
    if x.device != other.device:
        raise ValueError(
            f"{name} is on {x.device} and {other_name} on {other.device}; move them to one device"
        )
    if x.shape[0] != other.shape[0]:
        raise ValueError(f"batch sizes differ: {name} has {x.shape[0]}, {other_name} has {other.shape[0]}")


def check_kernel_size(name: str, kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{name} must be odd and at least 1 (a window needs a centre), got {kernel_size}")


def check_groups(name: str, channels: int, groups: int) -> None:
    if groups < 1 or channels % groups:
        raise ValueError(
            f"groups must divide the channels of {name}, got {groups} groups for {channels} channels"
        )


def check_taps(name: str, channels: int, kernel_size: int, groups: int) -> None:
    needed = groups * kernel_size * kernel_size
    if channels != needed:
        raise ValueError(
            f"{name} must have groups * kernel_size**2 = {groups} * {kernel_size}**2 = {needed} channels, "
            f"got {channels}"
        )


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 for half precision inputs, otherwise the widest dtype among them."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def layout(x: Tensor) -> torch.memory_format:
    """The memory layout that results take from ``x``."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


TORCHSCRIPT = (
    "freqfusion does not support TorchScript (torch.jit, torch.onnx.export with dynamo=False), which keeps the sizes "
    "of its example; use freqfusion.export.export_onnx or export_program, with dynamic=True for any size"
)


def refuse_torchscript() -> None:
    """Raise while ``torch.jit.trace`` runs, or what is built on it, such as torch's older exporter to ONNX."""
    if torch.jit.is_tracing():
        raise RuntimeError(TORCHSCRIPT)


class NotScriptable:
    """Mix-in for modules: ``torch.jit.script`` says what to use instead."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Called for every module inside the one that is scripted."""
        raise RuntimeError(TORCHSCRIPT)
