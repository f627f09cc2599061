"""LAMP: descent on dummy embeddings, alternated with moves that no descent makes: tokens swapped, moved, rotated.

    min over z of mean_l (1 - cos(g_l(z), observed_l)) + BALANCE (mean norm of embeddings / the vocabulary's - 1)^2

A gradient says much of which tokens there are and little of where, so that descent ends with the right words in a wrong
order. After every descent, some random reorderings are tried, and the best is kept where it is better; after some, each
place tries each token.

Reference: Balunović, Dimitrov, Jovanović, Vechev, LAMP: Extracting Text from Gradients with Language Model Priors,
NeurIPS 2022, arXiv 2202.08827, section 4 and algorithm 1.
Differs from the paper: it has no language model beside the gradient match, which would have to be downloaded; where the
word embeddings are trained, their gradient says which tokens occur (`attack.engine.vocabulary`), and no others are
read; the rate falls within each descent.
"""

from __future__ import annotations

import itertools
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

STARTS = 20
"""Drawn, of which the best is taken."""
ROUNDS, ITERATIONS, MOVES = 12, 75, 30
"""Descents, iterations of each, and reorderings tried behind it."""
SWEEP, SWEPT = 4, 64
"""Descents, behind the last of which each place tries each token that occurs, where these are so few."""
RATE = 0.1
"""Of Adam at first, in units of the embeddings' root mean square."""
BALANCE = 0.1


def lamp(target: Target, context: Context) -> Answer:
    """Tokens of the batch."""
    try:
        dummy = DummyText(target, context.generator, narrowed=True)
    except (NoText, NoTransformer, NoLabel) as error:
        return Answer(inputs=None, labels=None, reason=str(error))
    norm = torch.linalg.vector_norm(dummy.embeddings, dim=1).mean()

    def cost(z: Tensor, *, differentiable: bool = True) -> Tensor:
        gradients = dummy.gradients(z, differentiable=differentiable)
        off = torch.stack([1 - cosine(*pair) for pair in zip(gradients, dummy.observed, strict=True)]).mean()
        return off + BALANCE * (torch.linalg.vector_norm(dummy.words(z), dim=2).mean() / norm - 1).square()

    def best(candidates: list[Tensor]) -> Tensor:
        costs: list[float] = []
        for z in candidates:
            if costs and not context.seconds_left:
                break
            costs.append(float(cost(z, differentiable=False)))
        return candidates[min(range(len(costs)), key=costs.__getitem__)]

    reading = Reading(target, context, dummy, method="lamp")
    box = (-math.inf, math.inf)
    with torch.enable_grad():
        z, evaluations = best([dummy.start() for _ in range(STARTS)]), STARTS
        done = reading.look(0, z, evaluations)
        for descent in range(ROUNDS):
            for iteration, zs, _ in descend(
                z[None],
                lambda zs: torch.stack([cost(z) for z in zs]),
                context,
                iterations=ITERATIONS,
                rate=RATE,
                box=box,
                signed=False,
            ):
                z = zs[0].detach()
                evaluations += 1
                if iteration % STRIDE == 0 and (done := reading.look(descent * ITERATIONS + iteration, z, evaluations)):
                    break
            if done or not context.seconds_left:
                break
            z = best([z, *(moved(dummy, z, context.generator) for _ in range(MOVES))])
            evaluations += 1 + MOVES
            if dummy.narrowed and len(dummy.readable) <= SWEPT and descent % SWEEP == SWEEP - 1:
                z = dummy.snapped(z)
                for sentence, place in itertools.product(*map(range, dummy.shape[:2])):
                    z = best([z, *dummy.variants(z, sentence, place)])
                    evaluations += 1 + len(dummy.readable)
                if reading.look((descent + 1) * ITERATIONS, z, evaluations):
                    break
    return reading.answer()


def moved(dummy: DummyText, z: Tensor, generator: torch.Generator) -> Tensor:
    """z, with two tokens of a sentence swapped, a piece of it moved, or its beginning behind its end."""
    batch, length, _ = dummy.shape

    def draw(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    order = list(range(length))
    first, last = sorted((draw(length), draw(length)))
    kind = draw(4)
    if kind == 0:
        order[first], order[last] = order[last], order[first]
    elif kind == 1:
        order = order[first:] + order[:first]
    else:
        # A piece, or a single token.
        end = last + 1 if kind == 2 else first + 1
        piece, rest = order[first:end], order[:first] + order[end:]
        place = draw(len(rest) + 1)
        order = rest[:place] + piece + rest[place:]
    return dummy.reordered(z, draw(batch), torch.tensor(order, device=z.device))


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of the angle between two tensors."""
    sizes = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)
    return (one * other).sum() / sizes.clamp(min=torch.finfo(one.dtype).tiny)
