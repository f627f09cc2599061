"""Residual networks with batch norm, one example: layer by layer down to where it gets too narrow, then the pixels.

The walk (`attack.engine.residual`) gives the inputs of all layers but the first few, to the last digits; for nets that
nobody could invert it needs no start and no luck. What it ends with, outputs of ReLUs some layers above the picture,
then determines the pixels many times over: an on unit says what comes in, an off one that it is not above zero,

    sum over on units (z(x) - u)^2 + sum over off units max(z(x), 0)^2 = min

and L-BFGS from gray finds them. Batch norm in evaluation mode is served, and in training mode where the statistics of
this very batch were seen, as DDP's buffers show those of rank 0: without them the scale of the picture is open, since
the first batch norm undoes it.

Differs from the papers: R-GAP (Zhu and Blaschko, ICLR 2021, arXiv 2010.07733) walks chains of layers whose activations
can be undone; and searches such as Inverting Gradients (arXiv 2003.14053) match the gradient of the whole net at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attack.algorithms.base import Answer
from attack.algorithms.rgap import check_rank_one, rgap
from attack.engine.chain import NoChain
from attack.engine.context import Context, Progress
from attack.engine.film import Film
from attack.engine.gauss_newton import Solution, spread
from attack.engine.graph import Graph, Kind, NoGraph
from attack.engine.labels import NoLabel, read_label
from attack.engine.lbfgs import Searches
from attack.engine.norms import Norms
from attack.engine.prior import Gaussian
from attack.engine.residual import STATISTICS_ERROR, Front, NoWalk, walk_down
from attack.engine.target import Target

STARTS = 4
"""From gray, and then from noise."""
ROUNDS = 600
"""Evaluations of one start."""
STRIDE = 25
"""Between two looks."""
FITTED = 1e-3
"""Misfit of the front, relative to its size, at which another start is not worth its time."""
SLOW = 0.5
"""Part of the misfit that a start must lose between two looks once it fits, or it has come as far as digits reach."""
HISTORY = 60
REFINEMENTS = 2
"""Of the batch's statistics."""
ON = 1e-4
"""Output of a ReLU, relative to the root mean square of its layer's, from which on it counts as on."""
NEAR = 1e-4
"""Input of a ReLU, likewise, below which an answer may have it on the wrong side of zero, ..."""
MOST_NEAR = 20
"""... of so many."""
CORRELATED = 10.0
"""Factor of what the front leaves open if the errors of its elements count as independent: in float32 a rank's own
activations are off, and many rows with each."""
PROBING = 100
"""Of conjugate gradients, for what the front leaves open."""


def residual(target: Target, context: Context) -> Answer:
    """The input and label of a batch of one; of a net without batch norm, by `rgap`."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in target.model.modules()):
        return rgap(target, context)
    try:
        label = read_label(target)
        if not bool((target.known > 0).all()):
            raise NoWalk("wanted the whole gradient: some of its elements are not known")
        graph = Graph(target.model, target.input_shape)
        check_rank_one(target)
        _check_statistics(target, graph)
        front = walk_down(target, graph, label, context)
        if not front.ends:
            raise NoWalk("no layer's input is determined by its gradient")
    except (NoLabel, NoChain, NoGraph, NoWalk) as error:
        return Answer(inputs=None, labels=None, reason=str(error))
    film = Film()

    def watch(inputs: Tensor) -> None:
        residual = target.residual(inputs, label)
        film.take(len(film.history) * STRIDE, residual, inputs)
        left = context.seconds_left
        context.progress(
            Progress(method="residual", evaluations=len(film.history), residual=residual, seconds_left=left)
        )

    low, high = target.input_range
    gray = torch.full((1, *target.input_shape), (low + high) / 2, dtype=torch.float64, device=target.device)
    noise = [context.normal(tuple(gray.shape)).to(gray) * (high - low) / 4 for _ in range(STARTS)]
    starts = [gray + noise[0] / 10, *(gray + each for each in noise[1:])]
    rows = equations(target, graph, front)
    with torch.no_grad():
        size = float(rows(gray).square().mean().sqrt())
    inputs, misfit, evaluations = _fit(rows, starts, size, context, watch)
    for _ in range(REFINEMENTS if target.statistics and misfit < FITTED * size else 0):
        rows = equations(_with_own_statistics(target, graph, inputs), graph, front)
        inputs, misfit, more = _fit(rows, [inputs], size, context, watch)
        evaluations += more
    inputs = _cross_kinks(target, graph, inputs, label, context)
    watch(inputs)
    scale = max(1.0, misfit)
    left = spread(
        lambda x: rows(x) / scale,
        Solution(inputs=inputs, misfit=1.0, moved=0.0, steps=0, reason=None),
        Gaussian(mean=(low + high) / 2, variance=(high - low) ** 2 / 12),
        context,
        iterations=PROBING,
    )
    left_open = CORRELATED * left.variance
    if target.statistics:
        momentum = min(m.momentum or 1.0 for m in target.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        left_open += (STATISTICS_ERROR * 0.1 / momentum * (high - low)) ** 2
    return Answer(inputs=inputs, labels=label, film=film, left_open=left_open, evaluations=evaluations)


def equations(target: Target, graph: Graph, front: Front) -> Callable[[Tensor], Tensor]:
    """What a front says of the input, as rows divided by their standard deviations; flat."""
    norms = Norms(target, graph)
    given, below = dict(front.values), {}
    with torch.no_grad():
        for end in front.ends:
            (before,) = graph.nodes[end].sources
            below[end] = before
            sums = graph.nodes[before].sources if graph.nodes[before].kind is Kind.ADD else ()
            for place in sums:  # of a sum, the part that is known
                if not graph.depends(place, given):
                    given[place] = graph.run(given, [place], norms.forward)[0]

    def rows(x: Tensor) -> Tensor:
        before = graph.run({**given, 0: x}, list(below.values()), norms.forward)
        parts = []
        for (end, deviation), z in zip(front.ends.items(), before, strict=True):
            u = front.values[end]
            on = u > ON * u.square().mean().sqrt()
            parts.append((torch.where(on, z, z.clamp(min=0)) - u) / deviation)
        return torch.cat([part.flatten() for part in parts])

    return rows


def _cross_kinks(target: Target, graph: Graph, inputs: Tensor, label: Tensor, context: Context) -> Tensor:
    """The inputs, moved a little, so that no ReLU is on the wrong side of zero: one of half a million is enough to
    change a deep net's gradient by a hundredth, while the picture is right to the sixth digit.

    Each that is close to zero is tried on its other side, and stays there if the gradient then matches better.
    """
    least = target.residual(inputs, label)
    before = [node.sources[0] for node in graph.nodes if node.kind is Kind.RELU]
    while least > target.tolerance and context.seconds_left:
        with torch.no_grad():
            outputs = [z.flatten() for z in graph.run({0: inputs}, before)]
        close = [
            (float(v), at, int(i))
            for at, z in zip(before, outputs, strict=True)
            for v, i in zip(*_smallest(z), strict=True)
        ]
        began = least
        for _, at, element in sorted(close)[:MOST_NEAR]:
            x = inputs.clone().requires_grad_()
            value = graph.run({0: x}, [at])[0].flatten()[element]
            (slope,) = torch.autograd.grad(value, x)
            moved = inputs - 2 * float(value.detach()) * slope / slope.square().sum()
            residual = target.residual(moved, label)
            if residual < least:
                inputs, least = moved, residual
        if least == began:
            break
    return inputs


def _smallest(z: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes, relative to the root mean square, and places of the elements closest to zero."""
    sizes, places = (z.abs() / z.square().mean().sqrt()).topk(min(MOST_NEAR, len(z)), largest=False)
    return sizes[sizes < NEAR], places[sizes < NEAR]


