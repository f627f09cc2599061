"""How sure the eavesdropper may be of an answer, without the truth.

The attack is tried on itself. For an input near the answer, which is known because it was drawn here, the gradient is
computed in float32 as the rank did, with the holes and within the bounds of what was observed; the method solves for it
again, and how far off it comes is an error of the very kind that the answer has (a parametric bootstrap; Efron and
Tibshirani 1993, An Introduction to the Bootstrap, chapter 6). It holds all that rounding does, correlated as it is.

A method that is a search cannot be tried again for little. Of one example, the closed form is tried in its place, and
the distance to its answer added. Elsewhere the match is linearized at the answer, and conjugate gradients tell what the
noise leaves open, if they converge.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator

import scipy.stats
import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.algorithms.rgap import rgap
from attack.engine.chain import NoChain
from attack.engine.context import Context
from attack.engine.features import NoFeatures
from attack.engine.linearized import Linearized, conjugate_gradients
from attack.engine.target import Target
from attack.engine.walk import OutOfTime

CONFIDENCE = 0.998
"""Of the true error being below `predicted_mse`, as far as the replays tell: two in a thousand are left for luck, the
rest of the promised one in a hundred for what replays do not know."""
REPLAYS, MAX_REPLAYS = 10, 12
MARGIN = 1.1
"""Factor for what replays do not know: that errors of rounding are spread evenly within their bounds, and that the
rank's arithmetic is this machine's."""
REPLAYS_WITH_BELIEF = 2
"""Where a belief says which directions share the errors, replays need only say how large these are."""
ENOUGH = 6.0
"""Quantile, in units of the replays' mean, from which on no more replays are made."""
USUAL_FREEDOM = 8.0
"""Directions that share the errors: 3 to 30 on LeNets."""
SAFETY, FILLED_SAFETY = 3.0, 20.0
"""Factors of what a method says that its equations leave open, and of the same where a prior on pictures filled it: the
prior's own doubt of a picture is less than pictures differ from it."""
PROBES = 3
MAX_ITERATIONS = 300
"""Of conjugate gradients, for each probe: some 3 s of CPU time for a LeNet."""
SOLVED = 1e-2
"""Relative residual at which conjugate gradients count as converged: far finer than a prediction within a factor of
ten."""
NEARBY = 1e-6
"""Size of what is added to an answer for a replay, in units of the input range: enough that nothing rounds alike."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What may be said of an answer's mean squared error, in squared model input units."""

    predicted_mse: float | None
    """What it is below, but for two cases in a thousand; None where that cannot be had."""
    left_open: float
    """Lower bound of the variance that the equations leave: where it is large, other inputs match as well."""


def certify(target: Target, answer: Answer, context: Context) -> Certificate:
    """The certificate of an answer that has inputs and labels."""
    assert answer.inputs is not None and answer.labels is not None
    inputs, labels = answer.inputs.detach(), answer.labels
    away = float((inputs.float().double() - inputs).square().mean())  # it is given as float32
    if answer.left_open is not None:
        predicted = (FILLED_SAFETY if answer.filled else SAFETY) * answer.left_open
        return Certificate(predicted_mse=predicted, left_open=answer.left_open)
    if answer.again is None and len(inputs) == 1:
        closed = rgap(target, context)
        if closed.inputs is not None and closed.labels is not None and closed.labels.equal(labels):
            answer = closed
            away += float((closed.inputs - inputs).square().mean())
    left_open = 0.0 if answer.belief is None else answer.belief.variance
    if answer.again is not None:
        try:
            predicted = away + _by_replays(target, answer, context)
            # further digits are chance
            return Certificate(predicted_mse=float(f"{predicted:.2e}"), left_open=left_open)
        except (NoChain, NoFeatures, OutOfTime):
            return Certificate(predicted_mse=None, left_open=left_open)
    return _by_conjugate_gradients(target, inputs, labels, context)


