"""Second derivatives of operators whose first one is a kernel."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
