"""Gauss-Newton solves what is determined, leaves the rest to the prior, and says how much that was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attack.engine.context import Context
from attack.engine.gauss_newton import Settings, minimize, spread
from attack.engine.prior import Gaussian

PRIOR = Gaussian(mean=0.5, variance=0.1)
NOISE = 1e-6


def context(deadline: float = math.inf) -> Context:
    return Context(generator=torch.Generator().manual_seed(0), deadline=deadline)


def matrix(rows: int) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def problem(rows: int) -> tuple[Tensor, Tensor]:
    """A matrix, and an input of 12 elements."""
    return matrix(rows), torch.rand(1, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_nonlinear_equations_are_solved_to_their_noise() -> None:
    a, truth = problem(30)
    wanted = torch.tanh(truth @ a.T)
    solution = minimize(
        lambda x: ((torch.tanh(x @ a.T) - wanted) / NOISE).flatten(),
        torch.full_like(truth, 0.5),
        PRIOR,
        context(),
        Settings(),
    )
    assert solution.misfit < 1e-3 and torch.allclose(solution.inputs, truth, atol=10 * NOISE, rtol=0)


@pytest.mark.parametrize("rows", [5, 30])
def test_what_is_open_is_counted(rows: int) -> None:
    a, truth = problem(rows)

    def equations(x: Tensor) -> Tensor:
        return ((x - truth) @ a.T / NOISE).flatten()

    solution = minimize(equations, torch.full_like(truth, 0.5), PRIOR, context(), Settings())
    found = spread(equations, solution, PRIOR, context(), iterations=100)
    free = max(0, 12 - rows)
    # A sum of `free` squares of normal numbers lies within 4 standard deviations.
    assert abs(found.open_directions - free) <= 4 * math.sqrt(2 * free) + 1e-6
    projected = torch.linalg.pinv(a) @ a
    best = 0.5 + (truth - 0.5) @ projected.T
    assert torch.allclose(solution.inputs, best, atol=1e-4, rtol=0)


def test_deadline_ends_it_with_a_reason() -> None:
    a, truth = problem(30)
    solution = minimize(lambda x: ((x - truth) @ a.T).flatten(), truth * 0, PRIOR, context(deadline=0.0), Settings())
    assert solution.reason == "the deadline passed" and solution.steps == 0
