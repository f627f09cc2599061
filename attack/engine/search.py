"""Gradient matching as a search: L-BFGS with a strong-Wolfe line search, a divergence check, and restarts.

Takes where to start and what to minimize; returns the best variables by the gradient match. It knows no picture, no
label and no truth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from attack.engine.context import Context, Progress
from attack.engine.film import Film
from attack.engine.target import Target

OUTER_STEPS = 300
"""As in the released code of Deep Leakage from Gradients; each is up to 20 iterations of L-BFGS."""
PATIENCE = 30
"""Outer steps."""
DIVERGED = 1e3
"""Relative residual above which a search is given up; a random start has about 1."""
RESTARTS = 4
SCALE = 1e6
"""Factor of the objective, relative to the observed gradient's square: torch's L-BFGS skips every curvature pair with a
product of 1e-10 or less, and without the factor that is all of them long before a residual of 1e-4."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The best of all starts."""

    variables: list[Tensor]
    residual: float
    film: Film
    evaluations: int
    restarts: int
    reason: str | None
    """Why the search ended, where what it found is not within the tolerance."""


def search(
    target: Target,
    context: Context,
    *,
    method: str,
    start: Callable[[], list[Tensor]],
    mismatch: Callable[[list[Tensor]], Tensor],
    restarts: int = RESTARTS,
    patience: int = PATIENCE,
) -> Found:
    """Minimizes ||mismatch(variables)||^2 from `start()`, again from a new start where that got stuck or diverged.

    Args:
        start: draws fresh variables, float64; the first of them is the batch of inputs, of which frames are kept.
        mismatch: the differentiable difference from the observed gradient.
        restarts: at most so many.
        patience: outer steps within which the residual must fall by a tenth, or the search counts as stuck.

    Everything runs in float64: on a CPU it costs the same as float32 here (4 ms an evaluation of the LeNet), and
    float32 stalls at a residual of 1e-5 to 5e-5.
    """
    goal = target.tolerance / 3
    best: Found | None = None
    evaluations = 0
    for restart in range(restarts + 1):
        film = Film()
        variables = [variable.requires_grad_() for variable in start()]
        optimizer = torch.optim.LBFGS(
            variables, lr=1, history_size=100, max_iter=20, tolerance_grad=0, tolerance_change=0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(variables: list[Tensor] = variables) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            objective = SCALE * mismatch(variables).square().sum() / target.norm**2
            gradients = torch.autograd.grad(objective, variables)
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.grad = gradient
            return objective.detach()

        reason = None
        for step in range(OUTER_STEPS):
            before = [variable.detach().clone() for variable in variables]
            objective = float(optimizer.step(closure)) / SCALE  # of `before`: a step returns the value it began at
            residual = math.sqrt(objective)
            film.take(step, residual, before[0])
            if best is None or not best.residual <= residual:  # a NaN is beaten by anything
                best = Found(
                    variables=before, residual=residual, film=film, evaluations=0, restarts=restart, reason=None
                )
            least = best.residual
            context.progress(
                Progress(method=method, evaluations=evaluations, residual=least, seconds_left=context.seconds_left)
            )
            past = film.history[-1 - patience][1] if step >= patience else math.inf
            reason = _verdict(residual, past, out_of_time=not context.seconds_left)
            if residual <= goal or reason:
                break
        else:
            reason = f"no end after {OUTER_STEPS} outer steps"
        assert best is not None
        if best.residual <= target.tolerance or not context.seconds_left:
            break
    assert best is not None
    reason = None if best.residual <= target.tolerance else f"{reason}, after {restart} restarts"
    return dataclasses.replace(best, evaluations=evaluations, restarts=restart, reason=reason)


def _verdict(residual: float, past: float, *, out_of_time: bool) -> str | None:
    if not residual < DIVERGED:
        return "the search diverged"
    if residual > 0.9 * past:
        return "the search got stuck"
    return "the deadline passed" if out_of_time else None
