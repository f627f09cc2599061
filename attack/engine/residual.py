"""Down a residual network, from the gradient of one example: every layer's input, as long as a gradient determines it.

The last layer gives the features and the label (iDLG). Below the mean over positions it is unknown which units of the
last ReLU were on: there the topmost convolution that `attack.engine.shifts` takes apart tells the error at its output,
and with it which were. From there on all is least squares, operation by operation, against the order in which they run:

    ReLU          its output is known, so it is known where the error passes
    sum           the error goes to both
    batch norm    by running statistics: a factor for each channel. By the batch, with m and s the mean and the
                  deviation of its input z, N values a channel:
                      error in = gamma / s (error - dbeta / N - (z - m) / s dgamma / N)
                  where dbeta and dgamma are the norm's own gradients, and z is settled together with the layer below
    convolution   dW = E(error) u: equations for its input u (R-GAP's gradient rows), all kernel elements at once

A layer with fewer of these than inputs ends it. Knows no label but the last layer's, and no truth.

Reference: the rows are those of R-GAP, Zhu and Blaschko, ICLR 2021, arXiv 2010.07733, which walks chains.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.engine.chain import Link
from attack.engine.context import Context
from attack.engine.graph import Graph, Kind
from attack.engine.layers import by_channel, gradient_rows, pull_back
from attack.engine.norms import Norms
from attack.engine.shifts import factor, shifts_of
from attack.engine.target import Target

NEARLY = 1e-2
"""Relative change of a layer's inputs between two rounds from which on single channels may be found wrong, ..."""
SETTLED = 1e-8
"""... at which batch norm below it is settled, ..."""
ROUNDS = 60
"""... and after how many rounds it will not be. Where it settles, it does so by a factor of 2 to 40 a round."""
LOOK_BACK = 6
"""Rounds within which the change must halve, or the layer's equations do not determine its input."""
MORE = 1.5
"""So many times more equations than a channel has positions are wanted: with hardly more, they are no good."""
DETERMINED = 1e-2
"""Deviation of a layer's inputs, relative to their size, below which the walk goes on."""
OFF = 10.0
"""A unit is on from so many deviations of its value."""
OUTLIER = 5.0
"""Misfit of a channel's rows, in units of the median, above which its errors are taken to be wrong, ..."""
REJECTIONS = 5
"""... in so many rounds."""
BLIND = 1e-6
"""Singular value of a layer's equations, relative to the largest, below which a direction is not seen."""
STATISTICS_ERROR = 3e-6
"""Of a mean or a deviation that was taken from two float32 running ones, relative, at a momentum of 0.1."""
CLEAR = 0.05
"""How far a unit of the last ReLU may be from on (1) and off (0)."""


