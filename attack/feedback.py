"""What error feedback gives away: a sender that keeps what it did not send says more of one gradient at every step.

While the weights stay and the batch comes again, all steps have one gradient g, and what is coded at step t is known
but for g (S: the sum of all that was sent before):

    sign       p = (t + 1) g - S                  its sign says on which side of S / (t + 1) g lies: cells close in on g
    topk, dgc  p = c g, c counted since it was    what is sent is c g, and nothing else is larger than the least of that
    powersgd   M = (t + 1) g - S                  P' M is sent, exactly: g is known along all the P's so far

In: an observation, and those of other steps beside it. Out: an observation of one gradient, with narrower bounds, and
matrices turned so that what is known of them are whole rows. Nothing is concluded from before a job's first step, whose
memory is not known, nor over noise, nor once the weights have moved. Knows no model.

Reference: error feedback, Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from attack.defense import PublicDefense
from attack.observation import Basis, Known, Observation, Shapes

STILL = 1e-4
"""Movement of the weights, relative to their size, up to which they have stayed."""
FOLLOWS = 30.0
"""Movement of the gradient, relative to its size in units of the weights': LeNet's is 3 to 10."""
ROUNDING = 2.0**-21
"""Error of the sender's sums in float32, a step, relative to what is summed."""
FACTORED = 2.0**-19
"""Error of a matrix's product with P's columns, a step, in units of its longest column: 2^-22 to 2^-20 were seen on
LeNets and MLPs of up to 1000 units."""
BARELY = 2.0**-14
"""Error of a matrix of as many directions as were sent, none to spare, in the same units. Where the sender's first Q
all but misses one of them, P is off: by 2^-23 usually, by 2^-18 once in 50 matrices, by 2^-14 once in a thousand."""
SEEN = 1e-3
"""Part of a direction that the steps must have sent, in units of the best seen one's, to count as known."""
NO_RANK = 1e-5
"""Singular value, relative to the first, below which it is rounding."""
MOST_ROWS = 2048
"""Of a matrix that is given in a basis, which has as many numbers as that squared: 32 MiB."""


def settle(observation: Observation, *, ranks: Mapping[int, int] | None = None, turn: bool = True) -> Observation:
    """One gradient by all that its steps say; the observation itself where error feedback links none.

    Args:
        observation: in the parameters' shapes.
        ranks: by the parameter's place, the highest rank that its gradient can have, where that can be told.
        turn: whether what is known along some directions alone is given in a basis; else it is not known.
    """
    defense = PublicDefense.read(observation.defense or "")
    if not (defense.keeps or defense.rank) or defense.noise or defense.noise_of_sum:
        return observation
    steps = list(_linked(observation))
    if not steps or (defense.signs and len(steps) == 1):
        return observation
    sent = [step.gradient.double() for step in steps]
    bases: tuple[Basis, ...] = ()
    if defense.rank:
        gradient, bound, bases = _projected(steps, sent, defense.rank, ranks or {}, MOST_ROWS if turn else 0)
    elif defense.signs:
        gradient, bound = _between(sent, observation.shapes)
    else:
        gradient, bound = _accumulated(sent, observation.shapes, defense.momentum)
    known = torch.where(bound == 0, int(Known.RAW), int(Known.CODED)).to(torch.uint8)
    first, numbers = steps[0], {step.step for step in steps}
    return dataclasses.replace(
        first,
        gradient=gradient,
        known=known,
        bound=bound + drift(gradient, steps),
        bases=bases,
        joined=tuple(sorted(numbers - {first.step})),
        again=tuple(step for step in (observation, *observation.again) if step.step not in numbers),
    )


def _linked(observation: Observation) -> Iterator[Observation]:
    """The steps from a job's first on, none left out, all seen whole and taken at the same weights."""
    steps = sorted((observation, *observation.again), key=lambda step: step.step)
    for number, step in enumerate(steps):
        same = step.step == number and step.complete and step.defense == observation.defense
        if not same or step.weights is None or movement([steps[0], step]) > STILL:
            return
        yield dataclasses.replace(step, again=(), shapes=observation.shapes)


def movement(steps: Sequence[Observation]) -> float:
    """Largest distance of the weights from the first step's, relative to their size."""
    weights = torch.stack([step.weights for step in steps if step.weights is not None]).double()
    size = float(torch.linalg.vector_norm(weights[0]))
    return float(torch.linalg.vector_norm(weights - weights[0], dim=1).max()) / size if size else 0.0


def drift(gradient: Tensor, steps: Sequence[Observation]) -> Tensor:
    """How far the gradient may have come from the first step's while the weights moved; 0 where they did not.

    Args:
        gradient: what they say of it together, flat.
        steps: in the parameters' shapes.

    Returns: float64, shape (parameters,): the same for all elements of a parameter.
    """
    sizes = torch.zeros_like(gradient, dtype=torch.float64)
    for where in _slices(steps[0].shapes):
        sizes[where] = gradient[where].double().square().mean().sqrt()
    return FOLLOWS * movement(steps) * sizes


def _slices(shapes: Shapes) -> Iterator[slice]:
    ends = itertools.accumulate((math.prod(shape) for shape in shapes), initial=0)
    return (slice(begin, end) for begin, end in itertools.pairwise(ends))


