"""How operators whose kernels are ours are known to torch, and their second derivatives."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from freqfusion.ops._triton import recorded


def second_derivative(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    cotangents: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Derivative of a backward pass, by torch's own differentiation of ``function``.

    Args:
        function: the operator in plain torch.
        inputs: its arguments.
        grad: gradient of its result.
        cotangents: for every input, the gradient of that input's gradient, or None where it is not wanted.

    Returns:
        The derivatives in the inputs and in ``grad``; themselves differentiable if gradients are recorded.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        variables = [
            tensor if create_graph and tensor.requires_grad else tensor.detach().requires_grad_()
            for tensor in (*inputs, grad)
        ]
        *inputs, grad = variables
        out = function(*inputs)
        wanted = [(tensor, c) for tensor, c in zip(inputs, cotangents, strict=True) if c is not None]
        first = torch.autograd.grad(out, [t for t, _ in wanted], grad.to(out.dtype), create_graph=True)
        second = torch.autograd.grad(
            first,
            variables,
            [c for _, c in wanted],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return tuple(second[:-1]), second[-1]


class Registered:
    """An operator known to torch, for its compiler, its modes and its transforms, called past them where it can be.

    A call through torch's dispatcher takes longer than most kernels. So where none of those looks on, the function is
    called as it is, under an :class:`torch.autograd.Function` if a gradient is wanted.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._function = function
        self._defaults = tuple(argument.default for argument in signature(function).parameters.values())
        self._definition = torch.library.custom_op(name, function, mutates_args=())
        self._operator = self._definition._opoverload
        self._differentiable: Any = None
        self.register_fake = self._definition.register_fake

    def register_autograd(
        self,
        derivative: Callable[..., tuple[Any, ...]],
        setup_context: Callable[[Any, Any, Any], None],
        ahead: bool = False,
    ) -> None:
        """As :meth:`torch.library.CustomOpDef.register_autograd`; all arguments are positional.

        Args:
            derivative: of a context and the gradients of the results.
            setup_context: fills that context.
            ahead: whether the derivative launches kernels, which :mod:`freqfusion.ops._triton.ahead` compiles.
        """
        self._definition.register_autograd(derivative, setup_context=setup_context)
        function = self._function

        def forward(ctx: Any, *args: Any) -> Any:
            recorded.now, recorded.compiled = ahead, False
            try:
                out = function(*args)
            finally:
                recorded.now = False
            setup_context(ctx, args, out)
            if recorded.compiled:
                from freqfusion.ops._triton.ahead import rehearse

                rehearse(derivative, setup_context, ctx.needs_input_grad, args, out)
            return out

        members = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
        self._differentiable = type(function.__name__, (torch.autograd.Function,), members)

    def __call__(self, *args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if torch.compiler.is_compiling() or _is_watched(tensors):
            return self._operator(*args)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            args += self._defaults[len(args) :]  # which the derivative expects among its arguments
            return self._differentiable.apply(*args)
        return self._function(*args)


def registered(name: str) -> Callable[[Callable[..., Any]], Registered]:
    """Register a function whose annotations are a schema as an operator: see :class:`Registered`."""
    return lambda function: Registered(name, function)


def _is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether a mode, a transform or a kind of tensor of its own wants to see what operators are called."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in tensors)
