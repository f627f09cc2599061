"""The search for which positions passed a max pooling: soft at first, and settled by what they explain.

For a net of two blocks (`attack.engine.pooling`), x -> u -> v, the last layer gives v and its error e exactly. Unknown
are the picture x, the features between, u, and both patterns. What they must satisfy is linear, but for the patterns:

    values     conv2(u) = v at the position that passed, and <= v at the others      about 4000 rows, 8000 unknowns
    gradient   dW2 = E patches(u)', where E has e at the position that passed         18,000 rows: settles u
    features   u = conv1(x) at the position that passed, or 0, and >= all of them     8000 rows: settles x

The upper pattern is believed by probabilities pi, from mean-field sweeps: in turn each cell weighs its positions by
what the values and the gradient say, given what the others are believed to be. Given pi, x and u together solve a
weighted least squares, in which the gradient's rows have the mean of E under pi, and its spread as a penalty; the lower
pattern is soft in the same way, a softmax over how much each position lacks. Both are hardened as the scale of the
errors in u is lowered. One such annealing settles part of the cells; begun anew from what it found, the next one
settles more. Knows neither label nor truth.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from attack.engine.context import Context
from attack.engine.linearized import Operator, conjugate_gradients
from attack.engine.pooling import Block, Pooled
from attack.engine.priors import Variation

MISS = 1.7
"""Scale of the errors in u to begin with, in units of how far a forward pass misses the features, over the upper
layer's gain."""
COOLING, STEPS = 15.0, 10
"""By how much an annealing lowers the scale, in how many steps."""
GRADIENT, VALUE = 3.0, 0.5
"""Errors of the gradient's rows and of z, in units of what independent errors in u would make. Too small a number
settles cells on what is not yet known."""
SWEEPS = 2
ITERATIONS = 20
"""Of conjugate gradients a step; the next step goes on from there."""
VARIATION = 30.0
"""Inverse scale of a picture's differences, in units of the input range; ..."""
SMOOTH = 0.02
"""... below this, they are taken as Gaussian."""
SETTLE_STEPS, SLOW = 15, 0.9
"""At most so many, and no more once one leaves more than this share of the misfit."""
SETTLE_ITERATIONS = 15
MOST_POSITIONS = 2048
"""Of a channel of u, up to which the gradient's rows precondition as they are, and not by their diagonal."""


