"""From the features of a batch down through its layers, as far as a layer's equations determine its inputs.

The last layer gives every example's features exactly, and the errors there. While a layer's output and the errors at it
are known, its inputs solve one linear system over the whole batch (`attack.engine.layers`): forward rows of each
example, and gradient rows that all share. Where those are fewer than the inputs, the descent ends, at a `Cut`. What is
known there constrains the inputs of the net, as equations for `attack.engine.gauss_newton`:

    f(x) = value at the cut,    gradient of <error, f(x)> by the parameters above = the observed one

With the errors at the cut as plain numbers, they are far less nonlinear than the match of the whole gradient. Knows no
truth.

Reference: the two kinds of rows are those of R-GAP, Zhu and Blaschko, ICLR 2021, arXiv 2010.07733.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attack.engine.chain import Link
from attack.engine.context import Context
from attack.engine.features import Features
from attack.engine.gauss_newton import Settings, minimize, spread
from attack.engine.layers import RESHAPES, activation, pull_back
from attack.engine.prior import Gaussian
from attack.engine.target import Target
from attack.engine.walk import prior_below

DETERMINED = 1e-2
"""Deviation of a layer's inputs, relative to what is expected of them beforehand, below which the descent goes on."""
LINEAR = Settings(steps=1, iterations=3000, goal=1e-9, inflation=1)
"""A layer's inputs are linear in what is known of them: one step."""
FEATURE_DOUBT = 3.0
"""Features are so many times less exact than the gradient's noise alone makes them: their errors are of float32 too."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What is known at one place of a chain, of every example."""

    links: list[Link]
    """From the net's input to the cut."""
    value: Tensor
    """float64, shape (batch, ...): the last link's output."""
    deviation: Tensor
    """Standard deviation of each of its elements; infinite where it says nothing. Same shape."""
    error: Tensor
    """Derivative of the mean loss by the output. Same shape."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Independent equations that a chain's gradient can give at most, and the unknowns that they are for."""

    equations: int
    unknowns: int

    def __str__(self) -> str:
        return f"at most {self.equations:,} independent equations for {self.unknowns:,} unknowns"

    def filled(self, open_directions: float) -> str:
        """What is to be said where a prior decided so many directions."""
        return (
            f"{self}; what they leave open or say too weakly, about {math.ceil(open_directions):,} directions, was "
            "filled by a prior on pictures"
        )


def count(links: list[Link], batch: int, *, steps: int = 1) -> Count:
    """Counted from the features down: what a later layer determines already is not counted again. Of several steps with
    the same batch, and other weights, each gives as many."""
    unknowns = batch * links[0].inputs
    decided = batch * links[-1].inputs
    for link in reversed(links[:-1]):
        outputs = batch * link.outputs
        for name, parameter in link.module.named_parameters():
            # The bias's gradient is the sum of the errors: known where all of the layer's output is.
            decided += 0 if name == "bias" and decided >= outputs else parameter.numel()
        decided = min(decided, batch * link.inputs)
    return Count(equations=min(steps * decided, unknowns), unknowns=unknowns)


def descend(target: Target, links: list[Link], features: Features, context: Context) -> Cut:
    """The lowest cut whose value is determined."""
    weight = links[-1].module.weight
    assert isinstance(weight, Tensor)
    shape = (-1, *links[-1].input_shape)
    covariance = torch.linalg.inv(features.error @ features.error.T)
    noise = float(target.tensors(target.noise)[-2].square().mean().sqrt())
    deviation = FEATURE_DOUBT * noise * covariance.diagonal().sqrt()
    cut = Cut(
        links=links[:-1],
        value=features.values,
        deviation=deviation[:, None].expand_as(features.values),
        error=(features.error @ weight.detach()).view(shape),
    )
    while True:
        cut = _before_activations(cut)
        below = _inputs_of_last(target, cut, context)
        if below is None:
            return cut
        cut = below


def equations(target: Target, cut: Cut, links: list[Link] | None = None) -> Callable[[Tensor], Tensor]:
    """What a cut says of the inputs of the links that lead to it (all of them, if none are named), as rows divided by
    their standard deviations."""
    parts = equations_by_kind(target, cut, links)

    def rows(x: Tensor) -> Tensor:
        own, shared = parts(x)
        return torch.cat([own.flatten(), shared])

    return rows


def equations_by_kind(
    target: Target, cut: Cut, links: list[Link] | None = None
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The same, apart: forward rows of each example, shape (batch, outputs), and gradient rows, which all share."""
    links = cut.links if links is None else links
    places = target.places
    parameters = [parameter for link in links for parameter in link.module.parameters()]
    observed = [target.tensors(target.gradient)[places[id(parameter)]] for parameter in parameters]
    weights = [target.tensors(target.noise)[places[id(parameter)]].reciprocal() for parameter in parameters]

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        value = x
        for link in links:
            value = link(value)
        gradients = torch.autograd.grad(value, parameters, cut.error, create_graph=True) if parameters else ()
        rows = [
            ((gradient - seen) * w).flatten() for gradient, seen, w in zip(gradients, observed, weights, strict=True)
        ]
        own = ((value - cut.value) / cut.deviation).flatten(1)
        return own, torch.cat(rows) if rows else own.new_zeros(0)

    return parts


def _before_activations(cut: Cut) -> Cut:
    """The cut moved down through reshapes and activations that have an inverse."""
    links, value, deviation, error = list(cut.links), cut.value, cut.deviation, cut.error
    while links:
        function = activation(links[-1].module)
        if function:
            slope = function.slope(value)
            value, deviation, error = function.inverse(value), deviation / slope, error * slope
        elif not isinstance(links[-1].module, RESHAPES):
            break
        shape = (-1, *links.pop().input_shape)
        value, deviation, error = value.reshape(shape), deviation.reshape(shape), error.reshape(shape)
    return Cut(links=links, value=value, deviation=deviation, error=error)


def _inputs_of_last(target: Target, cut: Cut, context: Context) -> Cut | None:
    """The cut moved down through its last layer, where that determines its inputs; else None."""
    if not cut.links or not isinstance(cut.links[-1].module, (nn.Linear, nn.Conv2d)):
        return None
    *below, link = cut.links
    if not any(True for under in below for _ in under.module.parameters()):
        return None  # the net's own inputs: more is known of them than of those of a layer
    batch, weight = len(cut.value), link.module.weight
    assert isinstance(weight, Tensor)
    if batch * link.outputs + weight.numel() < batch * link.inputs or not context.seconds_left:
        return None
    mean, variance = prior_below(below, target)
    prior = Gaussian(mean=mean, variance=variance)
    rows = equations(target, cut, [link])
    start = torch.full((batch, *link.input_shape), mean, dtype=cut.value.dtype, device=cut.value.device)
    solution = minimize(rows, start, prior, context, LINEAR)
    left = spread(rows, solution, prior, context, iterations=LINEAR.iterations)
    if not context.seconds_left or not float(left.deviation.max()) < DETERMINED * variance**0.5:
        return None
    deviation = left.deviation.view(-1, *[1] * len(link.input_shape)).expand_as(solution.inputs)
    error = pull_back(link, cut.error.flatten(1)).view(batch, *link.input_shape).detach()
    return Cut(links=below, value=solution.inputs, deviation=deviation, error=error)
