"""Inverting Gradients: the direction of the gradient is matched, among pictures of little variation.

    x = argmin 1 - <gradient(x), observed> / (||gradient(x)|| ||observed||) + weight * TV(x),   x within its range

by signed Adam in float32. Serves nets whose gradient is no smooth function of the input (ReLU, max pooling), where a
Euclidean match by L-BFGS sticks; and there it seldom comes to a match that proves itself.

Differs from the paper: the inputs are polished without the prior (`attack.algorithms.descending`); elements of the
gradient that are not known take no part; labels that were not told are read for one example only.

Reference: Geiping, Bauermeister, Dröge, Moeller, NeurIPS 2020, arXiv 2003.14053.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.algorithms.descending import descend_and_polish
from attack.engine.context import Context
from attack.engine.labels import NoLabel, read_label
from attack.engine.match import Match
from attack.engine.priors import total_variation
from attack.engine.target import Target

ITERATIONS = 4000
"""The paper takes 4800 to 24000; 4000 are those of the figures that are measured here."""
RATE = 0.1
"""In units of the input range: the released code's, for pictures from 0 to 1."""


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

    def cost(inputs: Tensor) -> Tensor:
        return misdirection(match, inputs, labels) + variation / (high - low) * total_variation(inputs)

    return descend_and_polish(
        target,
        context,
        cost,
        method="inverting-gradients",
        labels=labels,
        starts=1,
        iterations=iterations,
        rate=RATE,
        signed=True,
    )


def misdirection(match: Match, inputs: Tensor, labels: Tensor) -> Tensor:
    """1 - cosine between the gradients of batches and the observed one, shape (searches,)."""
    own = match.gradients(inputs, labels.expand(len(inputs), -1))
    return 1 - torch.nn.functional.cosine_similarity(own, match.observed[None], dim=1)
