"""The walk back: from the gradient of a chain of layers to its one input, layer by layer, in closed form.

At each layer with weights the output z and the error e = d loss / d z are known from the layer above, and the input u
solves one weighted least-squares problem: forward rows F u = z - b, and gradient rows E(e) u = dW
(`attack.engine.layers`). Its solution is a Gaussian belief on u, mean and precision; the activation below carries it
to the next output, and F and the activation's slope carry the error. So a direction in which one layer says little is
left to the layers below.

How far the error e itself may be off is carried along as samples: they widen the noise of the gradient rows, and
without them the answer's own variance is ten to a thousand times too small. Knows neither label nor truth.

A gradient near by is walked back with what the first one's walk weighed each equation with, and its Cholesky factors
as preconditioners: that takes a tenth of the time.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attack.engine.chain import Link, NoChain
from attack.engine.context import Context
from attack.engine.layers import Activation, activation, bias_of, by_channel, gradient_rows, pull_back, push
from attack.engine.linearized import conjugate_gradients
from attack.engine.target import Target

MAX_UNKNOWNS = 4096
"""Inputs of one layer: a precision matrix of 4096 x 4096 takes 134 MB, and its factor 23 Gflop."""
AGAIN_GOAL, AGAIN_ITERATIONS = 1e-2, 12
"""Size, relative to that of the move, at which conjugate gradients end for a gradient near by; and their most."""
SAMPLES = 32
"""They estimate a mean square: 32 of thousands of elements each give it within a tenth."""


class OutOfTime(Exception):
    """The deadline passed between two layers."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Belief:
    """What is known of one tensor of the forward pass, and of the loss's derivative by it. All flat, float64."""

    mean: Tensor
    samples: Tensor
    """Draws from the belief, shape (samples, elements)."""
    error: Tensor
    error_samples: Tensor
    """Draws of the error, each beside the draw of `samples` of the same row."""

    @property
    def variance(self) -> float:
        """Mean over the elements."""
        return float((self.samples - self.mean).square().mean())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FullBelief(Belief):
    """With how the elements hang together."""

    precision: Tensor
    """Inverse covariance, shape (elements, elements)."""
    weighted: Tensor
    """precision @ mean: the right-hand side of the normal equations."""
    factor: Tensor | None = None
    """Cholesky factor of `precision`, where it was solved for."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Solved:
    """What a layer's solution leaves to those of gradients near by."""

    belief: FullBelief
    """On the layer's input."""
    above: Tensor
    """Precision of the layer's output, shape (outputs, outputs)."""
    weights: Tensor
    """Of the gradient rows, shape (rows, channels)."""


class FullWalk:
    """The walk along one chain. After the first, each walk's gradient is to be near the first one's."""

    def __init__(self, links: list[Link]) -> None:
        self._links = links
        self._solved: dict[str, _Solved] = {}

    @torch.no_grad()
    def __call__(self, target: Target, context: Context) -> FullBelief:
        """The belief on the chain's input.

        Raises:
            NoChain: a layer is too large, or its equations have no solution.
            OutOfTime: the deadline passed.
        """
        return self.down(_at_logits(target, self._links, context), target, context)

    @torch.no_grad()
    def down(self, belief: FullBelief, target: Target, context: Context, *, to: int = 0) -> FullBelief:
        """From a belief on the chain's output to that on the input of its link `to`.

        Raises: NoChain, OutOfTime: as above.
        """
        gradients, noises, places = target.tensors(target.gradient), target.tensors(target.noise), target.places
        for index in range(len(self._links) - 1, to - 1, -1):
            link = self._links[index]
            inverse = activation(link.module)
            if inverse:
                belief = _through(inverse, belief)
            elif hasattr(link.module, "weight"):
                if not context.seconds_left:
                    raise OutOfTime
                at = places[id(link.module.weight)]
                prior = prior_below(self._links[:index], target)
                solved = _solve(link, belief, gradients[at], noises[at], prior, context)
                self._solved[link.name] = solved
                belief = solved.belief
        return belief

    @torch.no_grad()
    def again(self, target: Target, context: Context) -> Tensor:
        """The mean of the belief on the chain's input, flat, for a gradient near that of the last call.

        Raises: NoChain, OutOfTime: as above.
        """
        mean = torch.zeros(self._links[-1].output_shape).to(target.gradient)
        error = target.tensors(target.gradient)[-1]
        gradients, places = target.tensors(target.gradient), target.places
        for index in range(len(self._links) - 1, -1, -1):
            link = self._links[index]
            inverse = activation(link.module)
            if inverse:
                mean, error = inverse.inverse(mean), error * inverse.slope(mean)
            elif hasattr(link.module, "weight"):
                if not context.seconds_left:
                    raise OutOfTime
                gradient = gradients[places[id(link.module.weight)]]
                prior = prior_below(self._links[:index], target)
                mean = _solve_again(link, self._solved[link.name], mean, error, gradient, prior, context)
                error = pull_back(link, error[None])[0]
        return mean


def _at_logits(target: Target, links: list[Link], context: Context) -> FullBelief:
    """Nothing is known of the logits, but their error is: the gradient of the last bias."""
    error, noise = target.tensors(target.gradient)[-1], target.tensors(target.noise)[-1]
    if error.shape != links[-1].output_shape or not noise.isfinite().all():
        raise NoChain("the gradient of the last layer's bias is not known in full")
    zeros = torch.zeros_like(error)
    return FullBelief(
        mean=zeros,
        precision=torch.zeros(len(error), len(error), dtype=error.dtype, device=error.device),
        weighted=zeros,
        samples=zeros.expand(SAMPLES, -1),
        error=error,
        error_samples=error + noise * context.normal((SAMPLES, len(error))).to(error),
    )