class Patterns:
    """The state of a search: picture, features between, and the upper pattern's probabilities.

    Args:
        inputs: where to start, shape (channels, height, width).
        input_range: of the picture.
    """

    def __init__(self, net: Pooled, inputs: Tensor, input_range: tuple[float, float], context: Context) -> None:
        self.net, self._range, self._context = net, input_range, context
        self.inputs = inputs
        self.between = net.lower.output(inputs)
        self.likely = torch.empty(0)
        """pi: shape (channels, cells, positions)."""
        # Norm of a channel's errors: by it, errors of u make errors in the gradient's row.
        norm = net.error.flatten(1).norm(dim=1, keepdim=True)
        self._norm = norm + 1e-3 * norm.max()
        _, rows, columns, positions = net.upper.cells(net.upper.forward(self.between)).shape
        numbers = torch.arange(rows * columns * positions, device=inputs.device)
        grid = numbers.view(1, net.upper.output_shape[1], net.upper.output_shape[2])
        self._order = net.upper.cells(grid)[0].reshape(rows * columns, positions)
        """Flat position in z of each cell's positions."""

    def anneal(self) -> None:
        """One annealing, from what `inputs` gives; changes all three."""
        net = self.net
        self.between = net.lower.output(self.inputs)
        missed = (net.upper.output(self.between) - net.features).square().mean().sqrt()
        scale = MISS * float(missed) / net.upper.gain
        self.likely = self._by_values(scale)
        for step in range(STEPS):
            scale_now = scale * COOLING ** (-step / (STEPS - 1))
            self._sweep(scale_now, GRADIENT)
            self._solve_both(scale_now)

    def take_patterns(self) -> None:
        """Takes the upper pattern from `inputs`, as certain."""
        cells = self.net.upper.cells(self.net.upper.forward(self.between)).flatten(1, 2)
        self.likely = one_hot(cells.argmax(-1), cells.shape[-1]).to(cells)

    def settle(self, *, sweep: bool = True) -> float:
        """`between` and `likely` by the upper layer alone, with each channel weighted by how well it is explained.

        A channel with one wrong cell is explained badly, and most channels are right: so u is solved by these, and puts
        the others right.

        Args:
            sweep: whether the pattern may change.

        Returns: the median over the channels of how far a row of the gradient is off, in units of its noise.
        """
        net = self.net
        least, missed = math.inf, self._missed()
        for _ in range(SETTLE_STEPS):
            if missed > SLOW * least:
                break
            least = missed
            off = self._off()
            scale = float((off / self._norm).median().clamp(min=float((net.noise / self._norm).median()))) / 2
            z = net.upper.forward(self.between)
            lacks = net.features[..., None] - net.upper.cells(z)
            trust = 1 / (1 + (net.upper.uncells(lacks) / (3 * scale)).square())
            rows = self._upper_rows(torch.hypot(off, scale * self._norm), scale, trust)
            tie = (1e-3 / scale) ** 2
            step, _ = conjugate_gradients(
                functools.partial(rows.normal, tie=tie),
                rows.downhill(self.between),
                self._context,
                goal=1e-8,
                iterations=SETTLE_ITERATIONS,
                precondition=rows.preconditioner(tie),
            )
            self.between = (self.between + step).clamp(min=0)
            if sweep:
                self._sweep(scale, 1.0, sweeps=3)
            missed = self._missed()
        return missed

    def error_below(self) -> Tensor:
        """Derivative of the loss by `between`, where that is exact."""
        upper = self.net.upper
        cells = upper.cells(upper.forward(self.between))
        passed = one_hot(cells.argmax(-1), cells.shape[-1]) * self.net.error[..., None]
        return upper.back(upper.uncells(passed)) * (self.between > 0)

    def _missed(self) -> float:
        return float((self._off() / self.net.noise).median())

    def _off(self) -> Tensor:
        """How far the rows of the gradient are off, root mean square for each channel: (channels, 1)."""
        rest = self._mean_error() @ self.net.upper.patches(self.between).T - self.net.gradient
        return rest.square().mean(1, keepdim=True).sqrt()

    def _cells(self, likely: Tensor) -> Tensor:
        return likely.view(*self.net.features.shape, -1)

    def _mean_error(self) -> Tensor:
        """E under pi, shape (channels, positions of z)."""
        return self.net.upper.uncells(self._cells(self.likely) * self.net.error[..., None]).flatten(1)

    def _costs(self, scale: float) -> Tensor:
        """-log likelihood of each position having passed, by the values: what it lacks; it is allowed to lie above as
        little as the others are, and so that cancels."""
        net = self.net
        lacks = net.features[..., None] - net.upper.cells(net.upper.forward(self.between))
        return (lacks.clamp(min=0) / (VALUE * net.upper.gain * scale)).square().flatten(1, 2) / 2

    def _by_values(self, scale: float) -> Tensor:
        return torch.softmax(-self._costs(scale), -1)

    def _sweep(self, scale: float, gradient: float, sweeps: int = SWEEPS) -> None:
        """Mean-field sweeps over the cells, all channels at once; changes `likely`."""
        net, likely, costs = self.net, self.likely.clone(), self._costs(scale)
        patches = net.upper.patches(self.between)[:, self._order.flatten()]
        gram, explained = patches.T @ patches, net.gradient @ patches
        error = net.error.flatten(1)
        certainty = 1 / (2 * (gradient * scale * self._norm[:, 0]).square())
        cells, positions = self._order.shape
        blocks = gram.view(cells, positions, cells, positions)
        energy = gram.diagonal().view(cells, positions)
        # What the rest of the gradient, as believed, says of each position: kept up to date.
        rest = explained - (likely * error[..., None]).flatten(1) @ gram
        for _ in range(sweeps):
            for cell in range(cells):
                own = error[:, cell, None]
                at = slice(cell * positions, (cell + 1) * positions)
                without = rest[:, at] + own * (likely[:, cell] @ blocks[cell, :, cell])
                cost = (own.square() * energy[cell] - 2 * own * without) * certainty[:, None] + costs[:, cell]
                new = torch.softmax(-cost, -1)
                rest += own * ((likely[:, cell] - new) @ gram[at])
                likely[:, cell] = new
        self.likely = likely

    def _upper_rows(self, row_errors: Tensor, value_error: float, trust: Tensor | float = 1.0) -> _UpperRows:
        return _UpperRows(self, row_errors, value_error, trust)

    def _solve_both(self, scale: float) -> None:
        """One weighted least squares for `inputs` and `between` together."""
        net, x, u = self.net, self.inputs, self.between
        low, high = self._range
        block = net.lower
        rows = self._upper_rows(GRADIENT * scale * self._norm, VALUE * net.upper.gain * scale)
        cells = block.cells(block.forward(x))
        lacks = u[..., None] - torch.cat([cells, torch.zeros_like(cells[..., :1])], -1)  # u is a position's value, or 0
        least = lacks.abs().amin(-1, keepdim=True)
        weights = torch.softmax((least - lacks.abs()) / scale, -1) / ((least + scale) * scale)
        weights[..., :-1] = torch.maximum(weights[..., :-1], torch.where(lacks[..., :-1] < 0, scale**-2, 0.0))
        passed, off = weights[..., :-1], weights[..., -1]
        variation = Variation(x, VARIATION / (high - low), SMOOTH * (high - low))

        def multiply(joined: Tensor) -> Tensor:
            p, w = joined[: x.numel()].view_as(x), joined[x.numel() :].view_as(u)
            pull = passed * (w[..., None] - block.cells(block.apply(p)))
            to_x = variation.normal(p) - block.back(block.uncells(pull))
            to_u = rows.normal(w) + pull.sum(-1) + off * w
            return torch.cat([to_x.flatten(), to_u.flatten()])

        pull = passed * lacks[..., :-1]
        downhill_x = block.back(block.uncells(pull)) - variation.normal(x)
        downhill_u = rows.downhill(u) - pull.sum(-1) - off * u
        diagonal_x = block.back(block.uncells(passed), squared=True) + 2 * VARIATION / (high - low) ** 2
        to_u = rows.preconditioner(weights.sum(-1))

        def precondition(joined: Tensor) -> Tensor:
            of_x, of_u = joined[: x.numel()].view_as(x) / diagonal_x, to_u(joined[x.numel() :].view_as(u))
            return torch.cat([of_x.flatten(), of_u.flatten()])

        step, _ = conjugate_gradients(
            multiply,
            torch.cat([downhill_x.flatten(), downhill_u.flatten()]),
            self._context,
            goal=1e-4,
            iterations=ITERATIONS,
            precondition=precondition,
        )
        self.inputs = (x + step[: x.numel()].view_as(x)).clamp(low, high)
        self.between = (u + step[x.numel() :].view_as(u)).clamp(min=0)


