"""Registered operators: past torch's dispatcher where nobody looks on, and through it where somebody does."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from freqfusion.ops import carafe, local_similarity, resample, use_backend
from freqfusion.ops._autograd import Registered
from freqfusion.ops.carafe import op


class Seen(TorchDispatchMode):
    """Notes the names of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "freqfusion":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A tensor of a kind of its own, which notes our operators too."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "_opname", "")
        if name:
            cls.names.append(name)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 5, requires_grad=True), torch.randn(2, 9, 6, 10, requires_grad=True)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were called through the dispatcher."""
    names: ClassVar[list[str]] = []
    for value in vars(op).values():
        if isinstance(value, Registered):
            original = value._operator

            def call(*args, original=original):
                names.append(original._opname)
                return original(*args)

            monkeypatch.setattr(value, "_operator", call)
    return names


def values_and_gradients(x: Tensor, kernels: Tensor) -> list[Tensor]:
    """Result, gradients, and their gradients."""
    out = carafe(x, kernels, 3)
    torch.manual_seed(1)
    first = torch.autograd.grad(out, (x, kernels), torch.randn_like(out), create_graph=True)
    second = torch.autograd.grad(first, (x, kernels), [torch.randn_like(value) for value in first])
    return [out, *first, *second]


def test_nothing_is_dispatched_where_nobody_looks_on(inputs, dispatched) -> None:
    values_and_gradients(*inputs)
    with torch.no_grad():
        assert not carafe(*inputs, 3).requires_grad
    assert dispatched == []


def test_a_mode_sees_the_operators_and_gets_the_same(inputs) -> None:
    expected = values_and_gradients(*inputs)
    with Seen() as seen:
        found = values_and_gradients(*inputs)
    assert {"carafe", "carafe_backward_x", "carafe_backward_kernels"} <= set(seen.names)
    for value, right in zip(found, expected, strict=True):
        assert torch.equal(value, right)


def test_tensors_of_their_own_kind_see_the_operators(inputs) -> None:
    x, kernels = inputs
    out = carafe(x.detach().as_subclass(Wrapped), kernels.detach(), 3)
    assert isinstance(out, Wrapped)
    assert "carafe" in Wrapped.names
    assert torch.equal(out.as_subclass(Tensor), carafe(x, kernels, 3))


def test_fake_tensors_have_the_shapes(inputs) -> None:
    with FakeTensorMode() as mode, use_backend("torch"):
        x, kernels = (mode.from_tensor(tensor) for tensor in inputs)
        assert carafe(x, kernels, 3).shape == (2, 4, 6, 10)
        assert resample(x, torch.empty(2, 2, 6, 10)).shape == (2, 4, 6, 10)
        assert local_similarity(x).shape == (2, 8, 3, 5)


def test_arguments_left_out_have_their_defaults(inputs) -> None:
    """Which the derivative expects among its arguments."""
    x, grad = inputs[0], torch.randn(2, 4, 6, 10, requires_grad=True)
    short = op.carafe_backward_kernels(x, grad, 3, 1, False)
    assert torch.equal(short, op.carafe_backward_kernels(x, grad, 3, 1, False, "torch", None))
    torch.autograd.grad(short.sum(), (x, grad))
