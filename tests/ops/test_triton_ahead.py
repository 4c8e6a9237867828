"""Backward passes compiled ahead: what a rehearsal foresees is what is launched, and it never stands in the way."""

import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from freqfusion.ops import (
    _autograd,
    available_backends,
    carafe,
    local_similarity,
    normalize_kernels,
    resample,
    use_backend,
)
from freqfusion.ops.carafe.logits import add_low_pass, carafe_from_logits
from freqfusion.ops.normalized_similarity.op import normalized_similarity
from freqfusion.ops.resample.directed import directed_resample

REASON = available_backends()["triton"]
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "triton is there")
Launched = tuple[str, tuple[object, ...]]

OPERATORS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "carafe to twice the size": (lambda x, k: carafe(x, k, 3), ((2, 8, 6, 8), (2, 9, 12, 16))),
    "carafe at one size": (lambda x, k: carafe(x, k, 3), ((2, 8, 6, 8), (2, 9, 6, 8))),
    "carafe, mirrored": (lambda x, k: carafe(x, k, 5, 2, "reflect"), ((2, 8, 6, 8), (2, 50, 12, 16))),
    "carafe_from_logits": (
        lambda x, k: carafe_from_logits(x, k, 3, gain=2),
        ((2, 8, 6, 8), (2, 9, 6, 8)),
    ),
    "add_low_pass": (
        lambda plus, x, k: add_low_pass(plus, x, k, 3, keep=True),
        ((2, 8, 12, 16), (2, 8, 6, 8), (2, 9, 12, 16)),
    ),
    "normalize_kernels": (lambda k: normalize_kernels(k, 3), ((2, 9, 6, 8),)),
    "local_similarity": (local_similarity, ((2, 8, 6, 8),)),
    "local_similarity 5x5": (lambda x: local_similarity(x, 5), ((2, 8, 6, 8),)),
    "normalized_similarity": (
        lambda x, weight, bias: normalized_similarity(x, weight, bias, 2),
        ((2, 16, 6, 8), (16,), (16,)),
    ),
    "resample": (lambda x, offsets: resample(x, offsets, 2), ((2, 8, 6, 8), (2, 4, 12, 16))),
    "directed_resample": (
        lambda x, fine, coarse: directed_resample(x, fine, coarse, 2, (3, 4)),
        ((2, 8, 6, 8), (2, 8, 6, 8), (2, 32, 3, 4)),
    ),
}


def noted(kernel: Any, tensors: Any, how: Any) -> Launched:
    """What decides what is compiled; that maps lie alike is in the constants."""
    dtypes = tuple(x if x is None else x.dtype for x in tensors)
    return kernel.__name__, (dtypes, tuple(how.constants.items()), str(how.choices))


