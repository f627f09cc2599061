"""The walk back with beliefs whose elements are independent: each layer's equations are solved, no matrix is carried.

At each layer the input u is the least-squares solution of the same equations as in `attack.engine.walk`,

    forward rows   F u = z - b, each with the variance of z;      gradient rows   E(e) u = dW

but a layer passes on one variance for all its elements. On fresh LeNets the answer's error is some 5 dB above that of
the full belief, and the work a tenth. Conjugate gradients solve the equations, for the mean and for draws from the
posterior; a float32 factor of the whole normal matrix, near enough, makes them arrive in two or three iterations:

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
PROBES, OPEN = 2, 10.0
"""Random right sides, whose solutions tell the variance too, and that of directions as well of which the equations say
so little that draws miss them; and how many times the draws' variance theirs may be."""
ITERATIONS, AGAIN_ITERATIONS = 40, 1
"""Of conjugate gradients, at most: a layer of a LeNet takes two; from a solution near by, one."""
SOLVED, FALLEN = 1e-3, 0.1
"""Squared distance from the solution, in standard deviations and a mean over the directions, at which they end; and
the same in units of its first."""
MOST_OUTPUTS, MOST_ELEMENTS = 1024, 512
"""Outputs of a layer, and elements of one of its input channels, up to which `ByOutputs` serves."""
MOST_ROWS = 2048
"""Gradient rows, all channels together, up to which `Stripes` does."""

Solve = Callable[[Tensor, Tensor], Tensor]
"""A right side x + E'y, apart: x, shape (vectors, inputs), and y, shape (vectors, channels, rows) -> (vectors, inputs).
"""
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
    precondition: Solve


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
        self._link, self._precision = link, precision
        self._mean, self._variance = prior
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
        # Each row divided by its standard deviation: (rows, elements of a channel), and what they are to be.
        self._rows, self._targets = self._root * rows, (self._root * by_channel(link, gradient)).T
        if self._rows.shape[1] == 1:  # of a single element all rows say the same: one stands for them
            size = torch.linalg.vector_norm(self._rows)
            self._rows, self._targets = size.view(1, 1), self._targets @ self._rows / size
        self._channels = len(self._targets)
        self._precondition = self._preconditioner() if before is None else before.precondition

    def solved(self, belief: Belief) -> _Solved:
        """For later walks."""
        return _Solved(root=self._root, mean=belief.mean, variance=belief.variance, precondition=self._precondition)

    def solve(self, belief: Belief, context: Context, watch: Watch) -> Belief:
        """From what is believed of the layer's output to what is believed of its input, with as many draws."""
        link, draws = self._link, len(belief.samples)
        offset = bias_of(link).to(belief.mean)
        # First the mean's right side; then draws, whose right sides are noise as each kind of row has it; then probes.
        count = 1 + draws + (PROBES if draws else 0)
        right = self._normal(context, count, link.inputs)
        right[: 1 + draws] /= math.sqrt(self._variance)
        right[0] = self._mean / self._variance
        forward = self._precision.sqrt() * self._normal(context, 1 + draws, link.outputs)
        forward[0] = self._precision * (belief.mean - offset)
        right[: 1 + draws] += pull_back(link, forward)
        rows = right.new_zeros(count, self._channels, len(self._rows))
        rows[0] = self._targets
        rows[1 : 1 + draws] = self._normal(context, draws, self._channels, len(self._rows))
        start = torch.zeros_like(right)
        start[0] = self._start
        solved = self._conjugate_gradients(right, rows, start, context, watch)
        mean, samples, answers = solved[0], solved[1 : 1 + draws], solved[1 + draws :]
        if draws and (right[1 + draws :] * answers).mean() > OPEN * samples.square().mean():
            raise NoChain(f"layer {link.name}: some directions of its input are open")
        errors = pull_back(link, torch.cat([belief.error[None], belief.error_samples]))
        return Belief(mean=mean, samples=mean + samples, error=errors[0], error_samples=errors[1:])

    def _normal(self, context: Context, *shape: int) -> Tensor:
        return context.normal(shape).to(self._precision)

    def _conjugate_gradients(self, right: Tensor, rows: Tensor, x: Tensor, context: Context, watch: Watch) -> Tensor:
        """Solves for each of several right sides, `right` + E'`rows`, from `x`.

        Residuals of the rows are kept apart from the others: joined, the strong rows would drown in rounding what the
        others say.
        """
        r, s = right - self._others(x), rows - self._seen(x)
        p, q, before = torch.zeros_like(r), torch.zeros_like(s), torch.zeros_like(x[:, :1])
        goal = torch.full_like(before, SOLVED * right.shape[1])
        watch(0, x[0])
        for iteration in range(1, self._iterations + 1):
            if not context.seconds_left:
                raise OutOfTime
            z = self._precondition(r, s)
            seen = self._seen(z)
            rz = (r * z).sum(1, keepdim=True) + (s * seen).flatten(1).sum(1, keepdim=True)
            goal = torch.minimum(goal, FALLEN * rz) if iteration == 1 else goal
            if (rz <= goal).all():
                break
            fall, before = torch.where(before > 0, rz / before, 0.0), rz
            p, q = z + fall * p, seen + fall[:, :, None] * q
            others = self._others(p)
            size = (p * others).sum(1, keepdim=True) + q.square().flatten(1).sum(1, keepdim=True)
            step = rz / size.clamp(min=torch.finfo(size.dtype).tiny)
            x, r, s = x + step * p, r - step * others, s - step[:, :, None] * q
            watch(iteration, x[0])
            if iteration > 1 and (rz * fall <= goal).all():
                break  # as it fell before, it has now fallen below
        return x

    def _seen(self, v: Tensor) -> Tensor:
        """E v."""
        return v.view(len(v), self._channels, -1) @ self._rows.T

    def _others(self, v: Tensor) -> Tensor:
        """(F'PF + prior) v."""
        return v / self._variance + pull_back(self._link, self._precision * push(self._link, v))

    def _preconditioner(self) -> Solve:
        """Near the inverse of the normal matrix. Raises: NoChain."""
        count, size = self._rows.shape
        if len(self._precision) <= MOST_OUTPUTS and size <= MOST_ELEMENTS:
            return ByOutputs(self._link, self._precision, self._rows, 1 / self._variance).solve
        if isinstance(self._link.module, nn.Conv2d) and count * self._channels <= MOST_ROWS:
            return Stripes(self._link, self._precision, self._rows, 1 / self._variance).solve
        raise NoChain(f"layer {self._link.name}: {self._link.inputs} inputs are too many to be walked back quickly")
