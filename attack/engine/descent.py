"""Signed Adam on many searches at once: only the sign of each slope counts, the rate falls in steps, a box holds.

Takes where to start and what to minimize. It knows no picture, no label and no truth.

Reference: Geiping et al., Inverting Gradients, NeurIPS 2020, arXiv 2003.14053, section 4 and its released code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attack.engine.context import Context

DECAYS = (3 / 8, 5 / 8, 7 / 8)
"""Shares of all iterations after which the rate falls to a tenth."""
BETAS = (0.9, 0.999)
"""Adam's own defaults."""


def descend(
    start: Tensor,
    cost: Callable[[Tensor], Tensor],
    context: Context,
    *,
    iterations: int,
    rate: float,
    box: tuple[float, float],
    signed: bool = True,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields, after each iteration, its number from 1 on, the variables, and their costs before it.

    The variables are changed in place by the next iteration: copy what is kept. Ends early at the deadline.

    Args:
        start: shape (searches, ...).
        cost: differentiable, (searches, ...) -> (searches,). A search never sees another's cost.
        rate: of the first iterations, in units of the variables.
        box: least and largest value.
        signed: whether slopes enter by their sign alone.
    """
    variables = start.clone()
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    decays = [int(share * iterations) for share in DECAYS]
    for iteration in range(1, iterations + 1):
        if not context.seconds_left:
            return
        variables.requires_grad_()
        costs = cost(variables)
        (slope,) = torch.autograd.grad(costs.sum(), variables)
        with torch.no_grad():
            slope = slope.sign() if signed else slope
            first.lerp_(slope, 1 - BETAS[0])
            second.lerp_(slope.square(), 1 - BETAS[1])
            step = first / (1 - BETAS[0] ** iteration)
            step /= (second / (1 - BETAS[1] ** iteration)).sqrt() + 1e-8
            now = rate * 0.1 ** sum(iteration > decay for decay in decays)
            variables = (variables - now * step).clamp_(*box)
        yield iteration, variables, costs.detach()
