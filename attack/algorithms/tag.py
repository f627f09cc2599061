"""TAG: dummy embeddings and labels are changed until their gradient is the observed one, then read as tokens.

    min over z of sum_l ||g_l(z) - observed_l||^2 + alpha_l ||g_l(z) - observed_l||_1

The first term alone is Deep Leakage from Gradients, whose section on masked language models this follows; the second
weighs what is small, and the first layers most.

References: Deng et al., TAG: Gradient Attack on Transformer-based Language Models, Findings of EMNLP 2021, arXiv
2103.06819, section 3; Zhu, Liu, Han, NeurIPS 2019, arXiv 1906.08935, section 4.2.
Differs from the papers: the rate falls in steps; labels that the last layer's gradient says are not searched
(`attack.engine.dummy_labels`). How alpha falls from layer to layer, the paper leaves open: in a line, here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.algorithms.reading import STRIDE, Reading
from attack.engine.anatomy import NoTransformer
from attack.engine.context import Context
from attack.engine.descent import descend
from attack.engine.dummy_text import DummyText, NoText
from attack.engine.labels import NoLabel
from attack.engine.target import Target

ALPHA = 0.1
"""Of the first parameter."""
ITERATIONS = 1000
RATE = 0.1
"""Of Adam, in units of the embeddings' root mean square."""


def tag(target: Target, context: Context) -> Answer:
    """Tokens of the batch."""
    try:
        dummy = DummyText(target, context.generator)
    except (NoText, NoTransformer, NoLabel) as error:
        return Answer(inputs=None, labels=None, reason=str(error))
    weights = torch.linspace(ALPHA, 0, len(dummy.observed) + 1).tolist()

    def cost(zs: Tensor) -> Tensor:
        return torch.stack([distance(dummy.gradients(z), dummy.observed, weights) for z in zs])

    start = dummy.start()
    reading = Reading(target, context, dummy, method="tag")
    reading.look(0, start, 0)
    box = (-math.inf, math.inf)
    with torch.enable_grad():
        for iteration, z, _ in descend(
            start[None], cost, context, iterations=ITERATIONS, rate=RATE, box=box, signed=False
        ):
            if iteration % STRIDE == 0 and reading.look(iteration, z[0], iteration):
                break
    return reading.answer()


def distance(gradients: list[Tensor], observed: list[Tensor], weights: list[float]) -> Tensor:
    """Sum over parameters, each with its weight for the absolute part."""
    terms = []
    for gradient, seen, weight in zip(gradients, observed, weights, strict=False):
        off = gradient - seen
        terms.append(off.square().sum() + weight * off.abs().sum())
    return torch.stack(terms).sum()
