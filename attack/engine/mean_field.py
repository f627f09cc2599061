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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attack.engine.by_outputs import ByOutputs
from attack.engine.chain import Link, NoChain
from attack.engine.context import Context
from attack.engine.layers import activation, bias_of, by_channel, gradient_rows, pull_back, push, weight_gradients
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
    """The walk along one chain. Gradients near that of the first walk cost a tenth of it: they take its factors and
    variances."""

    def __init__(self, links: list[Link]) -> None:
        self._links = links
        self._solved: dict[str, _Solved] = {}

    @torch.no_grad()
    def __call__(self, target: Target, context: Context, watch: Watch = _ignore) -> Belief:
        """The belief on the chain's input.

        Raises:
            NoChain: elements of the gradient are not known, or a layer is too large or ill-conditioned.
            OutOfTime: the deadline passed.
        """
        if not target.known.all():
            raise NoChain("elements of the gradient are not known")
        places = target.places
        gradients, noises = target.tensors(target.gradient), target.tensors(target.noise)
        error, noise = gradients[-1], noises[-1]
        if error.shape != self._links[-1].output_shape:
            raise NoChain("the gradient of the last layer's bias is not known")
        normal = context.normal((DRAWS, len(error))).to(error)
        belief = Belief(
            mean=torch.zeros_like(error),
            samples=torch.zeros_like(normal),
            error=error,
            error_samples=error + noise * normal,
        )
        precision = torch.zeros_like(error)  # nothing is known of the logits
        first = next(link for link in self._links if hasattr(link.module, "weight"))
        for index in range(len(self._links) - 1, -1, -1):
            link = self._links[index]
            inverse = activation(link.module)
            if inverse:
                slope = inverse.slope(belief.mean)
                precision = slope.square() / belief.variance
                belief = Belief(
                    mean=inverse.inverse(belief.mean),
                    samples=inverse.inverse(belief.samples),
                    error=belief.error * slope,
                    error_samples=belief.error_samples * inverse.slope(belief.samples),
                )
            elif hasattr(link.module, "weight"):
                prior = prior_below(self._links[:index], target)
                at = places[id(link.module.weight)]
                root = _root(link, belief, noises[at], prior)
                layer = _Layer(link, prior, precision, root, belief.error, gradients[at])
                precondition = layer.preconditioner()
                belief = layer.believe(belief, precondition, context, watch if link is first else _ignore)
                self._solved[link.name] = _Solved(
                    root=root, mean=belief.mean, variance=belief.variance, precondition=precondition
                )
        return belief

    @torch.no_grad()
    def again(self, targets: Sequence[Target], context: Context) -> Tensor:
        """The means of the beliefs on the chain's input, shape (targets, inputs), for gradients near the first walk's.

        Raises: OutOfTime: the deadline passed.
        """
        places = targets[0].places
        gradients = [torch.stack(same) for same in zip(*(t.tensors(t.gradient) for t in targets), strict=True)]
        error = gradients[-1]
        mean, precision, variance = torch.zeros_like(error), torch.zeros_like(error), math.inf
        for index in range(len(self._links) - 1, -1, -1):
            link = self._links[index]
            inverse = activation(link.module)
            if inverse:
                slope = inverse.slope(mean)
                mean, error, precision = inverse.inverse(mean), error * slope, slope.square() / variance
            elif hasattr(link.module, "weight"):
                solved, prior = self._solved[link.name], prior_below(self._links[:index], targets[0])
                gradient = gradients[places[id(link.module.weight)]]
                layer = _Layer(link, prior, precision, solved.root, error, gradient)
                mean, variance = layer.solve_near(mean, solved, context), solved.variance
                error = pull_back(link, error)
        return mean


def _root(link: Link, belief: Belief, noise: Tensor, prior: tuple[float, float]) -> Tensor:
    """One over the standard deviation of each gradient row, shape (rows, 1)."""
    mean, variance = prior
    # An error that is off by d moves a row by the sum of d times u: u is of the prior's size.
    off = (belief.error_samples - belief.error).view(len(belief.error_samples), noise.shape[0], -1)
    doubt = off.square().mean(0).sum(-1) * (mean**2 + variance)
    return 1 / (noise.square().mean() + doubt).sqrt().repeat_interleave(noise[0, 0].numel())[:, None]


