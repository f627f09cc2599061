"""One batch that came at several steps: the equations of all of them together, on the same pixels.

Training on few examples, or for several epochs in the same order, brings a batch back when the weights have moved a
little. Each step is read as `gauss-newton` reads one, from its last layer down to a cut, and says the same of the
pixels by other weights. Where one step's equations run out, two or three may suffice; where they are rounded, each is
rounded anew. What is new in a step is as weak as its weights are near to the last one's, so that it takes a direct
solver (`attack.engine.direct`) to see it.

How exact a step's equations are, the attack finds out on itself: it reads the gradient that its first answer would have
had there, in float32, by the same way down. A step that has almost learned an example says little of it, and one with
large logits little of all: 1 - p is left with few digits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from attack.algorithms.base import Answer
from attack.engine.chain import Link, NoChain, trace
from attack.engine.context import Context
from attack.engine.cut import count, descend, equations_by_kind
from attack.engine.direct import MAX_UNKNOWNS, Direct, Parts, gram
from attack.engine.features import Features, NoFeatures, read_batch, reread_features
from attack.engine.gauss_newton import Settings, minimize, spread
from attack.engine.prior import Prior
from attack.engine.rejoin import OtherBatch, in_order_of
from attack.engine.target import Target

NEAR = Settings(steps=12)
"""With the first s from the misfit: the start is right only in what one step says."""
SETTLED = Settings(steps=4, inflation=1)
"""Then a factor is there, and a step costs little."""
DOUBT = 2.0
"""Errors of a step's equations count as so many times larger than they came out when they were tried."""
OPEN = 1e-3
"""Share of a pixel's variance before anything is seen that may be left open in an answer that counts as determined."""
LAGGING = 10.0
"""What the last step left undone, in units of its mean square."""


def joint(
    target: Target, first: Answer, prior: Prior, context: Context, watch: Callable[[Tensor], None] = lambda _: None
) -> Answer:
    """The answer to one step made better by the others; as it is where they do not help."""
    assert first.inputs is not None and first.labels is not None
    if first.inputs.numel() > MAX_UNKNOWNS:
        return _with(first, f"its steps were not solved together: at most {MAX_UNKNOWNS:,} unknowns are")
    inputs, labels = first.inputs.detach(), first.labels
    read = [(one, _equations(one, inputs, labels, context)) for one in (target, *target.again)]
    targets, seen = [one for one, parts in read if parts], [parts for _, parts in read if parts]
    if len(seen) < 2:
        return _with(first, "no other step could be read as the same batch")

    def rows(x: Tensor) -> Tensor:
        return torch.cat([part.flatten() for parts in seen for part in parts(x)])

    direct = Direct(functools.partial(gram, seen))
    near = minimize(rows, inputs, prior, context, NEAR, direct=direct, watch=watch)
    solution = minimize(rows, near.inputs, prior, context, SETTLED, direct=direct, watch=watch)
    if not all(one.explained_by(solution.inputs, labels) for one in targets):
        return _with(first, f"no inputs were found that explain steps {', '.join(str(one.step) for one in targets)}")
    left = spread(rows, solution, prior, context, iterations=0, direct=direct)
    links = trace(target.model, target.input_shape)
    counted = count(links, len(labels), steps=len(seen))
    low, high = target.input_range
    filled = counted.equations < counted.unknowns or left.variance > OPEN * (high - low) ** 2 / 12
    return dataclasses.replace(
        first,
        inputs=solution.inputs,
        belief=None,
        again=None,
        left_open=left.variance + LAGGING * solution.moved,
        filled=filled,
        evaluations=first.evaluations + (near.steps + solution.steps) * len(seen),
        reason=f"{len(seen)} steps: {counted.filled(left.open_directions)}" if filled else solution.reason,
    )


def _with(answer: Answer, remark: str) -> Answer:
    return dataclasses.replace(answer, reason=f"{answer.reason}; {remark}" if answer.reason else remark)


def _equations(target: Target, near: Tensor, labels: Tensor, context: Context) -> Parts | None:
    """What a step says of the pixels, in units of its errors; None where it shows no such batch.

    Args:
        near: inputs that are nearly right, shape (batch, *input_shape), and ...
        labels: ... their labels: the order of the batch.
    """
    near = near.float().double()  # as a rank has its inputs
    moved = target.replay(near, labels, generator=context.generator)
    try:
        links = trace(target.model, target.input_shape)
        expected = _features_of(links, near, labels)
        parts = _parts(target, links, expected, context)
        tried = _parts(moved, links, expected, context)
    except (NoChain, NoFeatures, OtherBatch):
        return None
    own, shared = (max(1.0, DOUBT * float(part.detach().square().mean().sqrt())) for part in tried(near))

    def rows(x: Tensor) -> tuple[Tensor, Tensor]:
        of_each, of_all = parts(x)
        return of_each / own, of_all / shared

    return rows


def _parts(target: Target, links: list[Link], expected: Features, context: Context) -> Parts:
    try:
        features = reread_features(target, expected)
    except NoFeatures:
        features = in_order_of(expected, read_batch(target, context))
    return equations_by_kind(target, descend(target, links, features, context))


def _features_of(links: list[Link], inputs: Tensor, labels: Tensor) -> Features:
    """What the last layer is given, and the loss's derivative by what it gives, of inputs that are known."""
    value = inputs
    with torch.no_grad():
        for link in links[:-1]:
            value = link(value)
        error = links[-1](value).softmax(-1) - functional.one_hot(labels, links[-1].outputs)
    return Features(values=value.flatten(1), labels=labels, error=error / len(labels))
