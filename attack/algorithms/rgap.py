"""Recursive gradient attack on privacy: the input of one example in closed form, from the last layer to the first.

Serves chains of linear and convolutional layers with activations that can be undone, ending in a linear layer with
cross-entropy. No start, no iteration, no luck.

Differs from the paper: it begins with the gradient of the last bias, which is the error at the logits itself, instead
of a scalar root-finding; least squares are weighted by how well each row is known, so that what a saturated unit or a
missing element does not say is left to other rows; and the answer comes with its variance. Errors count as independent
first (`attack.engine.mean_field`); where that does not come close to the observed gradient, their covariances are
carried along (`attack.engine.walk`).

Reference: Zhu and Blaschko, R-GAP, ICLR 2021, arXiv 2010.07733.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.engine.chain import Link, NoChain, trace
from attack.engine.context import Context, Progress
from attack.engine.film import MAX_FRAMES, Film
from attack.engine.labels import NoLabel, read_label
from attack.engine.layers import check
from attack.engine.linearized import Linearized, conjugate_gradients
from attack.engine.mean_field import QuickWalk
from attack.engine.target import Target
from attack.engine.walk import FullBelief, FullWalk, OutOfTime

RANK_ONE = 1e-3
"""Largest share of the last layer's gradient that may lie outside its first singular pair, for one example."""

QUICK_ENOUGH = 30
"""Residual of the quick walk, in units of what the truth would leave, up to which the full one is not worth its time:
1 to 6 on fresh LeNets, 20 after three steps of training."""
POLISH_ITERATIONS = 12
FILM_STRIDE = 4
"""Iterations between two frames of the film."""


def rgap(target: Target, context: Context) -> Answer:
    """The input and label of a batch of one."""
    try:
        label = read_label(target)
        links = trace(target.model, target.input_shape)
        check(links)
        check_rank_one(target)
        answer = _quickly(target, links, label, context) or _in_full(target, links, label, context)
    except (NoLabel, NoChain) as error:
        return Answer(inputs=None, labels=None, reason=str(error))
    except OutOfTime:
        return Answer(inputs=None, labels=None, reason="the deadline passed")
    residual = answer.film.history[-1][1]
    context.progress(Progress(method="rgap", evaluations=1, residual=residual, seconds_left=context.seconds_left))
    return answer


def _quickly(target: Target, links: list[Link], label: Tensor, context: Context) -> Answer | None:
    """By the quick walk, where that serves and leaves little more than the observation's own error. Raises:
    OutOfTime."""
    film, walk = Film(), QuickWalk(links)

    def watch(iteration: int, flat: Tensor) -> None:
        inputs = flat.view(1, *target.input_shape)
        with torch.enable_grad():
            film.take(iteration, target.residual(inputs, label), inputs)

    def again(moved: Iterable[Target]) -> Iterable[Tensor]:
        return walk.again(list(moved), context).view(-1, 1, *target.input_shape)

    try:
        belief = walk(target, context, watch)
    except NoChain:
        return None
    if not film.history[-1][1] <= min(QUICK_ENOUGH * target.expected_residual, target.tolerance / 1.1):
        return None
    return Answer(
        inputs=belief.mean.view(1, *target.input_shape),
        labels=label,
        film=film,
        belief=belief,
        again=again,
        evaluations=len(film.history),
    )


def _in_full(target: Target, links: list[Link], label: Tensor, context: Context) -> Answer:
    """By the walk with full covariances. Raises: NoChain, OutOfTime."""
    walk = FullWalk(links)
    belief = walk(target, context)
    inputs = _polish(target, belief, belief.mean, label, context)
    film = _film(target, belief, label)
    film.take(film.history[-1][0] + FILM_STRIDE, target.residual(inputs, label), inputs)
    return Answer(
        inputs=inputs,
        labels=label,
        film=film,
        belief=belief,
        again=lambda moved: (_polish(one, belief, walk.again(one, context), label, context) for one in moved),
        evaluations=len(film.history),
    )


def check_rank_one(target: Target) -> None:
    """One example's gradient of a linear layer is an outer product; the sum over several examples is not.

    Raises: NoChain.
    """
    weight, bias = target.tensors(target.gradient)[-2:]
    known = target.tensors(target.known)[-2]
    error = bias[:, None] * known
    features = (weight * error).sum(0) / error.square().sum(0).clamp(min=torch.finfo(error.dtype).tiny)
    rest = torch.linalg.vector_norm(weight - error * features) / torch.linalg.vector_norm(weight)
    if not rest <= RANK_ONE:
        raise NoChain(
            "the last layer's gradient is not an outer product: more than one example in the batch, or a gradient that "
            "was changed"
        )


def _polish(target: Target, belief: FullBelief, mean: Tensor, label: Tensor, context: Context) -> Tensor:
    """The walk's mean, moved by one step of Gauss-Newton on the whole match where that still shows more than the
    noise.

    The walk uses each equation once, from above; what it makes of an inexact error, the full match puts right. With the
    belief as preconditioner, a few iterations are enough: on trained LeNets they gain some ten decibels.
    """
    inputs = mean.view(1, *target.input_shape)
    residual = target.residual(inputs, label)
    if residual <= min(2 * target.expected_residual, target.tolerance / 1.1) or belief.factor is None:
        return inputs
    factor = belief.factor
    match = Linearized(target, inputs, label)
    step, _ = conjugate_gradients(
        match.multiply,
        match.downhill,
        context,
        goal=1e-3,
        iterations=POLISH_ITERATIONS,
        precondition=lambda r: torch.cholesky_solve(r.view(-1, 1), factor).view_as(r),
    )
    return inputs + step if target.residual(inputs + step, label) < residual else inputs


def _film(target: Target, belief: FullBelief, label: Tensor) -> Film:
    """How the picture emerges from the first layer's equations: conjugate gradients on them, for the eye only.

    The answer itself is solved directly; the iterates show which part of it is easy.
    """
    film = Film()
    low, high = target.input_range
    x = torch.full_like(belief.mean, (low + high) / 2)
    scale = 1 / belief.precision.diagonal()
    r = belief.weighted - belief.precision @ x
    p = scale * r
    for iteration in range((MAX_FRAMES - 1) * FILM_STRIDE):
        if iteration % FILM_STRIDE == 0:
            inputs = x.view(1, *target.input_shape)
            film.take(iteration, target.residual(inputs, label), inputs)
        q = belief.precision @ p
        before = r @ (scale * r)
        if not before > 0:  # solved to the last bit
            break
        step = before / (p @ q)
        x, r = x + step * p, r - step * q
        p = scale * r + (r @ (scale * r)) / before * p
    return film