def _between(sent: Sequence[Tensor], shapes: Shapes) -> tuple[Tensor, Tensor]:
    """Signs: the middle of each element's cell, and half its width.

    An element whose sign never changed is limited on one side alone. Of those of a tensor the mean magnitude of p is
    known, as the mean over all is what was sent; an exponential law with that mean is what they count with.
    """
    total = torch.zeros_like(sent[0])
    lower, upper = torch.full_like(total, -math.inf), torch.full_like(total, math.inf)
    before = total
    for step, values in enumerate(sent):
        border = total / (step + 1)
        lower = torch.where(values > 0, torch.maximum(lower, border), lower)
        upper = torch.where(values > 0, upper, torch.minimum(upper, border))
        before, total = total, total + values
    slack = ROUNDING * torch.stack([values.abs() for values in sent]).sum(0)
    middle, half = (lower + upper) / 2, (upper - lower) / 2 + slack
    last, count = sent[-1], len(sent)
    for where in _slices(shapes):
        open_ = ~half[where].isfinite()
        if not open_.any() or open_.all():
            continue
        size, unit = open_.numel(), float(last[where].abs().max())
        closed = (count * middle[where] - before[where])[~open_].abs().sum()
        mean = ((size * unit - closed) / open_.sum()).clamp(min=0)
        guess = (before[where] + last[where].sign() * mean) / count
        middle[where] = torch.where(open_, guess, middle[where])
        half[where] = torch.where(open_, math.sqrt(3) * mean / count + slack[where], half[where])
    unlimited = ~middle.isfinite() | (half < 0)  # below 0: it was not one gradient
    return torch.where(unlimited, 0.0, middle), torch.where(unlimited, math.inf, half)


def _accumulated(sent: Sequence[Tensor], shapes: Shapes, momentum: float) -> tuple[Tensor, Tensor]:
    """The largest elements: the middle of each element's cell, and half its width."""
    lower, upper = torch.full_like(sent[0], -math.inf), torch.full_like(sent[0], math.inf)
    velocity, factor, since = (torch.zeros_like(sent[0]) for _ in range(3))
    for values in sent:
        velocity = momentum * velocity + 1
        factor, since = factor + velocity, since + 1
        there = values != 0
        limit = torch.full_like(values, math.inf)
        for where in _slices(shapes):
            if there[where].any():
                limit[where] = values[where][there[where]].abs().min()
        reach = torch.where(there, (since - 1) * ROUNDING * values.abs(), limit)
        lower = torch.maximum(lower, (values - reach) / factor)
        upper = torch.minimum(upper, (values + reach) / factor)
        velocity, factor, since = (torch.where(there, 0.0, each) for each in (velocity, factor, since))
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    unlimited = ~(half >= 0) | ~half.isfinite()  # nothing of its tensor was sent, or it was not one gradient
    return torch.where(unlimited, 0.0, middle), torch.where(unlimited, math.inf, half)


def _projected(
    steps: Sequence[Observation], sent: Sequence[Tensor], rank: int, ranks: Mapping[int, int], most_rows: int
) -> tuple[Tensor, Tensor, tuple[Basis, ...]]:
    """PowerSGD: the gradient in each matrix's basis, where one is given, with bounds; and the bases. A matrix of more
    than `most_rows` is given in none, and not known unless it was sent whole."""
    gradient, bases = sent[0].clone(), []
    limits = [step.bound if step.bound is not None else torch.zeros_like(step.gradient) for step in steps]
    bound = limits[0].double()
    for place, (where, shape) in enumerate(zip(_slices(steps[0].shapes), steps[0].shapes, strict=True)):
        if bound[where].isfinite().all():  # no matrix: sent as it is
            continue
        products = [values[where].view(shape[0], -1) for values in sent]
        longest = torch.linalg.vector_norm(products[0], dim=0).max()
        left, sizes, rest = _directions(products[0])
        if len(sizes) < min(rank, *products[0].shape):  # what has no higher rank was sent whole
            bound[where] = FACTORED * longest + rest
            continue
        if len(sizes) == ranks.get(place):
            bound[where] = BARELY * longest
            continue
        if shape[0] > most_rows:
            continue
        total, rows, values = torch.zeros_like(products[0]), [], []
        for count, product in enumerate(products, start=1):
            total = total + product
            left, *_ = _directions(product)
            rows.append(left.T)
            values.append(left.T @ total / count)
        error = FACTORED * len(sent) * longest
        whole, sizes, across = torch.linalg.svd(torch.cat(rows), full_matrices=True)
        seen = int((sizes > SEEN * sizes[0]).sum())
        turned = torch.zeros_like(products[0])
        turned[:seen] = whole.T[:seen] @ torch.cat(values) / sizes[:seen, None]
        if seen == len(across):  # along all of them
            gradient[where] = (across.T @ turned).flatten()
            bound[where] = error * sizes.reciprocal().square().sum().sqrt()
            continue
        limit = torch.full_like(turned, math.inf)
        limit[:seen] = error / sizes[:seen, None]
        gradient[where], bound[where] = turned.flatten(), limit.flatten()
        bases.append(Basis(parameter=place, rows=across))
    return gradient, bound, tuple(bases)


def _directions(product: Tensor) -> tuple[Tensor, Tensor, float]:
    """Orthonormal columns that a product of thin factors spans, their singular values, and the first that counts as
    rounding."""
    left, sizes, _ = torch.linalg.svd(product, full_matrices=False)
    rank = int((sizes > NO_RANK * sizes[0]).sum()) if sizes.numel() else 0
    return left[:, :rank], sizes[:rank], float(sizes[rank]) if rank < len(sizes) else 0.0
