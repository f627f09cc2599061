"""The walk back with beliefs whose elements are independent: each layer's equations are solved, no matrix is carried.

At each layer the input u is the least-squares solution of the same equations as in `attack.engine.walk`,

    forward rows   F u = z - b, each with the variance of z;      gradient rows   E(e) u = dW

but a layer passes on one variance for all its elements. On fresh LeNets the answer's error is some 5 dB above that of
the full belief, and the work a tenth. Conjugate gradients solve the equations, for the mean and for draws from the
posterior; a float32 factor of the whole normal matrix, near enough, makes them arrive in 2 to 8 iterations:

* where a layer has few outputs, it is had by way of those (`attack.engine.by_outputs`);
* else, for convolutions, in stripes of rows (`attack.engine.stripes`).

Serves gradients that are known in full. Knows neither label nor truth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attack.engine.by_outputs import ByOutputs
from attack.engine.chain import Link, NoChain
from attack.engine.context import Context
from attack.engine.layers import activation, bias_of, by_channel, gradient_rows, pull_back, push
from attack.engine.stripes import Stripes
from attack.engine.target import Target
from attack.engine.walk import Belief, OutOfTime, prior_below

DRAWS = 4
"""From each belief: their mean square over all elements of a layer is its variance."""
ITERATIONS, AGAIN_ITERATIONS = 40, 1
"""Of conjugate gradients, at most: a layer of a LeNet takes 2 to 8; from a solution near by, one."""
SOLVED, DRAWN = 1e-2, 0.1
"""Squared distance from the solution, in standard deviations and a mean over the directions, at which they end, for
the mean and for draws."""
MOST_OUTPUTS, MOST_ELEMENTS = 1024, 512
"""Outputs of a layer, and elements of one of its input channels, up to which `ByOutputs` serves."""
MOST_ROWS = 2048
"""Gradient rows, all channels together, up to which `Stripes` does."""

Operator = Callable[[Tensor], Tensor]
"""Shape (vectors, inputs) -> the same."""
Watch = Callable[[int, Tensor], None]
"""Is shown the iterations at the chain's first layer: a number from 0 on, and the input, flat; the last is the mean."""


def _ignore(_iteration: int, _inputs: Tensor) -> None:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Solved:
    """What a layer's first solution leaves to those of gradients near by."""

    root: Tensor
    """One over the standard deviation of each gradient row, shape (rows, 1)."""
    mean: Tensor
    """Of the belief on the layer's input."""
    variance: float
    """Of that belief, mean over the elements."""
    precondition: Operator


class QuickWalk:
    """The walk along one chain. After the first, a walk with a gradient near by costs a tenth of it: it takes the
    factors and the variances of the first."""

    def __init__(self, links: list[Link]) -> None:
        self._links = links
        self._solved: dict[str, _Solved] = {}

    @torch.no_grad()
    def __call__(self, target: Target, context: Context, watch: Watch = _ignore) -> Belief:
        """The belief on the chain's input; after the first walk, its mean without samples.

        Raises:
            NoChain: elements of the gradient are not known, or a layer is too large or ill-conditioned.
            OutOfTime: the deadline passed.
        """
        if not target.known.all():
            raise NoChain("elements of the gradient are not known")
        draws = 0 if self._solved else DRAWS
        parameters = {id(parameter): index for index, parameter in enumerate(target.model.parameters())}
        gradients, noises = target.tensors(target.gradient), target.tensors(target.noise)
        error, noise = gradients[-1], noises[-1]
        if error.shape != self._links[-1].output_shape:
            raise NoChain("the gradient of the last layer's bias is not known")
        normal = context.normal((draws, len(error))).to(error)
        belief = Belief(
            mean=torch.zeros_like(error),
            samples=torch.zeros_like(normal),
            error=error,
            error_samples=error + noise * normal,
        )
        precision = torch.zeros_like(error)  # nothing is known of the logits
        above = None
        first = next(link for link in self._links if hasattr(link.module, "weight"))
        for index in range(len(self._links) - 1, -1, -1):
            link = self._links[index]
            inverse = activation(link.module)
            if inverse:
                assert above is not None  # the last link is linear
                slope = inverse.slope(belief.mean)
                precision = slope.square() / above.variance
                belief = Belief(
                    mean=inverse.inverse(belief.mean),
                    samples=inverse.inverse(belief.samples),
                    error=belief.error * slope,
                    error_samples=belief.error_samples * (inverse.slope(belief.samples) if draws else 0),
                )
            elif hasattr(link.module, "weight"):
                at = parameters[id(link.module.weight)]
                prior = prior_below(self._links[:index], target)
                layer = _Layer(link, belief, precision, gradients[at], noises[at], prior, self._solved.get(link.name))
                belief = layer.solve(belief, context, watch if link is first else _ignore)
                above = self._solved.setdefault(link.name, layer.solved(belief))
        return belief