def _check_statistics(target: Target, graph: Graph) -> None:
    """Raises: NoWalk where a norm normalizes by the batch, and the batch's statistics were not seen."""
    norms = [node for node in graph.nodes if node.kind is Kind.NORM]
    unseen = [node for node in norms if node.layer.training and node.name not in target.statistics]
    if unseen:
        raise NoWalk(
            "batch norm normalizes by the batch, whose statistics were not seen: DDP's buffers show those of rank 0, "
            "at a step whose next one was seen too"
        )


def _with_own_statistics(target: Target, graph: Graph, inputs: Tensor) -> Target:
    """With what the inputs give the norms by the batch, in place of what was seen of that: from two float32 numbers it
    is known to five digits, and inputs that fit average over the errors of many."""
    own = dict(target.statistics)

    def forward(place: int, z: Tensor) -> Tensor:
        node = graph.nodes[place]
        if node.name in own:
            variance, mean = torch.var_mean(z, dim=(0, 2, 3))
            own[node.name] = mean, variance
        output: Tensor = node.layer(z)
        return output

    with torch.no_grad():
        graph.run({0: inputs}, [len(graph.nodes) - 1], forward)
    return dataclasses.replace(target, statistics=own)


def _fit(
    rows: Callable[[Tensor], Tensor],
    starts: list[Tensor],
    size: float,
    context: Context,
    watch: Callable[[Tensor], None],
) -> tuple[Tensor, float, int]:
    """The inputs that fit a front best, the root mean square of its rows there, and how often these were computed.

    From one start after the other, until one fits.

    Args:
        size: root mean square of the rows at gray.
    """
    best, least, evaluations = starts[0], float("inf"), 0

    def evaluate(flat: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        x = flat.view_as(best).detach().requires_grad_()
        with torch.enable_grad():
            value = rows(x).square().mean() / size**2
            (slope,) = torch.autograd.grad(value, x)
        return value.detach()[None], slope.flatten()[None]

    for number, start in enumerate(starts):
        searches = Searches(best.numel(), history=HISTORY, dtype=torch.float64, device=best.device)
        searches.add(start.flatten(1), evaluate)
        before = float("inf")
        while not bool(searches.exhausted[0]) and evaluations < (number + 1) * ROUNDS and context.seconds_left:
            for _ in range(STRIDE):
                searches.round(evaluate)
            misfit = float(searches.value[0]) ** 0.5
            if misfit < least:
                best, least = searches.x[0].view_as(best).clone(), misfit
            if misfit > SLOW * before and misfit < FITTED:
                break
            before = misfit
        watch(best)
        if least < FITTED or not context.seconds_left:
            break
    return best, least * size, evaluations
