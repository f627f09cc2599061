"""The linear systems of Gauss-Newton solved directly: for equations that nearly repeat each other.

Conjugate gradients never see what a second step of the same batch adds: its equations differ from the first's by as
little as the weights do, so they are a thousand times weaker where they are new, and a million times in J'J. With J'J
written out, a Cholesky factor sees them. J'J is costly and changes little near by: it is kept, and with it a factor
that conjugate gradients on the present system take as their preconditioner, until that no longer does.

Equations come as two kinds: `own`, of each example by itself, whose part of J'J is one block an example, and `shared`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attack.engine.context import Context
from attack.engine.linearized import Operator, conjugate_gradients
from attack.engine.prior import Quadratic

Parts = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Inputs -> equations of each example, shape (batch, own), and of all, shape (shared,)."""

MAX_UNKNOWNS = 12288
"""Four pictures of 3 x 32 x 32: J'J of 1.2 GB, twice, and a factor in 20 to 30 s of CPU time."""
ITERATIONS = 40
"""Of conjugate gradients, with a factor: where these do not do, a new one is cheaper."""
ANCHORED = 25
"""The same where the step after may do better."""
LEAST_DAMPING = 500.0
"""Of a system that has no factor in its precision, relative to its diagonal and in units of that precision."""
CHUNK = 128
"""Rows of J at a time."""


class Direct:
    """Solves (J'J / s + P) step = right, at places near each other.

    Args:
        assemble: J'J at a batch of inputs, shape (elements, elements); costly.
        factor_in: precision of its factor: float32 does for equations that are a thousand times as exact as others at
            most, and takes two thirds of the time.
    """

    def __init__(self, assemble: Callable[[Tensor], Tensor], *, factor_in: torch.dtype = torch.float64) -> None:
        self._assemble, self._factor_in = assemble, factor_in
        self._gram: Tensor | None = None
        self._factor: Tensor | None = None

    def solve(
        self,
        multiply: Operator,
        right: Tensor,
        place: Tensor,
        quadratic: Quadratic,
        inflation: float,
        context: Context,
        *,
        goal: float,
    ) -> tuple[Tensor, bool]:
        """The step, and whether it was solved for.

        Args:
            multiply: the system's own product.
            place: where J is taken.
            quadratic: its second derivative is P.
            inflation: s.
        """

        def attempt() -> tuple[Tensor, bool]:
            return conjugate_gradients(
                multiply, right, context, goal=goal, iterations=ITERATIONS, precondition=self._precondition
            )

        step, solved = right, False
        if self._factor is not None:
            step, solved = attempt()
        if not solved and self._gram is not None and context.seconds_left:
            self._refactor(quadratic, inflation)
            step, solved = attempt()
        if not solved and context.seconds_left:
            self._gram = None  # one of these is enough in memory
            self._gram = self._assemble(place)
            self._refactor(quadratic, inflation)
            step, solved = attempt()
        return step, solved

    def _refactor(self, quadratic: Quadratic, inflation: float) -> None:
        assert self._gram is not None
        self._factor = None
        system = self._gram / inflation
        quadratic.add_to(system)
        system = system.to(self._factor_in)
        factor, failed = torch.linalg.cholesky_ex(system)
        damping = LEAST_DAMPING * torch.finfo(self._factor_in).eps
        while failed:  # the smallest eigenvalues cannot be told from zero; what is added, the iterations take off
            system.diagonal().mul_(1 + damping)
            factor, failed = torch.linalg.cholesky_ex(system)
            damping *= 100
        self._factor = factor

    def _precondition(self, r: Tensor) -> Tensor:
        assert self._factor is not None
        # For one right side six times as fast as `cholesky_solve`.
        half = torch.linalg.solve_triangular(self._factor, r.reshape(-1, 1).to(self._factor_in), upper=False)
        return torch.linalg.solve_triangular(self._factor.T, half, upper=True).to(r.dtype).view_as(r)


class Anchored(Direct):
    """The same where each step has a prior and an s of its own: J'J is kept, its factor is not.

    Conjugate gradients make up for what J has changed, as far as they come; where they do not arrive, J'J is written
    out anew for the next step.
    """

    def __init__(self, assemble: Callable[[Tensor], Tensor], *, factor_in: torch.dtype = torch.float64) -> None:
        super().__init__(assemble, factor_in=factor_in)
        self._arrived = False

    def solve(
        self,
        multiply: Operator,
        right: Tensor,
        place: Tensor,
        quadratic: Quadratic,
        inflation: float,
        context: Context,
        *,
        goal: float,
    ) -> tuple[Tensor, bool]:
        """See `Direct`."""
        if not self._arrived:
            self._gram = None  # one of these is enough in memory
            self._gram = self._assemble(place)
        self._refactor(quadratic, inflation)
        step, self._arrived = conjugate_gradients(
            multiply, right, context, goal=goal, iterations=ANCHORED, precondition=self._precondition
        )
        return step, self._arrived


def gram(parts: list[Parts], place: Tensor) -> Tensor:
    """J'J, shape (elements, elements), at a batch of inputs."""
    batch, size = len(place), place[0].numel()
    total = place.new_zeros(batch, size, batch, size)
    for part in parts:
        x = place.detach().requires_grad_()
        own, shared = part(x)
        for first in range(0, own.shape[1], CHUNK):
            pick = torch.eye(own.shape[1], dtype=own.dtype, device=own.device)[first : first + CHUNK]
            rows = _back(own, x, pick[:, None].expand(-1, batch, -1))
            for example in range(batch):
                total[example, :, example] += rows[:, example].T @ rows[:, example]
        for first in range(0, len(shared), CHUNK):
            pick = torch.zeros(min(CHUNK, len(shared) - first), len(shared), dtype=shared.dtype, device=shared.device)
            pick[:, first : first + len(pick)].fill_diagonal_(1)
            rows = _back(shared, x, pick)
            for example in range(batch):
                upto = rows[:, : example + 1].flatten(1)
                total[example, :, : example + 1] += (rows[:, example].T @ upto).view(size, example + 1, size)
    for example in range(batch):
        for other in range(example):
            total[other, :, example] = total[example, :, other].T
    return total.view(batch * size, -1)


def _back(value: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """J'rows, shape (rows, batch, elements of an example)."""
    found = torch.autograd.grad(value, x, rows, retain_graph=True, is_grads_batched=True, allow_unused=True)[0]
    assert found is not None
    return found.flatten(2)
