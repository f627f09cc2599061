"""Nets of two blocks of convolution, ReLU and max pooling, batch of one, exactly: the pooling patterns are found.

The last layer gives the pooled features and their error; which positions passed the poolings is searched for
(`attack.engine.patterns`), from a rough picture on (`attack.engine.rough`). With the patterns known all is linear, and
more is known than wanted: the gradient of the upper convolution then has no misfit but rounding, and so proves the
pattern.

Ours; that patterns make the rest linear is used by Zhu and Blaschko, R-GAP, ICLR 2021, arXiv 2010.07733.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from attack.algorithms.base import Answer
from attack.algorithms.rgap import check_rank_one, rgap
from attack.engine.chain import NoChain, layers
from attack.engine.context import Context, Progress
from attack.engine.film import Film
from attack.engine.labels import NoLabel, read_label
from attack.engine.patterns import Patterns
from attack.engine.picture import Picture
from attack.engine.pooling import read
from attack.engine.rough import rough_picture
from attack.engine.target import Target

STARTS = 5
ROUNDS, PATIENCE = 10, 2
"""Annealings from one start; and of these, as many in a row as need not halve how far the features are from proven.
Most pictures take 2 to 4 annealings; a start that is stuck stays so."""
PICTURES = 3
"""Starts that come to exact features, and to no picture behind them, after which another is not tried."""
AFAR = 1e-2
"""How far from the answer it is solved for again, in units of the input range, or of the features' size."""
PROVEN = 10.0
"""How far the upper gradient's median channel may be off, in units of its rounding, for the features to be exact."""


def patterns(target: Target, context: Context) -> Answer:
    """The input and label of a batch of one; of a net without max pooling, by `rgap`."""
    if not any(isinstance(layer, nn.MaxPool2d) for layer in layers(target.model, target.input_shape)):
        return rgap(target, context)
    try:
        label = read_label(target)
        net = read(target)
        check_rank_one(target)
    except (NoLabel, NoChain) as error:
        return Answer(inputs=None, labels=None, reason=str(error))
    film, rounds, restart = Film(), 0, 0
    best, least, proven = None, float("inf"), 0
    for restart in range(STARTS):
        if restart and (not context.seconds_left or proven == PICTURES):
            break
        state = Patterns(net, rough_picture(net, target.input_range, context), target.input_range, context)
        nearest, idle = float("inf"), 0
        for _ in range(ROUNDS):
            if not context.seconds_left or idle == PATIENCE:
                break
            state.anneal()
            rounds += 1
            found, off = _settled(target, state, label, context)
            idle = 0 if off < nearest / 2 else idle + 1
            nearest = min(nearest, off)
            residual = target.residual(found, label)
            film.take(rounds, residual, found)
            if residual < least:
                best, least = found, residual
            context.progress(
                Progress(method="patterns", evaluations=rounds, residual=least, seconds_left=context.seconds_left)
            )
            if residual <= target.tolerance:
                return Answer(
                    inputs=found,
                    labels=label,
                    film=film,
                    again=functools.partial(map, functools.partial(_again, found=found, context=context)),
                    evaluations=rounds,
                    restarts=restart,
                )
            if off <= PROVEN:  # exact features, and no picture to them: other annealings come to the same features
                proven, idle = proven + 1, PATIENCE
    reason = f"{rounds} annealings did not settle the patterns" if context.seconds_left else "the deadline passed"
    return Answer(inputs=best, labels=label, film=film, evaluations=rounds, restarts=restart, reason=reason)


def _settled(target: Target, state: Patterns, label: Tensor, context: Context) -> tuple[Tensor, float]:
    """The picture at which the search is, or the exact one where the features between come out proven; and how far they
    are from it, in units of their gradient's rounding."""
    before = state.between, state.likely
    off = state.settle()
    if off > PROVEN:
        state.between, state.likely = before
        return state.inputs[None], off
    state.take_patterns()  # as certain: what is left of doubt would be error
    off = state.settle(sweep=False)
    picture = _picture(state, target.input_range, context)

    def explains(inputs: Tensor) -> bool:
        return target.residual(inputs[None], label) <= target.tolerance

    state.inputs = picture.search(state.inputs, lambda found: explains(picture.polish(found, found)))
    polished = picture.polish(state.inputs, state.inputs)
    return (polished if explains(polished) else state.inputs)[None], off


def _again(moved: Target, *, found: Tensor, context: Context) -> Tensor:
    """The picture of a slightly moved gradient: its patterns are those of the one before. Raises: NoChain."""
    try:
        net = read(moved)
    except NoLabel as error:
        raise NoChain(str(error)) from error
    state = Patterns(net, found[0], moved.input_range, context)
    state.take_patterns()
    # From afar: what the solves cannot reach is then part of the error, as it is of the answer's own.
    away = context.normal(tuple(state.between.shape)).to(found)
    state.between = state.between + AFAR * state.between.square().mean().sqrt() * away * (state.between > 0)
    state.settle(sweep=False)
    draws = torch.randn(found[0].shape, generator=context.generator, dtype=torch.float64).to(found)
    start = found[0] + AFAR * (moved.input_range[1] - moved.input_range[0]) * draws
    return _picture(state, moved.input_range, context).polish(found[0], start)[None]


def _picture(state: Patterns, input_range: tuple[float, float], context: Context) -> Picture:
    net = state.net
    error = state.error_below()
    return Picture(net.lower, state.between, error, net.lower_gradient, net.lower_noise, input_range, context)
