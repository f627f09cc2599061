"""Gauss-Newton on inputs: nonlinear equations, each in units of its own error, and a prior for what they leave open.

    minimize  ||r(x)||^2 / s + 2 energy(x),    s from ||r(start)||^2 / rows down to a floor of 1 or more

With s = 1 that is the most probable x. From far away the linearization is the larger error by far: s stands for it,
and falls as the residual does (iteratively regularized Gauss-Newton, Bakushinskii 1992). Each step is one linear system
by conjugate gradients, whose products come from automatic differentiation, so that any differentiable `rows` serve:

    (J'J / s + P) step = -J'r / s - energy'

and a search along it. Elements that are not known and rounding bounds are a matter of `rows`, which divides by them.
Everything runs in the dtype of the start, which is to be float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from attack.engine.context import Context
from attack.engine.direct import Direct
from attack.engine.linearized import Jacobian, conjugate_gradients
from attack.engine.prior import Prior, Quadratic

FALL = 4.0
"""s falls so many times a step at least: where the prior decides much, slower is better."""
SHORTEST = 1e-3
"""Part of a step below which the search along it ends."""
STALLED = 0.8
"""Part of the residual's mean square that a step may leave at most where s is not what holds it."""
TAUTER = 30.0
"""Factor of s, where conjugate gradients did not converge on what is left open."""
SOLVED = 1e-2
"""Relative residual at which they did."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How long, and how exactly."""

    steps: int = 16
    iterations: int = 150
    """Of conjugate gradients, each step."""
    goal: float = 1e-5
    """Of conjugate gradients, each step: residual relative to its first."""
    inflation: float | None = None
    """The first s; None: the mean square of the rows at the start."""
    floor: float = 1.0
    """The last s."""
    below: float = 0.3
    """s falls to so many times the mean square of the residual, where that is less."""
    patient: bool = False
    """Whether to go on until `done` where the residual no longer falls, as the prior may still move what is open."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """Where Gauss-Newton ended."""

    inputs: Tensor
    misfit: float
    """Mean square of the rows there: 1 where only their own errors are left."""
    moved: float
    """Mean square of the last step."""
    steps: int
    reason: str | None
    """Why it ended before it was done, if it did."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """What the equations at an answer leave open."""

    deviation: Tensor
    """Of each example, shape (batch,): root mean square of a draw from what is left."""
    variance: float
    """Mean square over all of them."""
    open_directions: float
    """How many directions the prior decides: of all elements, the rank that the equations lack."""


def minimize(
    rows: Callable[[Tensor], Tensor],
    start: Tensor,
    prior: Prior,
    context: Context,
    settings: Settings,
    *,
    direct: Direct | None = None,
    done: Callable[[Tensor], bool] = lambda inputs: True,
    watch: Callable[[Tensor], None] = lambda inputs: None,
) -> Solution:
    """The most probable inputs.

    Args:
        rows: differentiable equations, each divided by its standard deviation; inputs -> flat.
        start: float64, shape of the inputs.
        direct: solves each step's system, where conjugate gradients alone would not.
        done: whether inputs that came of a step with the last s will do.
        watch: is told the inputs after each step.
    """
    x, taken, before, moved = start, 0, float("inf"), float("inf")
    inflation, reason = float("inf"), None
    while taken < settings.steps:
        if not context.seconds_left:
            reason = "the deadline passed"
            break
        at, quadratic = Jacobian(rows, x), prior.at(x)
        size = float(at.value.square().mean())
        stalled = size > STALLED * before and (inflation == settings.floor or inflation < size)
        if stalled and (done(x) or not settings.patient):
            break  # what is left is not an error of the linearization
        before, first = size, size if settings.inflation is None else settings.inflation
        inflation = max(settings.floor, min(inflation / FALL, settings.below * size) if taken else first)
        system = _System(at, quadratic, inflation)
        downhill = -at.back(at.value) / inflation - quadratic.gradient
        step, _ = _solve(system, downhill, x, context, direct, goal=settings.goal, iterations=settings.iterations)
        length = _search(rows, x, step, quadratic, inflation)
        x, moved = x + length * step, length**2 * float(step.square().mean())
        taken += 1
        watch(x)
        if inflation == settings.floor and (done(x) or length == 0):
            break
    misfit = float(rows(x).detach().square().mean())
    return Solution(inputs=x, misfit=misfit, moved=moved, steps=taken, reason=reason)


def spread(
    rows: Callable[[Tensor], Tensor],
    solution: Solution,
    prior: Prior,
    context: Context,
    *,
    iterations: int,
    inflation: float = 1.0,
    direct: Direct | None = None,
) -> Spread:
    """A draw from N(0, (J'J / s + P)^-1) at a solution: one solve of J'noise / sqrt(s) + N(0, P).

    s is the solution's misfit, or `inflation` where that is more; and where the system is too ill-conditioned for
    conjugate gradients, it is raised, so that more is called open than is.

    Args:
        iterations: of conjugate gradients, for each s that is tried.
    """
    at, quadratic = Jacobian(rows, solution.inputs), prior.at(solution.inputs)
    inflation = max(inflation, solution.misfit)
    noise = torch.randn(at.value.shape, generator=context.generator, dtype=at.value.dtype).to(at.value.device)
    forced = quadratic.draw(context.generator)
    while True:
        system, right = _System(at, quadratic, inflation), at.back(noise) / inflation**0.5 + forced
        draw, solved = _solve(system, right, solution.inputs, context, direct, goal=SOLVED, iterations=iterations)
        if solved or not context.seconds_left:
            break
        inflation *= TAUTER
    return Spread(
        deviation=draw.flatten(1).square().mean(1).sqrt(),
        variance=float(draw.square().mean()),
        open_directions=float((draw * quadratic.multiply(draw)).sum()),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _System:
    """J'J / s + P."""

    at: Jacobian
    quadratic: Quadratic
    inflation: float

    def multiply(self, v: Tensor) -> Tensor:
        return self.at.back(self.at.forward(v)) / self.inflation + self.quadratic.multiply(v)


def _solve(
    system: _System,
    right: Tensor,
    place: Tensor,
    context: Context,
    direct: Direct | None,
    *,
    goal: float,
    iterations: int,
) -> tuple[Tensor, bool]:
    if direct is None:
        return conjugate_gradients(system.multiply, right, context, goal=goal, iterations=iterations)
    return direct.solve(system.multiply, right, place, system.quadratic, system.inflation, context, goal=goal)


def _search(rows: Callable[[Tensor], Tensor], x: Tensor, step: Tensor, quadratic: Quadratic, inflation: float) -> float:
    """The part of a step, 1, 1/2, ..., at which the objective is less than before; 0 where there is none."""

    def objective(y: Tensor) -> float:
        return float(rows(y).detach().square().sum()) / (2 * inflation) + quadratic.energy(y)

    before, length = objective(x), 1.0
    while length > SHORTEST:
        if objective(x + length * step) < before:
            return length
        length /= 2
    return 0.0
