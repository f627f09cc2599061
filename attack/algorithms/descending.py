"""A search under a prior: signed or plain Adam from several starts at once, then a polish that forgets the prior.

Adam runs in float32 on whatever an algorithm minimizes; which start did best is told by the gradient match alone. Where
the rate first falls, and at the end, the best is polished in float64 by L-BFGS on the Euclidean match, and a polish
that arrives ends the search. It knows no truth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.engine.context import Context, Progress
from attack.engine.descent import DECAYS, descend
from attack.engine.film import Film
from attack.engine.match import Match
from attack.engine.search import Found, search
from attack.engine.target import Target

POLISH_PATIENCE = 200
"""Evaluations within which a polish must gain a tenth."""
FILM_STRIDE = 20
"""Iterations between two looks at the gradient match."""


def descend_and_polish(
    target: Target,
    context: Context,
    cost: Callable[[Tensor], Tensor],
    *,
    method: str,
    labels: Tensor,
    starts: int,
    iterations: int,
    rate: float,
    signed: bool,
) -> Answer:
    """The inputs that match best.

    Args:
        cost: of float32 inputs, shape (starts, batch, *input_shape) -> (starts,).
        labels: int64, shape (batch,).
        rate: of Adam, in units of the input range.
    """
    low, high = target.input_range
    shape = (starts, target.batch_size, *target.input_shape)
    start = torch.randn(shape, generator=context.generator) * (high - low) + low
    film, evaluations = Film(), 0
    best, least = start[0].double().to(target.device), float("inf")
    ends = {int(DECAYS[0] * iterations), iterations}
    rate, box = rate * (high - low), (low, high)
    for iteration, found, _ in descend(
        start.to(target.device), cost, context, iterations=iterations, rate=rate, box=box, signed=signed
    ):
        evaluations += starts
        if iteration % FILM_STRIDE and iteration not in ends:
            continue
        residual, inputs = min(
            ((target.residual(each, labels), each) for each in found.double()), key=lambda pair: pair[0]
        )
        film.take(iteration, residual, inputs)
        if residual <= least:
            best, least = inputs, residual
        left = context.seconds_left
        context.progress(Progress(method=method, evaluations=evaluations, residual=least, seconds_left=left))
        if iteration in ends:
            polished = _polish(target, context, best, labels, method)
            evaluations += polished.evaluations
            if polished.residual <= target.tolerance:
                inputs = polished.variables[0].detach()
                film.take(iteration + FILM_STRIDE, polished.residual, inputs)
                return Answer(inputs=inputs, labels=labels, film=film, evaluations=evaluations)
    reason = None if context.seconds_left else "the deadline passed"
    return Answer(inputs=best, labels=labels, film=film, evaluations=evaluations, reason=reason)


def _polish(target: Target, context: Context, inputs: Tensor, labels: Tensor, method: str) -> Found:
    match = Match(target)
    return search(
        target,
        context,
        method=method,
        start=lambda: [inputs.clone()],
        mismatch=lambda variables: match.mismatch(variables[0], labels.expand(len(variables[0]), -1)),
        restarts=0,
        patience=POLISH_PATIENCE,
        dtype=torch.float64,
    )
