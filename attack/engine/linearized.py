"""The gradient match linearized at one batch of inputs, as a linear system that is never written out.

With J the Jacobian of the match by the inputs, W the weights of its rows and P the precision of the prior on the
inputs:

    (J'WJ + P) step = -J'W mismatch        one step of Gauss-Newton

Products with J cost as much as two gradients of the match each; conjugate gradients do the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attack.engine.context import Context
from attack.engine.target import Target

Operator = Callable[[Tensor], Tensor]


class Jacobian:
    """A function's value at one place, and products with its derivative there, both ways."""

    def __init__(self, function: Operator, at: Tensor) -> None:
        self._at = at.detach().requires_grad_()
        self._value = function(self._at)
        self._u = torch.zeros_like(self._value, requires_grad=True)
        # J'u is linear in u: its derivative by u is J.
        (self._transposed,) = torch.autograd.grad(self._value, self._at, self._u, create_graph=True)

    @property
    def value(self) -> Tensor:
        """The function's value."""
        return self._value.detach()

    def forward(self, v: Tensor) -> Tensor:
        """J v; `v` is shaped as the place."""
        return torch.autograd.grad(self._transposed, self._u, v, retain_graph=True)[0]

    def back(self, rows: Tensor) -> Tensor:
        """J'rows; `rows` is shaped as the value."""
        return torch.autograd.grad(self._value, self._at, rows, retain_graph=True)[0]


class Linearized:
    """The system at `inputs`, whose labels are fixed."""

    def __init__(self, target: Target, inputs: Tensor, labels: Tensor) -> None:
        low, high = target.input_range
        self._precision = 12 / (high - low) ** 2  # of a number that is uniform in the range
        self._weights = target.noise.square().reciprocal()  # 0 where the gradient is not known
        self._match = Jacobian(lambda x: target.mismatch(x, labels, differentiable=True), inputs)

    @property
    def downhill(self) -> Tensor:
        """-J'W mismatch, shaped as the inputs."""
        return -self._match.back(self._weights * self._match.value)

    def multiply(self, v: Tensor) -> Tensor:
        """(J'WJ + P) v; `v` is shaped as the inputs."""
        return self._match.back(self._weights * self._match.forward(v)) + self._precision * v


def conjugate_gradients(
    multiply: Operator,
    right: Tensor,
    context: Context,
    *,
    goal: float,
    iterations: int,
    precondition: Operator = lambda r: r,
) -> tuple[Tensor, bool]:
    """Solves multiply(x) = right from zero.

    Args:
        goal: size of the preconditioned residual, relative to its first, at which x counts as the solution.
        precondition: multiplies by an approximate inverse.

    Returns: x, and whether the goal was reached within the iterations and the deadline.
    """
    x, r = torch.zeros_like(right), right
    p = z = precondition(r)
    rz = first = (r * z).sum()
    for _ in range(iterations):
        if rz <= goal**2 * first or not context.seconds_left:
            break
        q = multiply(p)
        step = rz / (p * q).sum()
        x, r = x + step * p, r - step * q
        z = precondition(r)
        before, rz = rz, (r * z).sum()
        p = z + rz / before * p
    return x, bool(rz <= goal**2 * first)
