"""The compiled CPU kernels (``csrc/``): loading, and one function a kernel.

The library depends on no version of torch: it gets addresses, sizes and strides through :mod:`ctypes`, which
releases the interpreter's lock during a call. It is built at install where a C++ compiler is found; without
it :data:`REASON` says why it is absent and nothing else here may be called.
"""

import ctypes
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqfusion.ops._checks import accumulation_dtype, is_channels_last, layout
from freqfusion.ops.carafe.torch import fold_padding

LIBRARY = Path(__file__).parents[1] / "csrc" / "freqfusion_native.so"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

OPERATIONS_A_THREAD = 1 << 22
"""Multiply-adds (some 0.1 ms) that are worth one more thread: starting it takes 20 microseconds or, on a busy
machine, far more."""


class _Map(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    )


class _Volume(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 5),
        ("strides", ctypes.c_int64 * 5),
    )


def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    again = "run `python -m pip install` for freqfusion again"
    if not path.exists():
        return (
            None,
            f"it was not compiled at install, where a C++ compiler is needed: install one and {again}",
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"its library does not load ({error}); {again}"
    library.freqfusion_sources.restype = ctypes.c_char_p
    library.freqfusion_instruction_set.restype = ctypes.c_char_p
    sources = sorted(file for file in path.parent.iterdir() if file.suffix in (".cpp", ".h"))
    if sources:  # installed in place: the sources may have changed since
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
        if digest.encode() != library.freqfusion_sources():
            return None, f"its sources changed after it was compiled; {again}"
    return library, ""


_LIBRARY, REASON = _load(LIBRARY)


def cannot(*tensors: Tensor) -> str:
    """Why the kernels cannot take tensors, or ``""``."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it computes on the CPU, and a tensor is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"it has no kernel for {tensor.dtype}"
    if len({tensor.dtype == torch.float64 for tensor in tensors}) > 1:
        return "one tensor is float64 and another is not"
    return ""


def instruction_set() -> str:
    """Which of the compiled variants the processor runs: ``baseline``, or x86-64 level ``v3`` or ``v4``.

    The environment variable ``FREQFUSION_X86_LEVEL`` (1, 3 or 4) sets an upper limit, for tests.
    """
    assert _LIBRARY is not None, REASON
    return str(_LIBRARY.freqfusion_instruction_set().decode())


def _call(function: str, maps: tuple[Tensor, ...], options: tuple[int, ...], operations: int) -> None:
    """Run a kernel, or its form for volumes; the last map is written."""
    assert _LIBRARY is not None, REASON
    if maps[-1].numel() == 0:
        return
    volumes, dims = maps[-1].ndim == 5, maps[-1].ndim
    struct = _Volume if volumes else _Map
    arguments: list[Any] = [
        ctypes.byref(
            struct(
                tensor.data_ptr(),
                DTYPES[tensor.dtype],
                (ctypes.c_int64 * dims)(*tensor.shape),
                (ctypes.c_int64 * dims)(*tensor.stride()),
            )
        )
        for tensor in maps
    ]
    if options:
        arguments.append((ctypes.c_int64 * len(options))(*options))
    threads = min(torch.get_num_threads(), 1 + operations // OPERATIONS_A_THREAD)
    kernel = getattr(_LIBRARY, f"freqfusion_{'volume_' if volumes else ''}{function}")
    kernel.restype = ctypes.c_bool
    if not kernel(*arguments, ctypes.c_int64(threads)):
        raise MemoryError(f"{function} could not allocate its working memory")


def carafe(
    x: Tensor, kernels: Tensor, kernel_size: int, groups: int, reflect: bool, dilation: int = 1
) -> Tensor:
    """As :func:`freqfusion.ops.carafe.torch.carafe`; taps may be ``dilation`` pixels apart."""
    shape = (*x.shape[:2], *kernels.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, memory_format=layout(x))
    options = (kernel_size, groups, int(reflect), dilation)
    _call("carafe", (x, kernels, out), options, out.numel() * kernel_size ** (x.ndim - 2))
    return out


def carafe_backward_x(
    kernels: Tensor, grad: Tensor, size: Sequence[int], kernel_size: int, groups: int, reflect: bool
) -> Tensor:
    """As :func:`freqfusion.ops.carafe.torch.carafe_backward_x`."""
    if grad.numel() == 0:
        return grad.new_zeros(*grad.shape[:2], *size).contiguous(memory_format=layout(grad))
    operations, options = grad.numel() * kernel_size ** len(size), (kernel_size, groups, int(reflect), 1)
    if len(size) == 3 and reflect:  # volumes: the kernel gives the derivative in the mirrored volume
        radius = kernel_size // 2
        sides = [side + 2 * radius for side in size]
        padded = torch.empty((*grad.shape[:2], *sides), dtype=accumulation_dtype(grad))
        _call("carafe_backward_x", (kernels, grad, padded), options, operations)
        folded = fold_padding(padded, radius, reflect)
        return folded.to(grad.dtype).contiguous(memory_format=layout(grad))
    out = torch.empty((*grad.shape[:2], *size), dtype=grad.dtype, memory_format=layout(grad))
    _call("carafe_backward_x", (kernels, grad, out), options, operations)
    return out


def carafe_backward_kernels(x: Tensor, grad: Tensor, kernel_size: int, groups: int, reflect: bool) -> Tensor:
    """As :func:`freqfusion.ops.carafe.torch.carafe_backward_kernels`."""
    taps = kernel_size ** (x.ndim - 2)
    shape = (x.shape[0], groups * taps, *grad.shape[2:])
    if is_channels_last(x):  # an expanded or transposed gradient is rare and cheaper copied than strided over
        grad = grad.contiguous(memory_format=layout(x))
    out = torch.empty(shape, dtype=accumulation_dtype(x, grad))
    options = (kernel_size, groups, int(reflect), 1)
    _call("carafe_backward_kernels", (x, grad, out), options, grad.numel() * taps)
    return out


def _inverse_norms(x: Tensor) -> Tensor:
    if x.ndim == 5:  # slice below slice: an image
        return _inverse_norms(x.flatten(2, 3)).unflatten(2, x.shape[2:4])
    out = torch.empty((x.shape[0], 1, *x.shape[-2:]), dtype=accumulation_dtype(x))
    _call("inverse_norms", (x, out), (), x.numel())
    return out


def local_similarity(x: Tensor, window: int, dilation: int) -> Tensor:
    """As :func:`freqfusion.ops.local_similarity`, at least float32."""
    neighbours = window ** (x.ndim - 2) - 1
    out = torch.empty((x.shape[0], neighbours, *x.shape[2:]), dtype=accumulation_dtype(x))
    operations = x.numel() * neighbours // 2
    _call("local_similarity", (x, _inverse_norms(x), out), (window, dilation), operations)
    return out


def local_similarity_backward(
    x: Tensor, similarity: Tensor, grad: Tensor, window: int, dilation: int
) -> Tensor:
    """Derivative of :func:`local_similarity` in ``x``, given its result and the gradient of that."""
    taps = window ** (x.ndim - 2)
    weights = torch.empty((x.shape[0], taps, *x.shape[2:]), dtype=similarity.dtype)
    maps = (similarity, grad, _inverse_norms(x), weights)
    _call("local_similarity_weights", maps, (window, dilation), 4 * weights.numel())
    return carafe(x, weights, window, 1, False, dilation)


def _copied(x: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """A volume in another dtype and layout, or itself; torch's copy between layouts takes twice as long."""
    if x.dtype == dtype and x.is_contiguous(memory_format=memory_format):
        return x
    out = torch.empty(x.shape, dtype=dtype, memory_format=memory_format)
    _call("copy", (x, out), (), x.numel())
    return out


def _sampled(x: Tensor) -> Tensor:
    """As the kernels read it: a volume with channels innermost, at least float32."""
    return x if x.ndim == 4 else _copied(x, accumulation_dtype(x), torch.channels_last_3d)


def resample(x: Tensor, offsets: Tensor, groups: int, *unit_size: int) -> Tensor:
    """As :func:`freqfusion.ops.resample`."""
    shape = (*x.shape[:2], *offsets.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, memory_format=layout(x))
    operations = 2 ** (x.ndim - 2) * out.numel()
    _call("resample", (_sampled(x), offsets, out), (groups, *unit_size), operations)
    return out


def resample_backward_x(
    offsets: Tensor, grad: Tensor, size: Sequence[int], groups: int, *unit_size: int
) -> Tensor:
    """Derivative of :func:`resample` in ``x``, of the dtype of ``grad``."""
    volumes, memory_format = grad.ndim == 5, layout(grad)
    innermost = torch.channels_last_3d if volumes else memory_format
    out = torch.empty((*grad.shape[:2], *size), dtype=accumulation_dtype(grad), memory_format=innermost)
    operations = 2 ** (grad.ndim - 2) * grad.numel()
    _call("resample_backward_x", (offsets, grad, out), (groups, *unit_size), operations)
    return _copied(out, grad.dtype, memory_format) if volumes else out.to(grad.dtype)


def resample_backward_offsets(
    x: Tensor, offsets: Tensor, grad: Tensor, groups: int, *unit_size: int
) -> Tensor:
    """Derivative of :func:`resample` in ``offsets``, of their dtype."""
    if is_channels_last(x):
        grad = grad.contiguous(memory_format=layout(x))
    out = torch.empty(offsets.shape, dtype=offsets.dtype)
    operations = 2 ** (x.ndim - 1) * grad.numel()
    _call("resample_backward_offsets", (_sampled(x), offsets, grad, out), (groups, *unit_size), operations)
    return out
