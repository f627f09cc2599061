"""How sure the eavesdropper may be of an answer, without the truth.

An answer is off for two reasons: what the observation's own error leaves open, and how far the method stopped from
the best match. Where the model is a chain of layers, the walk back (`attack.engine.walk`) tells both, from its belief
on the input. Elsewhere the match is linearized at the answer, and conjugate gradients tell what that leaves open, if
they converge.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attack.engine.chain import NoChain, trace
from attack.engine.context import Context
from attack.engine.layers import check
from attack.engine.linearized import Linearized, conjugate_gradients
from attack.engine.target import Target
from attack.engine.walk import Belief, OutOfTime, walk_back

SAFETY = 3.0
"""Errors that layers share are taken as independent, and layers as linear. On 60 LeNets, fresh and after three steps,
the true error was 0.08 to 2.4 times the variance of the walk back's belief."""
DRAWS = 4
PROBES = 3
MAX_ITERATIONS = 300
"""Of conjugate gradients, for each probe: some 3 s of CPU time for a LeNet."""
SOLVED = 1e-2
"""Relative residual at which conjugate gradients count as converged: far finer than a prediction within a factor of
ten."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What may be said of an answer's mean squared error, in squared model input units."""

    predicted_mse: float | None
    """What to expect; None where it cannot be had."""
    left_open: float
    """Lower bound of the variance that the equations leave: where it is large, other inputs match as well."""


def certify(
    target: Target,
    inputs: Tensor,
    labels: Tensor,
    belief: Belief | None,
    context: Context,
    *,
    variance: float | None = None,
) -> Certificate:
    """The certificate of an answer.

    Args:
        inputs: float64, shape (batch, *input_shape).
        labels: int64, shape (batch,).
        belief: the method's own, where it has one.
        variance: the method's own, of all elements together, where it has one.
    """
    if variance is not None:
        # The draws that it comes from hold the observation's error alone: an answer that is further off is widened.
        widened = variance * max(1.0, target.residual(inputs, labels) / target.expected_residual) ** 2
        return Certificate(predicted_mse=SAFETY * (_rounding(inputs) + widened), left_open=variance)
    if belief is None and len(inputs) == 1:
        try:
            links = trace(target.model, target.input_shape)
            check(links)
            belief = walk_back(target, links, context)
        except (NoChain, OutOfTime):
            pass
    if belief is None:
        return _by_conjugate_gradients(target, inputs, labels, context)
    predicted = SAFETY * _by_belief(target, inputs, labels, belief)
    return Certificate(predicted_mse=predicted, left_open=belief.variance)


def _by_belief(target: Target, inputs: Tensor, labels: Tensor, belief: Belief) -> float:
    """The belief's variance, and the answer's distance from its mean. Where the mean matches the gradient worse than
    draws from the belief do, the belief is too narrow, and is widened as much."""
    own = target.residual(belief.mean.view_as(inputs), labels)
    drawn = sum(target.residual(draw.view_as(inputs), labels) for draw in belief.samples[:DRAWS]) / DRAWS
    distance = float((inputs.flatten() - belief.mean).square().mean())
    return _rounding(inputs) + belief.variance * max(1.0, own / drawn) ** 2 + distance


def _rounding(inputs: Tensor) -> float:
    """An answer is kept as float32."""
    return float((inputs.float() - inputs).square().mean())


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
    return Certificate(predicted_mse=SAFETY * (variance + distance) if solved else None, left_open=variance)


def _solve(match: Linearized, right: Tensor, context: Context) -> tuple[Tensor, bool]:
    return conjugate_gradients(match.multiply, right, context, goal=SOLVED, iterations=MAX_ITERATIONS)
