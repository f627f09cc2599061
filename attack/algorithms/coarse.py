"""One example from a gradient that its sender rounded or pruned, by what the code leaves: masks, cells, thresholds.

The last layer alone gives the features and the label (`attack.engine.last_layer`): hundreds of coarse rows say the
same few numbers. From there the pixels are found by Gauss-Newton (`attack.engine.gauss_newton`) on two kinds of
equations, each in units of its own error: the features' inputs, which are nearly linear in the pixels, and every other
element of the gradient, as far as it is known. An element that was not sent counts as zero within its threshold where
the defense implies one, and not at all elsewhere. What all that leaves open, a prior on pictures fills. Of a batch that
came at several steps, all say the same of the pixels: noise, drawn anew for each, averages out.

Where the features are known well, as of pruned gradients and short floats, the layers above the two lowest are walked
back first (`attack.engine.walk`), and what is left is nearly linear in the pixels (`attack.engine.lowest`).

Differs from published attacks on such gradients, which match what was sent as if it were the gradient, or by its
direction alone.

References: that pruning from 20 % on and int8 defend is a finding of Zhu, Liu, Han 2019, Deep Leakage from Gradients,
arXiv 1906.08935, sections 5.1 and 5.2, against an attacker who does not adapt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from attack.algorithms.base import Answer
from attack.algorithms.gauss_newton import LAGGING, OPEN, prior_of
from attack.engine.chain import Link, NoChain, trace
from attack.engine.context import Context, Progress
from attack.engine.direct import Anchored, Direct
from attack.engine.features import NoFeatures
from attack.engine.film import Film
from attack.engine.gauss_newton import Settings, minimize, spread
from attack.engine.last_layer import CoarseFeatures, at_features, read_coarsely, read_label
from attack.engine.layers import RESHAPES, activation, check
from attack.engine.lowest import Lowest
from attack.engine.tangents import Tangents, check_order
from attack.engine.target import Target
from attack.engine.walk import FullBelief, FullWalk, OutOfTime, prior_below

SETTINGS = Settings(steps=20, iterations=150, patient=True)
"""Rounded gradients take 4 to 6 steps; pruned ones, some of whose equations are exact, 9 or more."""
NEARLY_LINEAR = Settings(steps=12, goal=1e-2, below=0.1, patient=True)
"""With the error at the second layer as a number: five or six steps."""
WRITTEN_OUT = Settings(steps=20, goal=1e-2)
"""Where the linear systems are written out, as some equations are a million times more exact than others: conjugate
gradients alone then stop so short that of a gradient pruned by 80 % the picture came out three times further off."""
DOUBT = 3.0
"""Where all is determined, answers are so many times less exact than independent errors make them: those of float32
hang together."""
THINLY, MOSTLY = 0.85, 0.95
"""Share of the directions that are open: from the first on, errors count three times, as what the prior makes of next
to nothing is smooth, and looks surer than it is; beyond the second the picture would be the prior's alone."""
FLAT = 6e-4
"""Mean square of neighbors' differences, in squared input ranges, of what is no picture. Where the prior has next to
nothing to go by it makes all flat, and is sure of it, as nothing is smoother: with noise of 1e-1 the differences were
1e-5 to 3e-4, and the error up to four times what was predicted. Photos that came back from as little had 1.1e-3 and
more."""
DETERMINED = 3e-3
"""Deviation of a layer's inputs, relative to what is expected of them beforehand, up to which the error below it is
known well enough to be taken for a number. Of int8 it is 1e-2, and the picture comes out worse so."""
FLOOR = 1e-3
"""Least relative deviation of an equation then. With 1e-4 and less a gradient pruned by 80 or 90 % took twice the
steps, and its pictures came out with up to twice the error: what is that stiff is followed around each bend. Where an
answer so found does not match, as of float16 that is known nearly so well, it goes on without."""
FITS = 3.0
"""Standard deviations, root mean square, that an answer may leave of its equations: more, and something above was taken
for surer than it is."""
MAX_INPUTS = 4096
"""Elements of a picture up to which its linear systems are written out."""
SETTLED = 1e-5
"""Mean square of a step, in units of the squared range, below which Gauss-Newton has arrived."""