class _Layer:
    """The normal equations of one layer, (F'PF + E'WE + prior) u = right."""

    def __init__(
        self,
        link: Link,
        belief: Belief,
        precision: Tensor,
        gradient: Tensor,
        noise: Tensor,
        prior: tuple[float, float],
        before: _Solved | None,
    ) -> None:
        self._link, self._precision, self._gradient = link, precision, by_channel(link, gradient)
        self._mean, self._variance = prior
        self._channels = self._gradient.shape[1]
        self._iterations = ITERATIONS if before is None else AGAIN_ITERATIONS
        rows = gradient_rows(link, belief.error)
        if before is None:
            # An error that is off by d moves a row by the sum of d times u: u is of the prior's size.
            off = (belief.error_samples - belief.error).view(len(belief.error_samples), gradient.shape[0], -1)
            doubt = off.square().mean(0).sum(-1) * (self._mean**2 + self._variance)
            deviation = (noise.square().mean() + doubt).sqrt()
            self._root = 1 / deviation.repeat_interleave(len(rows) // len(deviation))[:, None]
            self._start = torch.full((link.inputs,), self._mean).to(rows)
        else:
            self._root, self._start = before.root, before.mean
        self._rows = self._root * rows  # (rows, elements of a channel), each divided by its standard deviation
        self._precondition = self._preconditioner() if before is None else before.precondition

    def solved(self, belief: Belief) -> _Solved:
        """For later walks."""
        return _Solved(root=self._root, mean=belief.mean, variance=belief.variance, precondition=self._precondition)

    def solve(self, belief: Belief, context: Context, watch: Watch) -> Belief:
        """From what is believed of the layer's output to what is believed of its input, with as many draws."""
        link, draws = self._link, len(belief.samples)
        offset = bias_of(link).to(belief.mean)
        # First the mean's right side; then draws, whose right sides are noise as each kind of row has it.
        forward = torch.cat(
            [
                (self._precision * (belief.mean - offset))[None],
                self._precision.sqrt() * context.normal((draws, len(offset))).to(offset),
            ]
        )
        targets = (self._root * self._gradient).T
        rows = torch.cat([targets[None], context.normal((draws, *targets.shape)).to(offset)])
        right = pull_back(link, forward) + (rows @ self._rows).flatten(1)
        right[0] += self._mean / self._variance
        right[1:] += context.normal((draws, link.inputs)).to(offset) / math.sqrt(self._variance)
        mean = self._conjugate_gradients(right[:1], self._start[None], SOLVED, context, watch)
        samples = mean[:0]
        if draws:
            samples = mean + self._conjugate_gradients(right[1:], torch.zeros_like(right[1:]), DRAWN, context, _ignore)
        errors = pull_back(link, torch.cat([belief.error[None], belief.error_samples]))
        return Belief(mean=mean[0], samples=samples, error=errors[0], error_samples=errors[1:])

    def _conjugate_gradients(self, right: Tensor, x: Tensor, goal: float, context: Context, watch: Watch) -> Tensor:
        """Each row of `right` on its own, from `x`."""
        r = right - self._multiply(x)
        p, before = torch.zeros_like(x), torch.ones_like(x[:, :1])
        watch(0, x[0])
        for iteration in range(1, self._iterations + 1):
            z = self._precondition(r)
            rz = (r * z).sum(1, keepdim=True)
            if rz.max() <= goal * right.shape[1]:
                break
            if not context.seconds_left:
                raise OutOfTime
            p, before = z + rz / before * p, rz
            q = self._multiply(p)
            step = rz / (p * q).sum(1, keepdim=True).clamp(min=torch.finfo(rz.dtype).tiny)
            x, r = x + step * p, r - step * q
            watch(iteration, x[0])
        return x

    def _multiply(self, v: Tensor) -> Tensor:
        by_channel = v.view(len(v), self._channels, -1)
        gradient = (by_channel @ self._rows.T @ self._rows).flatten(1)
        return gradient + v / self._variance + pull_back(self._link, self._precision * push(self._link, v))

    def _preconditioner(self) -> Operator:
        """Near the inverse of the normal matrix. Raises: NoChain."""
        count, size = self._rows.shape
        if len(self._precision) <= MOST_OUTPUTS and size <= MOST_ELEMENTS:
            return ByOutputs(self._link, self._precision, self._rows, 1 / self._variance).solve
        if isinstance(self._link.module, nn.Conv2d) and count * self._channels <= MOST_ROWS:
            return Stripes(self._link, self._precision, self._rows, 1 / self._variance).solve
        raise NoChain(f"layer {self._link.name}: {self._link.inputs} inputs are too many to be walked back quickly")
