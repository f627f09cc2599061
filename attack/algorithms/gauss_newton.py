"""Batches of convolutional nets: exact from the last layer down as far as that goes, then Gauss-Newton on the pixels.

The last layer gives every example's features and label (`attack.engine.features`). From there the descent
(`attack.engine.cut`) solves layer by layer for the inputs of each, while the equations determine them; what is known
where it ends, and the gradients of the layers below, are equations in the pixels (`attack.engine.gauss_newton`). A
prior on pictures stands beside them, and decides where they run out: an answer in which it had to says so. Batch size
and labels need not be told; a batch of one is `rgap`'s.

Differs from the papers: R-GAP walks back a batch of one. Searches such as DLG and Inverting Gradients see one hard
problem, and crawl; here all but the pixels' own layers is solved exactly, and what remains is nearly linear.

Reference: Zhu and Blaschko, R-GAP, ICLR 2021, arXiv 2010.07733; Bakushinskii, The problem of the convergence of the
iteratively regularized Gauss-Newton method, 1992.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.algorithms.joint import joint
from attack.algorithms.rgap import rgap
from attack.engine.chain import NoChain, trace
from attack.engine.context import Context, Progress
from attack.engine.cut import count, descend, equations
from attack.engine.features import NoFeatures, count_examples, read_batch
from attack.engine.film import Film
from attack.engine.gauss_newton import Settings, minimize, spread
from attack.engine.prior import Gaussian, Pictures, Prior
from attack.engine.target import Target

DETERMINED = Settings(steps=16, iterations=150)
"""Where the equations may suffice: LeNet with 48 channels takes 8 steps at batch 8."""
SHORT = Settings(steps=20, iterations=300)
"""Where the equations run out: exactness is of no use there, a slow descent is."""
WHOLE = 3
"""Descents on the whole gradient, one from the end of the other: one is enough for most batches; a second and a third
go on where conjugate gradients were too slow for its last steps."""
LOOSE = 1e6
"""s from which on what is left open is drawn there: with less, conjugate gradients do not converge."""
LAGGING = 10.0
"""What conjugate gradients left undone, in units of the last step's mean square."""
MATCHED = 0.3
"""Part of the tolerance of the whole match at which Gauss-Newton may end."""
OPEN = 1e-3
"""Share of a pixel's variance before anything is seen that may be left open in an answer that counts as determined."""


def gauss_newton(target: Target, context: Context) -> Answer:
    """Inputs and labels of the whole batch."""
    if target.batch_size == 1 and not target.batch_size_assumed:
        return _one_example(target, context)
    try:
        if count_examples(target) == 1 and target.batch_size_assumed:
            return _one_example(target, context)
        links = trace(target.model, target.input_shape)
        features = read_batch(target, context)
        counted = count(links, len(features.labels))
        cut = descend(target, links, features, context)
    except (NoFeatures, NoChain) as error:
        return Answer(inputs=None, labels=None, reason=str(error))

    film, labels = Film(), features.labels

    def watch(inputs: Tensor) -> None:
        residual = target.residual(inputs, labels)
        film.take(len(film.history), residual, inputs)
        context.progress(
            Progress(
                method="gauss-newton",
                evaluations=len(film.history),
                residual=residual,
                seconds_left=context.seconds_left,
            )
        )

    def done(inputs: Tensor) -> bool:
        return target.residual(inputs, labels) <= target.tolerance / 2

    short, settings = counted.equations < counted.unknowns, DETERMINED
    if short:
        floor = max(1.0, (MATCHED * target.tolerance / target.expected_residual) ** 2)
        settings = dataclasses.replace(SHORT, floor=floor)
    prior = prior_of(target)
    low, high = target.input_range
    middle = torch.full((len(labels), *target.input_shape), (low + high) / 2, dtype=torch.float64, device=target.device)
    watch(middle)
    rows = equations(target, cut)
    solution = minimize(rows, middle, prior, context, settings, done=done, watch=watch)
    for _ in range(WHOLE):  # what was solved above the cut was not exact enough
        if done(solution.inputs) or not context.seconds_left:
            break
        rows = _whole(target, labels)
        solution = minimize(rows, solution.inputs, prior, context, settings, done=done, watch=watch)
    left = spread(
        rows,
        solution,
        prior,
        context,
        iterations=2 * settings.iterations,
        inflation=LOOSE if short else 1.0,
    )
    filled = short or left.variance > OPEN * (high - low) ** 2 / 12
    answer = Answer(
        inputs=solution.inputs,
        labels=labels,
        film=film,
        left_open=left.variance + LAGGING * solution.moved,
        filled=filled,
        batch_size_read=target.batch_size_assumed,
        evaluations=len(film.history),
        reason=counted.filled(left.open_directions) if filled else solution.reason,
    )
    return joint(target, answer, prior, context, watch) if filled and target.again else answer


def _one_example(target: Target, context: Context) -> Answer:
    answer = rgap(target, context)
    low, high = target.input_range
    if not target.again or answer.belief is None or answer.belief.variance <= OPEN * (high - low) ** 2 / 12:
        return answer
    return joint(target, answer, prior_of(target), context)


def prior_of(target: Target) -> Prior:
    """What is assumed of inputs of the target's shape."""
    low, high = target.input_range
    if len(target.input_shape) == 3 and target.input_shape[0] in (1, 3):
        return Pictures(input_range=target.input_range)
    return Gaussian(mean=(low + high) / 2, variance=(high - low) ** 2 / 12)


def _whole(target: Target, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The match of the whole gradient, in units of its error."""
    weights = target.noise.reciprocal()
    return lambda x: target.mismatch(x, labels, differentiable=True) * weights