@pytest.fixture
def foreseen(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What rehearsals would have compiled, where each call of an operator compiles something new."""
    from freqfusion.ops._triton import ahead, launch

    class Always:
        now = False
        compiled = property(lambda self: True, lambda self, value: None)

    found: list[Launched] = []
    monkeypatch.setattr(_autograd, "recorded", Always())
    monkeypatch.setattr(launch, "pending", {})
    monkeypatch.setattr(ahead, "_compile", lambda *call: found.append(noted(*call[:3])))
    monkeypatch.setattr(ahead, "PARSES_IN_THREADS", True)  # which this does not
    return found


def launched_by(function: Callable[[], Any]) -> tuple[Any, list[Launched]]:
    """The result of a function, without values, and what it launches in this thread."""
    from freqfusion.ops._triton.launch import instead_of_running

    found: list[Launched] = []
    with use_backend("triton"), instead_of_running(lambda *call: found.append(noted(*call)), 90):
        return function(), found


def finished() -> None:
    from freqfusion.ops._triton import launch

    for job in launch.pending.values():
        assert job.exception(10) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_rehearsal_foresees_the_backward_pass(
    name: str, dtype: torch.dtype, layout: torch.memory_format, foreseen: list[Launched]
) -> None:
    function, shapes = OPERATORS[name]
    inputs = [
        torch.zeros(shape, dtype=dtype).contiguous(
            memory_format=layout if len(shape) == 4 else torch.contiguous_format
        )
        for shape in shapes
    ]
    for x in inputs:
        x.requires_grad_()
    out, _ = launched_by(lambda: function(*inputs))
    finished()
    outs = out if isinstance(out, tuple) else (out,)
    _, launched = launched_by(lambda: torch.autograd.backward(outs, [torch.zeros_like(x) for x in outs]))
    assert len(launched) > 0
    assert set(launched) <= set(foreseen)
    assert {kernel for kernel, _ in foreseen} == {kernel for kernel, _ in launched}


def test_only_wanted_gradients_are_foreseen(foreseen: list[Launched]) -> None:
    x, kernels = torch.zeros(2, 8, 6, 8), torch.zeros(2, 9, 12, 16, requires_grad=True)
    launched_by(lambda: carafe(x, kernels, 3))
    finished()
    assert {kernel for kernel, _ in foreseen} == {"carafe_band_kernels"}


def test_without_gradients_nothing_is(foreseen: list[Launched]) -> None:
    x, kernels = torch.zeros(2, 8, 6, 8), torch.zeros(2, 9, 12, 16)
    launched_by(lambda: carafe(x, kernels, 3))
    assert foreseen == []


def test_a_derivative_that_cannot_be_rehearsed_costs_nothing(foreseen: list[Launched]) -> None:
    from freqfusion.ops._triton import ahead

    def fails(context: Any, grad: Tensor) -> None:
        raise RuntimeError("it needs values")

    ahead.rehearse(fails, lambda *_: None, (True,), (torch.zeros(1),), torch.zeros(1))
    assert foreseen == []
    assert launched_by(lambda: None)[1] == []  # and what comes later is not taken away


def test_on_a_gpu_the_launcher_is_made_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from freqfusion.ops._triton import ahead, launch

    made: list[object] = []
    on: list[torch.device] = []
    built = SimpleNamespace(src="source", metadata="metadata")
    active = SimpleNamespace(launcher_cls=lambda *about: made.append(about))
    monkeypatch.setattr(ahead, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(on.append(device)))
    monkeypatch.setattr(launch, "compiled", lambda *call: built)
    ahead._compile(None, (), None, torch.device("cuda:1"))
    assert made == [("source", "metadata")]
    assert on == [torch.device("cuda:1")]


def test_where_python_cannot_parse_in_threads_nothing_is_rehearsed(
    foreseen: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a SystemError would end the forward pass."""
    from freqfusion.ops._triton import ahead

    monkeypatch.setattr(ahead, "PARSES_IN_THREADS", False)
    x, kernels = torch.zeros(2, 8, 6, 8), torch.zeros(2, 9, 12, 16, requires_grad=True)
    launched_by(lambda: carafe(x, kernels, 3))
    finished()
    assert foreseen == []


def test_where_tensors_are_filled_nothing_is_rehearsed(foreseen: list[Launched]) -> None:
    x, kernels = torch.zeros(2, 8, 6, 8), torch.zeros(2, 9, 12, 16, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        launched_by(lambda: carafe(x, kernels, 3))
    finally:
        torch.use_deterministic_algorithms(False)
    finished()
    assert foreseen == []


def test_memory_that_is_not_there_costs_nothing(
    foreseen: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise RuntimeError("not enough memory")

    x, kernels = torch.zeros(2, 8, 6, 8), torch.zeros(2, 9, 12, 16, requires_grad=True)
    monkeypatch.setattr(torch, "empty_strided", full)
    out, launched = launched_by(lambda: carafe(x, kernels, 3))
    assert out.shape == (2, 8, 12, 16)
    assert len(launched) == 1
    assert foreseen == []


class Kernel:
    __name__ = "kernel"


HOW: Any = SimpleNamespace(constants={"K": 3}, choices=[{"num_warps": 4}])


def test_who_launches_waits_for_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from freqfusion.ops._triton import ahead, launch

    begun, go_on = threading.Event(), threading.Event()
    ran: list[str] = []

    def fails() -> None:
        begun.set()
        assert go_on.wait(10)
        ran.append("compiled")
        raise RuntimeError("the compiler failed")

    kernel = Kernel()
    monkeypatch.setattr(launch, "pending", {launch.kind_of(kernel, (), HOW): ahead._submit(fails)})
    assert begun.wait(10)
    threading.Timer(0.1, go_on.set).start()
    launch.note(kernel, (), HOW)
    assert ran == ["compiled"]
    assert launch.pending == {}


def test_who_launches_does_what_nobody_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    from freqfusion.ops._triton import ahead, launch

    monkeypatch.setattr(ahead, "_free", threading.Semaphore(0))  # all threads have work
    kernel = Kernel()
    job = ahead._submit(lambda: None)
    other = ahead._submit(lambda: None)
    another = launch.kind_of(kernel, (torch.zeros(1),), HOW)
    monkeypatch.setattr(launch, "pending", {launch.kind_of(kernel, (), HOW): job, another: other})
    launch.note(kernel, (), HOW)
    assert job.cancelled()
    assert list(launch.pending) == [another]
    assert not other.cancelled()
    ahead._free.release()
    assert ahead._submit(lambda: None).result(10) is None  # the thread that this starts does all that is left
    assert other.done()
    assert not ahead._jobs


def test_a_kind_is_new_once_where_gradients_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass without gradients before the first with them, as a trainer's check of its validation, hides nothing."""
    from freqfusion.ops._triton import launch, recorded

    monkeypatch.setattr(launch, "_noted", set())
    kernel, found = Kernel(), []
    for now in (False, True, True):
        recorded.now, recorded.compiled = now, False
        launch.note(kernel, (), HOW)
        found.append(recorded.compiled)
    recorded.now = recorded.compiled = False
    assert found == [False, True, False]


WAITING = """
import threading, time
from freqfusion.ops._triton import ahead
ahead._free = threading.Semaphore(1)
def job(number):
    print(number, flush=True)
    time.sleep(0.5)
for number in range(5):
    ahead._submit(lambda number=number: job(number))
time.sleep(0.1)
"""


def test_a_program_that_ends_begins_no_more_of_it() -> None:
    result = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0"]
