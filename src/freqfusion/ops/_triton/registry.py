"""The Triton kernels as representative calls launch them, and what each takes of a GPU; none is needed for it.

An operator's ``triton`` has a function ``cases``: it yields :class:`Case`\\ s, calls of its launchers on empty
tensors. So the arguments, constants and configurations are those that a GPU would get.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from freqfusion.ops._backends import implementation
from freqfusion.ops._triton import launch


class Case(NamedTuple):
    """A representative call; ``run`` makes its tensors on the CPU and calls a launcher."""

    name: str
    run: Callable[[], object]


class Usage(NamedTuple):
    """A kernel of a case, compiled for one compute capability.

    ``registers`` of a thread, bytes of its ``stack`` (0 if no register is spilled), bytes of ``shared`` memory of a
    program; ``key`` names the compiled kernel: launches that share it share the kernel.
    """

    case: str
    kernel: str
    warps: int
    registers: int
    stack: int
    shared: int
    seconds: float
    key: str


def cases() -> Iterator[Case]:
    """Of all kernels."""
    pixels = ("local_similarity", "normalize_kernels", "normalized_similarity", "resample")
    for operator in ("carafe", "convolution", *pixels):
        yield from implementation(operator, "triton").cases()


class _NoDevice:
    """Names a GPU to compile for; Triton keeps what it compiled by the number of the device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling(capability: int) -> Iterator[list[tuple[str, Any]]]:
    built: list[tuple[str, Any]] = []
    before = dict(vars(driver))  # `reset_active` would look for a GPU

    def take(kernel: Any, tensors: Sequence[Tensor | None], how: launch.Launch) -> None:
        launch.note(kernel, tensors, how)
        built.append((kernel.__name__, launch.compiled(kernel, tensors, how)))

    driver.set_active(_NoDevice(capability))
    try:
        with launch.instead_of_running(take, capability):
            yield built
    finally:
        vars(driver).update(before)


def compile_case(case: Case, capability: int) -> list[Usage]:
    """Compile the kernels of a case, in the order of their launches.

    Args:
        case: the call.
        capability: compute capability of a GPU, 90 for 9.0.
    """
    began = time.perf_counter()
    with _compiling(capability) as built:
        case.run()
    seconds = (time.perf_counter() - began) / max(1, len(built))
    usages = []
    for kernel, compiled in built:
        registers, stack = _thread_usage(compiled.asm["cubin"])
        metadata = compiled.metadata
        usages.append(
            Usage(
                case.name,
                kernel,
                metadata.num_warps,
                registers,
                stack,
                metadata.shared,
                seconds,
                compiled.hash,
            )
        )
    return usages


def _thread_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, as NVIDIA's tool beside Triton's compiler reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])