def _by_replays(target: Target, answer: Answer, context: Context) -> float:
    """Mean squared error of the replays, up to the quantile of the next such number.

    With f the directions that share the errors (`_freedom`), the answer's squared error over the mean of n replays' is
    distributed about as F(f, n f). Where few directions share them that quantile is large, and more replays are made.
    An answer whose own gradient is off by more than the replays' are is not of their kind: its error is taken to be
    larger by as much.

    Raises: NoChain, NoFeatures, OutOfTime: what the method does not solve again once.
    """
    assert answer.again is not None and answer.labels is not None and answer.inputs is not None
    inputs, labels, belief = answer.inputs, answer.labels, answer.belief
    errors: list[Tensor] = []
    residuals: list[float] = []
    asked: deque[tuple[Tensor, Target]] = deque()

    def moved(upto: int) -> Iterator[Target]:
        for replay in range(len(errors), upto):
            truth = _truth(target, inputs, answer, replay, context)
            asked.append((truth, target.replay(truth, labels, generator=context.generator)))
            yield asked[-1][1]

    shared = math.inf if belief is None else _freedom(belief.samples - belief.mean)
    least = REPLAYS
    if belief is not None:
        numbers = range(REPLAYS_WITH_BELIEF, MAX_REPLAYS)
        least = next((number for number in numbers if _quantile(shared, number) <= ENOUGH), MAX_REPLAYS)
    quantile = math.inf
    while len(errors) < least or (quantile > ENOUGH and len(errors) < MAX_REPLAYS):
        try:
            for again in answer.again(moved(max(least, len(errors) + 1))):
                truth, near = asked.popleft()
                errors.append((again - truth).flatten())
                residuals.append(near.residual(again, labels))
        except OutOfTime:
            if errors:
                break
            raise
        quantile = _quantile(min(shared, _freedom(torch.stack(errors))), len(errors))
    off = target.residual(inputs, labels) / max(residuals)
    return MARGIN * quantile * float(torch.stack(errors).square().mean()) * max(1.0, off) ** 2


def _quantile(freedom: float, replays: int) -> float:
    """Of the next squared error, in units of the mean of those of the replays."""
    return float(scipy.stats.f.ppf(CONFIDENCE, freedom, freedom * replays))


def _truth(target: Target, inputs: Tensor, answer: Answer, replay: int, context: Context) -> Tensor:
    """An input near the answer, float64 but of float32 values, as the rank's are.

    What the equations leave open is zero in every answer: it shows only in an input drawn from all that fit.
    """
    low, high = target.input_range
    samples = None if answer.belief is None else answer.belief.samples
    near = inputs if samples is None else samples[replay % len(samples)].view_as(inputs)
    normal = torch.randn(inputs.shape, generator=context.generator, dtype=torch.float64).to(inputs)
    return (near + NEARBY * (high - low) * normal).float().double()


def _freedom(errors: Tensor) -> float:
    """Directions that share the errors, shape (errors, elements): 1 / mean of their squared cosines to each other.

    Of two errors the one cosine is small by chance where few directions share them, so what is usual counts as one
    more.
    """
    units = torch.nn.functional.normalize(errors)
    squared = float((units @ units.T).square().triu(diagonal=1).sum()) + 1 / USUAL_FREEDOM
    pairs = len(errors) * (len(errors) - 1) / 2
    return min(float(errors.shape[1]), (pairs + 1) / squared) if pairs else 1.0


def _by_conjugate_gradients(target: Target, inputs: Tensor, labels: Tensor, context: Context) -> Certificate:
    """With A = J'WJ + P of the match at the answer (`attack.engine.linearized`):

        variance = trace(A^-1) / elements, by random probes;   distance = the step to the best match, mean square

    Conjugate gradients come to v'A^-1 v from below, so that even an early end gives a lower bound.
    """
    match = Linearized(target, inputs, labels)
    step, solved = _solve(match, match.downhill, context)
    variances = []
    for _ in range(PROBES):
        probe = torch.randint(0, 2, inputs.shape, generator=context.generator).to(inputs) * 2 - 1
        solution, converged = _solve(match, probe, context)
        variances.append(float((probe * solution).mean()))
        solved = solved and converged
    variance, distance = sum(variances) / PROBES, float(step.square().mean())
    return Certificate(predicted_mse=3 * (variance + distance) if solved else None, left_open=variance)


def _solve(match: Linearized, right: Tensor, context: Context) -> tuple[Tensor, bool]:
    return conjugate_gradients(match.multiply, right, context, goal=SOLVED, iterations=MAX_ITERATIONS)