class NoWalk(ValueError):
    """The walk cannot begin; one line that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """What the walk ended with: outputs of ReLUs, all that are known and not made of known ones alone."""

    values: dict[int, Tensor]
    """By place in the graph, float64, shape (1, ...): every output that is known."""
    ends: dict[int, float]
    """Those of them that say something of the input, and the deviation of their elements."""


def walk_down(target: Target, graph: Graph, label: Tensor, context: Context) -> Front:
    """The front. Raises: NoWalk."""
    with torch.no_grad():
        return _Walk(target, graph, context).go(label)


@dataclasses.dataclass(frozen=True, slots=True)
class _Consumer:
    """A convolution, and the error at the output of what it feeds alone: its norm, or itself."""

    place: int
    norm: int | None
    error: Tensor


class _Walk:
    def __init__(self, target: Target, graph: Graph, context: Context) -> None:
        self._target, self._graph, self._context = target, graph, context
        self._nodes = graph.nodes
        self.norms = Norms(target, graph)
        self._places = target.places
        self._gradients = target.tensors(target.gradient)
        self._noises = target.tensors(target.noise)
        self._values: dict[int, Tensor] = {}
        self._doubts: dict[int, float] = {}
        self._errors: dict[int, Tensor] = {}  # summed over users so far
        self._closed: set[int] = set()  # nodes whose error has gone down to their sources
        self._consumers: dict[int, list[_Consumer]] = {}
        self._guesses: dict[int, Tensor] = {}  # values but for a factor

    def go(self, label: Tensor) -> Front:
        top = self._begin()
        for place in range(top, 0, -1):
            if not self._context.seconds_left:
                raise NoWalk("the deadline passed")
            if all(user in self._closed for user in self._graph.users[place]):
                self._pass(place)
        ends = {
            place: self._doubts[place]
            for place in self._values
            if self._nodes[place].kind is Kind.RELU and self._graph.depends(self._nodes[place].sources[0], self._values)
        }
        return Front(values=self._values, ends=ends)

    def _begin(self) -> int:
        """From the logits to the last ReLU: its place."""
        weight, bias = self._target.tensors(self._target.gradient)[-2:]
        last = self._nodes[-1].module
        assert last is not None and isinstance(last.weight, Tensor)
        error = bias @ last.weight.detach()  # at the features
        place = len(self._nodes) - 1
        self._closed.add(place)
        (place,) = self._nodes[place].sources
        pooled = False
        while (node := self._nodes[place]).kind in (Kind.SAME, Kind.POOL):
            pooled = pooled or node.kind is Kind.POOL
            self._closed.add(place)
            (place,) = node.sources
        if node.kind is not Kind.RELU or len(self._graph.users[place]) != 1:
            raise NoWalk("wanted ReLU, the mean over positions and a linear layer at the end")
        if pooled:
            positions = node.shape[1] * node.shape[2]
            error = error.view(-1, 1, 1).expand(*node.shape) / positions
        else:
            error = error.view(node.shape)
        features = (bias @ weight / bias.square().sum()).view(-1, 1, 1)
        single = not pooled or error[0].numel() == 1
        on = (features.view(node.shape) > 1e-4 * features.max()) if single else self._last_pattern(place, error)
        self._errors[place] = error
        self._send(place, node.sources[0], error * on)
        return place - 1

    def _last_pattern(self, relu: int, error: Tensor) -> Tensor:
        """Which units of the last ReLU were on, from the topmost convolution whose gradient can be taken apart."""
        branches = [self._nodes[relu].sources[0]]
        while branches:
            place = branches.pop()
            node = self._nodes[place]
            if node.kind in (Kind.ADD, Kind.SAME):
                branches += node.sources
            if node.kind is not Kind.NORM or self._nodes[node.sources[0]].kind is not Kind.CONVOLUTION:
                continue
            found = self._take_apart(node.sources[0])
            if found is None:
                continue
            below, u = found
            (source,) = self._nodes[node.sources[0]].sources
            self._guesses[source] = u
            ratio = self.norms.push_up(place, below, self._run(node.sources[0], u[None])) / error
            if not self.norms.by_batch(place):
                high = ratio[ratio > ratio.max() / 2]  # all those that are on have the same, but for noise
                ratio = ratio / high.median()
            weight = error.abs() / error.abs().max()
            off = (ratio - (ratio > 0.5).to(ratio)).abs() * weight
            if float(off.max()) < CLEAR:
                return ratio > 0.5
            raise NoWalk("the errors above the last convolution are not those of one example through ReLU")
        raise NoWalk("no convolution below the last ReLU has a gradient that can be taken apart")

    def _take_apart(self, place: int) -> tuple[Tensor, Tensor] | None:
        convolution = self._nodes[place].module
        assert isinstance(convolution, nn.Conv2d)
        at = self._places[id(convolution.weight)]
        noise = float(self._noises[at].square().mean().sqrt())
        source = self._nodes[self._nodes[place].sources[0]].shape
        return factor(convolution, self._gradients[at], noise, source, self._context.generator)

    def _send(self, user: int, source: int, error: Tensor) -> None:
        """An error goes from a node to its source."""
        shaped = error.reshape(self._nodes[source].shape)
        self._errors[source] = self._errors[source] + shaped if source in self._errors else shaped
        self._closed.add(user)

    def _pass(self, place: int) -> None:
        """From a node to its sources, where that is possible."""
        node = self._nodes[place]
        if place in self._consumers and not self._settle(place):
            return
        error = self._errors.get(place)
        if error is None:
            return
        if node.kind is Kind.RELU and place in self._values:
            self._send(place, node.sources[0], error * (self._values[place][0] > 0))
        elif node.kind in (Kind.ADD, Kind.SAME):
            for source in node.sources:
                self._send(place, source, error)
        elif node.kind is Kind.NORM and self._nodes[node.sources[0]].kind is Kind.CONVOLUTION:
            self._consume(node.sources[0], place, error)
            self._closed |= {place, node.sources[0]}
        elif node.kind is Kind.CONVOLUTION and place not in self._closed:
            self._consume(place, None, error)
            self._closed.add(place)

    def _consume(self, convolution: int, norm: int | None, error: Tensor) -> None:
        (source,) = self._nodes[convolution].sources
        self._consumers.setdefault(source, []).append(_Consumer(convolution, norm, error))

    def _settle(self, place: int) -> bool:
        """The value of a node that convolutions take in, and the errors that come back from these."""
        consumers, shape = self._consumers[place], self._nodes[place].shape
        if not place:
            return False
        moving = any(each.norm is not None and self.norms.by_batch(each.norm) for each in consumers)
        normals = [self._begin_normal(each) for each in consumers]
        u, change, changes = torch.zeros(()), math.inf, list[float]()
        for _ in range(ROUNDS if moving else 1):
            errors = [self._below(each, normal) for each, normal in zip(consumers, normals, strict=True)]
            solved = self._solve(consumers, errors, shape, reject=not moving or change < NEARLY)
            if solved is None:
                return False
            before, (u, doubt, errors) = u, solved
            normals = [self._normal(each, u) for each in consumers]
            change = float((u - before).norm()) / float(u.norm())
            if change <= SETTLED:
                break
            changes.append(change)
            if len(changes) > LOOK_BACK and change > changes[-1 - LOOK_BACK] / 2:
                return False  # it goes nowhere: the equations do not determine u
        if not float(doubt.square().mean().sqrt()) < DETERMINED * float(u.square().mean().sqrt()):
            return False
        if self._nodes[place].kind is Kind.RELU:
            u = u * (u > OFF * doubt)
        self._values[place], self._doubts[place] = u[None], float(doubt.square().mean().sqrt())
        for each, error in zip(consumers, errors, strict=True):
            self._send(each.place, place, pull_back(self._link(each.place), error.reshape(1, -1)))
        return True

    def _below(self, consumer: _Consumer, normal: Tensor | None) -> Tensor:
        """The error at a convolution's output."""
        return consumer.error if consumer.norm is None else self.norms.pull_back(consumer.norm, consumer.error, normal)

    def _normal(self, consumer: _Consumer, u: Tensor) -> Tensor | None:
        """What a convolution makes of u, as its norm normalizes it."""
        return None if consumer.norm is None else self.norms.normal(consumer.norm, self._run(consumer.place, u[None]))

    def _begin_normal(self, consumer: _Consumer) -> Tensor | None:
        """The same before u is known: where the ReLU above was on, its output says it; elsewhere the mean is left."""
        if consumer.norm is None or not self.norms.by_batch(consumer.norm):
            return None
        (source,) = self._nodes[consumer.place].sources
        output, known = self._partly(consumer.norm)
        if source not in self._guesses and not known.any() and (found := self._take_apart(consumer.place)) is not None:
            self._guesses[source] = found[1]
        if source in self._guesses:
            return self.norms.normal(consumer.norm, self._run(consumer.place, self._guesses[source][None]))
        normal = self.norms.undo(consumer.norm, output) * known
        missing = (~known).sum((1, 2), keepdim=True).clamp(min=1)
        return torch.where(known, normal, -normal.sum((1, 2), keepdim=True) / missing)

    def _partly(self, place: int) -> tuple[Tensor, Tensor]:
        """A node's output where the ReLU above it was on, and where that is."""
        (user,) = self._graph.users[place]
        if self._nodes[user].kind is Kind.RELU:
            value = self._values.get(user)
            if value is not None:
                return value[0], value[0] > 0
        elif self._nodes[user].kind is Kind.ADD:
            total, known = self._partly(user)
            others = [source for source in self._nodes[user].sources if source != place]
            if not any(self._graph.depends(other, self._values) for other in others):
                rest = self._graph.run(self._values, others, self.norms.forward)
                return total - sum(each[0] for each in rest), known
        nothing = torch.zeros(self._nodes[place].shape, dtype=torch.float64, device=self._target.device)
        return nothing, nothing > 0

    def _solve(
        self, consumers: list[_Consumer], errors: list[Tensor], shape: tuple[int, ...], *, reject: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]] | None:
        """The input that the gradients of several convolutions share, the deviation at each position, and the errors.

        A unit so close to zero that it was taken for off, or for on, spoils the rows of one output channel: such
        channels are left out, and their errors solved for afterwards. None where the rows leave the input open.
        """
        systems, rights = [], []
        for each, error in zip(consumers, errors, strict=True):
            at = self._places[id(self._nodes[each.place].layer.weight)]
            weight = 1 / float(self._noises[at].square().mean().sqrt())
            channels, link = len(error), self._link(each.place)
            systems.append(weight * gradient_rows(link, error.flatten()).view(channels, -1, shape[1] * shape[2]))
            rights.append(weight * by_channel(link, self._gradients[at]).view(channels, -1, shape[0]))
        fit = [torch.ones(len(system), dtype=torch.bool, device=system.device) for system in systems]
        for _ in range(REJECTIONS if reject else 1):
            system = torch.cat([rows[good].flatten(0, 1) for rows, good in zip(systems, fit, strict=True)])
            right = torch.cat([rows[good].flatten(0, 1) for rows, good in zip(rights, fit, strict=True)])
            if system.shape[0] < MORE * system.shape[1]:
                return None
            left, sizes, turned = torch.linalg.svd(system, full_matrices=False)
            open_ = sizes < BLIND * sizes[0]
            u = turned[~open_].T @ ((left[:, ~open_].T @ right) / sizes[~open_, None])  # (positions, channels)
            if open_.any():
                closed = self._by_means(consumers, u, turned[open_], shape)
                if closed is None:
                    return None
                u = u + closed
            off = [(rows @ u - r).square().mean((1, 2)).sqrt() for rows, r in zip(systems, rights, strict=True)]
            if not reject:
                break
            before, fit = fit, [misfit <= OUTLIER * misfit.median().clamp(min=1.0) for misfit in off]
            if all(old.equal(new) for old, new in zip(before, fit, strict=True)):
                break
        scale = (
            torch.cat([misfit[good] for misfit, good in zip(off, fit, strict=True)]).square().mean().sqrt().clamp(min=1)
        )
        deviation = scale * (turned[~open_] / sizes[~open_, None]).square().sum(0).sqrt()
        if open_.any():
            deviation = deviation + STATISTICS_ERROR * u.square().mean().sqrt()
        value = u.T.reshape(shape)
        errors = [
            self._mend(each.place, error, good, value) for each, error, good in zip(consumers, errors, fit, strict=True)
        ]
        return value, deviation.view(shape[1:]), errors

    def _by_means(self, consumers: list[_Consumer], u: Tensor, blind: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """What to add to u, along directions that no gradient sees, for every channel to have the mean that was seen.

        An error that a norm by the batch passed on sums to zero. So where a kernel element meets all positions of one
        phase of a stride alike, adding a constant to these changes no gradient.

        Args:
            u: shape (positions, channels).
            blind: shape (directions, positions).
        """
        rows, missing = [], []
        for each in consumers:
            module = self._nodes[each.place].module
            assert isinstance(module, nn.Conv2d)
            if each.norm is None or not self.norms.by_batch(each.norm):
                return None
            seen, _ = self.norms.statistics(each.norm, None)
            met = shifts_of(module, shape).mean(1) @ blind.T  # (kernel, directions)
            rows.append(torch.einsum("oik,kd->odi", module.weight.detach().flatten(2), met).flatten(1))
            missing.append(seen - self._run(each.place, u.T.reshape(1, *shape))[0].mean((1, 2)))
        system = torch.cat(rows)
        if len(system) < system.shape[1]:
            return None
        amounts = torch.linalg.lstsq(system, torch.cat(missing)[:, None]).solution.view(len(blind), -1)
        return blind.T @ amounts

    def _mend(self, place: int, error: Tensor, good: Tensor, u: Tensor) -> Tensor:
        """The error at a convolution's output, with that of bad channels solved for from the gradient and the input."""
        if good.all():
            return error
        module = self._nodes[place].module
        assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
        patches = functional.unfold(
            u[None], module.kernel_size, dilation=module.dilation, padding=module.padding, stride=module.stride
        )[0]
        gradient = self._gradients[self._places[id(module.weight)]][~good].flatten(1)
        mended = torch.linalg.lstsq(patches, gradient.T).solution.T
        error = error.clone()
        error[~good] = mended.view(-1, *error.shape[1:])
        return error

    def _run(self, place: int, u: Tensor) -> Tensor:
        module = self._nodes[place].module
        assert module is not None
        with torch.no_grad():
            output: Tensor = module(u)
        return output

    def _link(self, place: int) -> Link:
        node = self._nodes[place]
        shape = self._nodes[node.sources[0]].shape
        return Link(name=node.name, module=node.layer, input_shape=shape, output_shape=node.shape)