def coarse(target: Target, context: Context) -> Answer:
    """The input and label of a batch of one."""
    if target.batch_size != 1:
        return Answer(inputs=None, labels=None, reason="a gradient known coarsely is inverted for one example alone")
    film = Film()
    low, high = target.input_range
    last_two = [torch.full((1, *target.input_shape), (low + high) / 2, dtype=torch.float64, device=target.device)] * 2

    def settled(inputs: Tensor) -> bool:
        return float((last_two[1] - last_two[0]).square().mean()) <= SETTLED * (high - low) ** 2

    def watch(inputs: Tensor) -> None:
        last_two[:] = [last_two[1], inputs]
        residual = target.residual(inputs, label)
        film.take(len(film.history), residual, inputs)
        context.progress(
            Progress(
                method="coarse", evaluations=len(film.history), residual=residual, seconds_left=context.seconds_left
            )
        )

    prior = prior_of(target)
    try:
        label = read_label([target, *target.again])
        watch(_start(target))
        for system in _systems(target, label, context):
            rows, direct, settings = system.rows, system.direct, system.settings
            solution = minimize(rows, last_two[1], prior, context, settings, direct=direct, done=settled, watch=watch)
            fits = solution.misfit <= FITS**2 and target.explained_by(solution.inputs, label)
            if fits or not context.seconds_left:
                break
    except (NoChain, NoFeatures) as error:
        return Answer(inputs=None, labels=None, film=film, reason=str(error))
    except OutOfTime:
        return Answer(inputs=None, labels=None, film=film, reason="the deadline passed")
    left = spread(rows, solution, prior, context, iterations=2 * settings.iterations, direct=direct)
    size = solution.inputs.numel()
    said = f"what was sent leaves about {left.open_directions:,.0f} of {size:,} directions open; a prior on pictures"
    if left.open_directions > MOSTLY * size:
        return Answer(inputs=None, labels=None, film=film, reason=f"{said} would make up nearly all of it")
    thinly = left.open_directions > THINLY * size
    if thinly and roughness(solution.inputs) < FLAT * (high - low) ** 2:
        return Answer(inputs=None, labels=None, film=film, reason=f"{said} made all of it flat")
    filled = left.variance > OPEN * (high - low) ** 2 / 12
    doubt = DOUBT**2 if not filled else 3.0 if thinly else 1.0
    return Answer(
        inputs=solution.inputs,
        labels=label,
        film=film,
        left_open=left.variance * doubt + LAGGING * solution.moved,
        filled=filled,
        evaluations=len(film.history),
        reason=f"{said} filled them" if filled else solution.reason,
    )


def roughness(pictures: Tensor) -> float:
    """Mean square of the differences of neighbors in a row, and in a column where there are any."""
    ways = [-1] if pictures.ndim < 3 else [-1, -2]
    return sum(float(pictures.diff(dim=way).square().mean()) for way in ways) / len(ways)


def _start(target: Target) -> Tensor:
    """What a first linear layer's own gradient, dW = d x' and db = d, makes of its inputs; gray where there is none.

    Behind a ReLU Gauss-Newton stays on the side of a unit's kink on which it begins: of a fully connected net pruned by
    half no picture was found from gray.

    Raises: NoChain.
    """
    low, high = target.input_range
    gray = torch.full((1, *target.input_shape), (low + high) / 2, dtype=torch.float64, device=target.device)
    modules = [link.module for link in trace(target.model, target.input_shape)]
    lowest = next((module for module in modules if not isinstance(module, RESHAPES)), None)
    if not isinstance(lowest, nn.Linear) or lowest.bias is None or target.bases:
        return gray
    gradients, at = target.tensors(target.gradient), target.places[id(lowest.weight)]
    seen, error = gradients[at], gradients[target.places[id(lowest.bias)]]
    weights = target.tensors(target.noise)[at].square().reciprocal()  # 0 where unknown
    beforehand = 12 / (high - low) ** 2
    found = (weights * error[:, None] * seen).sum(0) + beforehand * gray.flatten()
    found /= (weights * error[:, None].square()).sum(0) + beforehand
    return found.clamp(low, high).view_as(gray)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _System:
    """Equations, and how to go about them."""

    rows: Callable[[Tensor], Tensor]
    direct: Direct | None
    """What solves their linear systems exactly, where that can be had."""
    settings: Settings


def _systems(target: Target, label: Tensor, context: Context) -> Iterator[_System]:
    """What to try, the one after the other, until an answer fits. Raises: NoChain, NoFeatures, OutOfTime."""
    with contextlib.suppress(NoChain):
        found = [_two_lowest(target, label, context)]
        for other in target.again:
            with contextlib.suppress(NoChain, NoFeatures):
                found.append(_two_lowest(other, label, context))
        for floor, factor_in in ((FLOOR, torch.float32), (0.0, torch.float64)):
            parts = [Lowest(step, links, below, floor=floor) for step, links, below in found]
            yield _together(parts, factor_in=factor_in)
    yield _whole(target, label)