class _UpperRows:
    """The weighted rows that gradient and values set for u, under the believed pattern.

    Args:
        row_errors: of the gradient's rows, shape (channels, 1).
        value_error: of z.
        trust: 0 to 1, further weight of each position's value.
    """

    def __init__(self, state: Patterns, row_errors: Tensor, value_error: float, trust: Tensor | float) -> None:
        net, likely = state.net, state.likely
        self._block: Block = net.upper
        self._order = state._order
        self._error = state._mean_error()
        self._weights = row_errors.square().reciprocal()
        self._gradient = net.gradient
        lacks = net.features[..., None] - self._block.cells(self._block.forward(state.between))
        believed = torch.where(net.active[..., None], state._cells(likely), 0.0)
        bounded = torch.where(lacks < 0, 1.0, believed)  # no position lies above its cell's value
        self._values = self._block.uncells(bounded) / value_error**2 * trust
        self._lacks = self._block.uncells(lacks)
        # Spread of E under pi: sum over channels of e^2 (diag(pi) - pi pi') for each cell.
        size = net.error.flatten(1).square() * self._weights
        mean = torch.einsum("oc,ocq->cq", size, likely)
        self._spread = torch.diag_embed(mean) - torch.einsum("oc,ocq,ocr->cqr", size, likely, likely)

    def normal(self, u: Tensor, tie: float = 0.0) -> Tensor:
        """(J'WJ + spread + tie) u."""
        patches = self._block.patches(u)
        back = (self._weights * (self._error @ patches.T)).T @ self._error + self._spread_of(patches)
        return self._block.unpatch(back) + self._block.back(self._values * self._block.apply(u)) + tie * u

    def downhill(self, u: Tensor) -> Tensor:
        """-(half the slope) at the features that these rows were made at."""
        patches = self._block.patches(u)
        rest = self._weights * (self._gradient - self._error @ patches.T)
        back = rest.T @ self._error - self._spread_of(patches)
        return self._block.unpatch(back) + self._block.back(self._values * self._lacks)

    def _diagonal(self) -> Tensor:
        """About that of the gradient's rows."""
        size = (self._weights * self._error.square()).sum(0)
        patches = size.expand(self._gradient.shape[1], -1).contiguous()
        return self._block.unpatch(patches)

    def preconditioner(self, own: Tensor | float) -> Operator:
        """About the inverse of J'WJ + spread + own, `own` being one number for each of u or for all.

        The gradient's rows and the spread are the same for all channels of u, and join none of them.
        """
        block = self._block
        values = block.back(self._values, squared=True) + own
        if values[0].numel() > MOST_POSITIONS:
            inverse = (self._diagonal() + values).reciprocal()
            return lambda r: inverse * r
        form = (self._weights * self._error).T @ self._error
        form[self._order[:, :, None], self._order[:, None, :]] += self._spread
        factor = torch.linalg.cholesky(block.gather(form) + values.flatten(1).mean(0).diag())
        return lambda r: torch.cholesky_solve(r.flatten(1).T, factor).T.reshape(r.shape)

    def _spread_of(self, patches: Tensor) -> Tensor:
        spread = torch.einsum("kcq,cqr->kcr", patches[:, self._order], self._spread)
        out = torch.empty_like(patches)
        out[:, self._order.flatten()] = spread.flatten(1)
        return out
