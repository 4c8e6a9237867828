"""Backward passes compiled ahead: what a rehearsal foresees is what is launched, and it never stands in the way."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
}


def noted(kernel: Any, tensors: Any, how: Any) -> Launched:
    """All that decides what is compiled, and more."""
    lie = tuple(x if x is None else (x.shape, x.stride(), x.dtype) for x in tensors)
    return kernel.__name__, (lie, tuple(how.numbers), tuple(how.constants.items()), str(how.choices))


@pytest.fixture
def foreseen(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What rehearsals would have compiled, where each call of an operator compiles something new."""
    from freqfusion.ops._triton import ahead, launch

    class Always:
        new = property(lambda self: True, lambda self, value: None)

    found: list[Launched] = []
    pool = ThreadPoolExecutor(1)
    monkeypatch.setattr(_autograd, "compiles", Always())
    monkeypatch.setattr(launch, "pending", {})
    monkeypatch.setattr(ahead, "_threads", lambda: pool)
    monkeypatch.setattr(ahead, "_compile", lambda *call: found.append(noted(*call[:3])))
    return found


def launched_by(function: Callable[[], Any]) -> tuple[Any, list[Launched]]:
    """The result of a function, without values, and what it launches in this thread."""
    from freqfusion.ops._triton.launch import instead_of_running

    found: list[Launched] = []
    with use_backend("triton"), instead_of_running(lambda *call: found.append(noted(*call)), 90):
        return function(), found


def finished() -> None:
    from freqfusion.ops._triton import launch

    for jobs in launch.pending.values():
        for job in jobs:
            assert job.exception() is None


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


class Kernel:
    __name__ = "kernel"


def test_who_launches_waits_for_what_is_compiled_and_takes_what_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from freqfusion.ops._triton import launch

    begun, go_on = threading.Event(), threading.Event()
    ran: list[str] = []

    def first() -> None:
        begun.set()
        assert go_on.wait(10)
        ran.append("first")
        raise RuntimeError("the compiler failed")

    kernel, how = Kernel(), launch.Launch(lambda _: 1, [], [{"num_warps": 4}], {})
    with ThreadPoolExecutor(1) as pool:
        jobs = [pool.submit(first), pool.submit(ran.append, "second")]
        monkeypatch.setattr(launch, "pending", {id(kernel): jobs})
        assert begun.wait(10)
        threading.Timer(0.1, go_on.set).start()
        launch.note(kernel, (), how)
        assert "first" in ran
        assert jobs[1].cancelled() or "second" in ran
    assert launch.pending == {}
