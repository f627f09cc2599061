"""Inverting Gradients: the direction of the gradient is matched, among pictures of little variation.

    x = argmin 1 - <gradient(x), observed> / (||gradient(x)|| ||observed||) + weight * TV(x),   x within its range

by signed Adam in float32. Serves nets whose gradient is no smooth function of the input (ReLU, max pooling), where a
Euclidean match by L-BFGS sticks; and there it seldom comes to a match that proves itself.

Differs from the paper: where the rate first falls, and at the end, the inputs are polished in float64 by L-BFGS on the
Euclidean match without the prior, and a polish that arrives ends the search; elements of the gradient that are not
known take no part; labels that were not told are read for one example only.

Reference: Geiping, Bauermeister, Dröge, Moeller, NeurIPS 2020, arXiv 2003.14053.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.engine.context import Context, Progress
from attack.engine.descent import DECAYS, descend
from attack.engine.film import Film
from attack.engine.labels import NoLabel, read_label
from attack.engine.match import Match
from attack.engine.priors import total_variation
from attack.engine.search import Found, search
from attack.engine.target import Target

ITERATIONS = 4000
"""The paper takes 4800 to 24000; 4000 are those of the figures that are measured here."""
RATE = 0.1
"""In units of the input range: the released code's, for pictures from 0 to 1."""
POLISH_PATIENCE = 60
"""Evaluations within which a polish must gain a tenth."""
FILM_STRIDE = 20


def inverting_gradients(
    target: Target, context: Context, *, variation: float = 1e-2, iterations: int = ITERATIONS
) -> Answer:
    """Inputs of the batch, at labels that were read or told.

    Args:
        variation: weight of the total variation, for inputs of range 1; the paper's code takes 1e-6 to 1e-1.
    """
    try:
        labels = target.labels if target.labels is not None else read_label(target)
    except NoLabel as error:
        return Answer(inputs=None, labels=None, reason=str(error))
    match = Match(target, torch.float32)
    low, high = target.input_range
    shape = (1, target.batch_size, *target.input_shape)

    def cost(inputs: Tensor) -> Tensor:
        return misdirection(match, inputs, labels) + variation / (high - low) * total_variation(inputs)

    film = Film()
    start = torch.randn(shape, generator=context.generator, dtype=torch.float64).to(match.observed) * (high - low) + low
    inputs = start[0].double()
    best, least, evaluations = inputs, target.residual(inputs, labels), 0
    ends = {int(DECAYS[0] * iterations), iterations}
    box, rate = (low, high), RATE * (high - low)
    for iteration, found, _ in descend(start, cost, context, iterations=iterations, rate=rate, box=box):
        evaluations += 1
        if iteration % FILM_STRIDE and iteration not in ends:
            continue
        inputs = found[0].double()
        residual = target.residual(inputs, labels)
        film.take(iteration, residual, inputs)
        if residual <= least:
            best, least = inputs, residual
        left = context.seconds_left
        context.progress(
            Progress(method="inverting-gradients", evaluations=evaluations, residual=least, seconds_left=left)
        )
        if iteration in ends:
            polished = _polish(target, context, inputs, labels)
            evaluations += polished.evaluations
            if polished.residual <= target.tolerance:
                inputs = polished.variables[0].detach()
                film.take(iteration + FILM_STRIDE, polished.residual, inputs)
                return Answer(inputs=inputs, labels=labels, film=film, evaluations=evaluations)
    reason = None if context.seconds_left else "the deadline passed"
    return Answer(inputs=best, labels=labels, film=film, evaluations=evaluations, reason=reason)


def misdirection(match: Match, inputs: Tensor, labels: Tensor) -> Tensor:
    """1 - cosine between the gradients of batches and the observed one, shape (searches,)."""
    own = match.gradients(inputs, labels.expand(len(inputs), -1))
    return 1 - torch.nn.functional.cosine_similarity(own, match.observed[None], dim=1)


def _polish(target: Target, context: Context, inputs: Tensor, labels: Tensor) -> Found:
    match = Match(target)
    return search(
        target,
        context,
        method="inverting-gradients",
        start=lambda: [inputs.clone()],
        mismatch=lambda variables: match.mismatch(variables[0], labels.expand(len(variables[0]), -1)),
        dtype=torch.float64,
        restarts=0,
        patience=POLISH_PATIENCE,
    )