class _Layer:
    """The normal equations of one layer, (F'PF + E'WE + prior) u = right; or of several gradients at it.

    Args:
        precision: P, shape (outputs,) or (gradients, outputs).
        root: of W, shape (rows, 1).
        error: at the output, shape as that of `precision`.
        gradient: of the weight; of several, stacked.
    """

    def __init__(
        self, link: Link, prior: tuple[float, float], precision: Tensor, root: Tensor, error: Tensor, gradient: Tensor
    ) -> None:
        self._link, self._precision = link, precision
        self._mean, self._variance = prior
        self._root, self._error = root, error
        gradients = gradient if error.ndim > 1 else gradient[None]
        targets = torch.stack([(root * by_channel(link, one)).T for one in gradients])
        # Of a single element all rows say the same: one stands for them.
        self._as_one = (root[:, 0] * error)[..., None] if isinstance(link.module, nn.Linear) else None
        if self._as_one is not None:
            targets = targets @ torch.nn.functional.normalize(self._as_one, dim=-2)
        self._targets = targets if error.ndim > 1 else targets[0]
        self._channels = self._targets.shape[-2]

    def believe(self, belief: Belief, precondition: Solve, context: Context, watch: Watch) -> Belief:
        """From what is believed of the layer's output to what is believed of its input, with as many draws.

        Raises: NoChain, OutOfTime.
        """
        link, draws = self._link, len(belief.samples)
        # First the mean's right side; then draws, whose right sides are noise as each kind of row has it; then probes.
        right = self._normal(context, 1 + draws + PROBES, link.inputs)
        right[: 1 + draws] /= math.sqrt(self._variance)
        forward = self._precision.sqrt() * self._normal(context, 1 + draws, link.outputs)
        right[0], forward[0] = self._ahead(belief.mean)
        right[: 1 + draws] += pull_back(link, forward)
        rows = right.new_zeros(len(right), *self._targets.shape)
        rows[0] = self._targets
        rows[1 : 1 + draws] = self._normal(context, draws, *self._targets.shape)
        start = torch.full_like(right[:1], self._mean)
        solved = self._conjugate_gradients(right, rows, start, precondition, ITERATIONS, context, watch)
        mean, samples, answers = solved[0], solved[1 : 1 + draws], solved[1 + draws :]
        if (right[1 + draws :] * answers).mean() > OPEN * samples.square().mean():
            raise NoChain(f"layer {link.name}: some directions of its input are open")
        errors = pull_back(link, torch.cat([belief.error[None], belief.error_samples]))
        return Belief(mean=mean, samples=mean + samples, error=errors[0], error_samples=errors[1:])

    def solve_near(self, output: Tensor, before: _Solved, context: Context) -> Tensor:
        """From outputs to inputs, (gradients, outputs) -> (gradients, inputs). Raises: OutOfTime."""
        everywhere, forward = self._ahead(output)
        right = everywhere + pull_back(self._link, forward)
        start = before.mean.expand(len(output), -1)
        return self._conjugate_gradients(
            right, self._targets, start, before.precondition, AGAIN_ITERATIONS, context, _ignore
        )

    def _ahead(self, output: Tensor) -> tuple[float, Tensor]:
        """What prior and output say, on the right side: the first of each element, the second before F'."""
        return self._mean / self._variance, self._precision * (output - bias_of(self._link).to(output))

    def _normal(self, context: Context, *shape: int) -> Tensor:
        return context.normal(shape, dtype=torch.float32).to(self._precision)  # a fifth of the time of float64

    def _conjugate_gradients(
        self,
        right: Tensor,
        rows: Tensor,
        start: Tensor,
        precondition: Solve,
        iterations: int,
        context: Context,
        watch: Watch,
    ) -> Tensor:
        """Solves for each of several right sides, `right` + E'`rows`: the first few from `start`, the rest from zero.

        Residuals of the rows are kept apart from the others: joined, the strong rows would drown in rounding what the
        others say.
        """
        x, r, s, told = torch.zeros_like(right), right.clone(), rows.clone(), slice(len(start))
        x[told] = start
        r[told] -= self._others(start)
        s[told] -= self._seen(start)
        p, q, before = torch.zeros_like(r), torch.zeros_like(s), torch.zeros_like(x[:, :1])
        goal = torch.full_like(before, SOLVED * right.shape[1])
        watch(0, x[0])
        for iteration in range(1, iterations + 1):
            if not context.seconds_left:
                raise OutOfTime
            z = precondition(r, s)
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
        if self._as_one is not None:
            return v[:, :, None] * torch.linalg.vector_norm(self._as_one, dim=-2, keepdim=True)
        return self._root.T * weight_gradients(self._link, self._error.expand(len(v), -1), v)

    def _others(self, v: Tensor) -> Tensor:
        """(F'PF + prior) v."""
        return v / self._variance + pull_back(self._link, self._precision * push(self._link, v))

    def preconditioner(self) -> Solve:
        """Near the inverse of the normal matrix of one gradient. Raises: NoChain."""
        if self._as_one is None:
            rows = self._root * gradient_rows(self._link, self._error)
        else:
            rows = torch.linalg.vector_norm(self._as_one).view(1, 1)
        count, size = rows.shape
        if len(self._precision) <= MOST_OUTPUTS and size <= MOST_ELEMENTS:
            return ByOutputs(self._link, self._precision, rows, 1 / self._variance).solve
        if isinstance(self._link.module, nn.Conv2d) and count * self._channels <= MOST_ROWS:
            return Stripes(self._link, self._precision, rows, 1 / self._variance).solve
        raise NoChain(f"layer {self._link.name}: {self._link.inputs} inputs are too many to be walked back quickly")