def _together(parts: list[Lowest], *, factor_in: torch.dtype) -> _System:
    """Of all steps."""

    def gram(x: Tensor) -> Tensor:
        found = parts[0].gram(x)
        for part in parts[1:]:
            found += part.gram(x)
        return found

    return _System(
        rows=lambda x: torch.cat([part.rows(x) for part in parts]),
        direct=Anchored(gram, factor_in=factor_in),
        settings=NEARLY_LINEAR,
    )


def _two_lowest(target: Target, label: Tensor, context: Context) -> tuple[Target, list[Link], FullBelief]:
    """The two lowest layers, and what is known of their output, where the layers above determine what is between.

    Raises: NoChain, NoFeatures, OutOfTime.
    """
    if target.bases:
        raise NoChain("a layer's gradient is not known by its elements")
    links, last, features = _features(target, label)
    check(links)
    if math.prod(target.input_shape) > MAX_INPUTS:
        raise NoChain("the input is too large for its linear systems to be written out")
    layers = [place for place, link in enumerate(links) if isinstance(link.module, (nn.Linear, nn.Conv2d))]
    if len(layers) < 3:
        raise NoChain("there is no layer between the last and the two lowest")
    _, second, third = layers[:3]
    belief = FullWalk(links[:-1]).down(at_features(features, last, context), target, context, to=third)
    if belief.variance > DETERMINED**2 * prior_below(links[:third], target)[1]:
        raise NoChain(f"the inputs of layer {links[third].name} are not known well enough")
    below = FullWalk(links[:third]).down(belief, target, context, to=second + 1)
    return target, links[: second + 1], below


def _whole(target: Target, label: Tensor) -> _System:
    """The equations of all layers at once. Raises: NoChain, NoFeatures."""
    first, direct = _equations(target, label)
    parts = [first]
    for other in target.again:
        with contextlib.suppress(NoChain, NoFeatures):
            parts.append(_equations(other, label)[0])
            direct = None  # that of one step alone is no preconditioner for many
    settings = SETTINGS if direct is None else WRITTEN_OUT
    return _System(rows=lambda x: torch.cat([part(x) for part in parts]), direct=direct, settings=settings)


def _features(target: Target, label: Tensor) -> tuple[list[Link], nn.Linear, CoarseFeatures]:
    """Raises: NoChain, NoFeatures."""
    links = trace(target.model, target.input_shape)
    last = links[-1].module
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise NoFeatures("the last layer is not linear with a bias")
    mean, variance = prior_below(links[:-1], target)
    return links, last, read_coarsely(target, last, mean=mean, variance=variance, label=label)


def _equations(target: Target, label: Tensor) -> tuple[Callable[[Tensor], Tensor], Direct | None]:
    """What the features and all layers below the last say of an input; and what solves its linear systems exactly,
    where that can be had.

    Raises: NoChain, NoFeatures.
    """
    links, _, features = _features(target, label)
    below, value, deviation = list(links[:-1]), features.values, features.deviation
    while below:
        function = activation(below[-1].module)
        if function:
            slope = function.slope(value)
            value, deviation = function.inverse(value), deviation / slope
        elif not isinstance(below[-1].module, RESHAPES):
            break
        below.pop()
    rest = sum(shape.numel() for shape in target.shapes[:-2])
    weights = target.noise[:rest].reciprocal()

    def rows(x: Tensor) -> Tensor:
        outputs = x
        for link in below:
            outputs = link(outputs)
        seen = target.mismatch(x, label, differentiable=True)[:rest]
        return torch.cat([((outputs.flatten(1) - value) / deviation).flatten(), seen * weights])

    exact = (target.known > 0) & (target.bound == 0)
    if not exact.any() or math.prod(target.input_shape) > MAX_INPUTS:
        return rows, None
    try:
        check_order(links, target.model)
        tangents = Tangents(links, len(below), target.loss, label)
    except NoChain:
        return rows, None
    scales = torch.cat([deviation.flatten().reciprocal(), weights])

    def turned(jacobian: Tensor) -> Tensor:
        if not target.bases:
            return jacobian
        outputs, gradients = jacobian.split([deviation.numel(), rest], dim=1)
        return torch.cat([outputs, target.turned(gradients, parameters=len(target.shapes) - 2)], dim=1)

    return rows, Anchored(lambda x: tangents.gram(x, scales, turned=turned))