def _through(inverse: Activation, belief: FullBelief) -> FullBelief:
    """From an activation's output to its input, by its inverse and its slope there."""
    mean, slope = inverse.inverse(belief.mean), inverse.slope(belief.mean)
    precision = slope[:, None] * belief.precision * slope
    return FullBelief(
        mean=mean,
        precision=precision,
        weighted=precision @ mean,
        samples=inverse.inverse(belief.samples),
        error=belief.error * slope,
        error_samples=belief.error_samples * inverse.slope(belief.samples),
    )


def prior_below(below: list[Link], target: Target) -> tuple[float, float]:
    """Mean and variance of an element of a layer's input before anything is seen; they matter where nothing is."""
    for link in reversed(below):
        inverse = activation(link.module)
        if inverse:
            return inverse.mean, inverse.variance
        if hasattr(link.module, "weight"):
            return 0.0, 1e4
    low, high = target.input_range
    return (low + high) / 2, (high - low) ** 2 / 12


def _solve(
    link: Link, belief: FullBelief, gradient: Tensor, noise: Tensor, prior: tuple[float, float], context: Context
) -> _Solved:
    """From a layer's output to its input, by forward rows, gradient rows and prior, each with its weight."""
    if link.inputs > MAX_UNKNOWNS:
        raise NoChain(f"layer {link.name} has {link.inputs} inputs; at most {MAX_UNKNOWNS} are solved for at once")
    mean, variance = prior
    offset = bias_of(link).to(belief.mean)
    rows, targets = gradient_rows(link, belief.error), by_channel(link, gradient)
    weights = by_channel(
        link, row_noise(belief.error_samples - belief.error, noise, prior).square().reciprocal()
    )  # 0 where nothing is known
    precision = information(link, belief.precision, rows, weights)
    weighted = pull_back(link, (belief.weighted - belief.precision @ offset)[None])[0]
    weighted = weighted + (rows.T @ (weights * targets)).T.flatten()

    precision.diagonal().add_(1 / variance)
    weighted = weighted + mean / variance
    factor = _factor(precision, link)
    solution = torch.cholesky_solve(weighted[:, None], factor)[:, 0]
    draws = context.normal((link.inputs, SAMPLES)).to(solution)
    samples = solution + torch.linalg.solve_triangular(factor.T, draws, upper=True).T
    errors = pull_back(link, torch.cat([belief.error[None], belief.error_samples]))
    found = FullBelief(
        mean=solution,
        precision=precision,
        weighted=weighted,
        factor=factor,
        samples=samples,
        error=errors[0],
        error_samples=errors[1:],
    )
    return _Solved(belief=found, above=belief.precision, weights=weights)


def row_noise(off: Tensor, noise: Tensor, prior: tuple[float, float]) -> Tensor:
    """Standard deviation of a layer's gradient rows, in the shape of its weight, from that of their own and from what
    is not known of the error: where it is off by d, a row moves by the sum of d times u, and u is of the prior's size.

    Args:
        off: draws of how far the error is off, (samples, outputs).
        noise: standard deviation of the weight's gradient.
        prior: mean and variance of u.
    """
    mean, variance = prior
    doubt = off.view(len(off), len(noise), -1).square().mean(0).sum(-1) * (mean**2 + variance)
    return torch.hypot(noise, doubt.sqrt().view(-1, *[1] * (noise.ndim - 1)))


def information(link: Link, precision: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """What a layer's equations say of its input, as a precision, (inputs, inputs): F'PF + E'WE.

    Args:
        precision: P, of its output.
        rows: E, (rows, elements of one channel).
        weights: of those, (rows, channels).
    """
    half = pull_back(link, precision)
    found = pull_back(link, half.T.contiguous()).contiguous()
    channels, size = weights.shape[1], rows.shape[1]
    blocks = (rows.T * weights.T[:, None, :]) @ rows  # (channels, size, size)
    found.view(channels, size, channels, size).diagonal(dim1=0, dim2=2).add_(blocks.permute(1, 2, 0))
    return found


def _solve_again(
    link: Link,
    solved: _Solved,
    output: Tensor,
    error: Tensor,
    gradient: Tensor,
    prior: tuple[float, float],
    context: Context,
) -> Tensor:
    """`_solve` for an output and an error near those of `solved`, with the same weights: the mean alone."""
    mean, variance = prior
    rows, targets, weights = gradient_rows(link, error), by_channel(link, gradient), solved.weights
    factor = solved.belief.factor
    assert factor is not None

    def multiply(u: Tensor) -> Tensor:
        forward = pull_back(link, push(link, u[None]) @ solved.above)[0]
        return forward + (rows.T @ (weights * (rows @ u.view(targets.shape[1], -1).T))).T.flatten() + u / variance

    right = pull_back(link, (solved.above @ (output - bias_of(link).to(output)))[None])[0]
    right = right + (rows.T @ (weights * targets)).T.flatten() + mean / variance
    start = solved.belief.mean
    step, _ = conjugate_gradients(
        multiply,
        right - multiply(start),
        context,
        goal=AGAIN_GOAL,
        iterations=AGAIN_ITERATIONS,
        precondition=lambda r: torch.cholesky_solve(r[:, None], factor)[:, 0],
    )
    return start + step


def _factor(precision: Tensor, link: Link) -> Tensor:
    """Cholesky factor. Where float64 cannot tell the smallest eigenvalues from zero, their directions are damped."""
    factor, failed = torch.linalg.cholesky_ex(precision)
    if failed:
        precision.diagonal().add_(1e-13 * precision.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(precision)
    if failed:
        raise NoChain(f"layer {link.name}: its equations are too ill-conditioned for float64")
    return factor
