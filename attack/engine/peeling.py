"""A batch at a fully connected layer with a ReLU on it, taken apart without the layers above, example by example.

With e_i an example's error at the layer's outputs and u_i its input, the layer's gradient is

    A = [db, dW] = sum over i of e_i [1, u_i]'

and e_i is zero at each unit that is off for example i. So a row of A is made of the examples alone for which that unit
is on. Where it is on for one only, the row *is* that example's input, times a number that db gives. Whether it is so,
the input itself tells: it says by the public weights which units are off for it, and the rows of these must lack one
example. Then e_i is known too, is subtracted, and rows of two become rows of one. Pictures have much in common, so
units differ in how many examples they are on for, and there are mostly some to go on with.

Where there are not, e_i is sought among the combinations of A's left singular vectors that vanish on rows drawn at
random: all but one of as many rows as there are examples, and on many more if the draw was of rows off for example i.

Knows no labels, no loss and no layer but this one.

Reference: the search by drawn rows is SPEAR, Dimitrov et al., NeurIPS 2024, arXiv 2403.03945 (sections 4 and 5), which
takes the sparsest directions first too. Rows that hold one example: Fowl et al., ICLR 2022, arXiv 2110.13057, there
planted in the model by a server that cheats; here none is planted, and finding one reveals others.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from attack.engine.context import Context
from attack.engine.rank import ABOVE_NOISE, decompose

CLEAR = 1e3
"""A row is an example's input when it is so many times its noise: what is not tells too little of the units' sides."""
OPEN = 4e-3
"""Of a unit's input, as part of the largest that it could be: within that the unit's side is left open."""
LOOKS = 1024
"""Rows looked at before the examples that they are taken for are subtracted."""
SURPLUS = 3
"""Rows on which a direction vanishes beyond those that force it to."""
DRAWS = 2048
"""Directions that are tried at once, ..."""
MOST_DRAWS = 1_000_000
"""... and in all. Of a batch of 16 whose units are off for half of it, one in 2000 is an example's."""
AMONG = 2.0, 3.0, 5.0, 1e6
"""From the first so many times as many rows: those on for few examples are off for the one sought."""
POOL = 256
"""Of the directions, those that vanish on the most rows are looked at."""
VANISHING = 1e-4
"""Of a drawn direction: an error, as part of the largest that its row could have."""
NEW = 0.02
"""Sine from which on a direction is another than those that were chosen."""
SAME = 1e-3
"""Sine below which two examples' errors are one example's."""
POLISHES = 2


class NotApart(ValueError):
    """The layer's gradient was not taken apart; one line that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Apart:
    """Every example at one layer."""

    inputs: Tensor
    """float64, shape (batch, inputs)."""
    error: Tensor
    """float64, shape (batch, outputs): derivative of the mean loss by the layer's outputs."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Example:
    g: Tensor
    """[1, input] in the coordinates of `_Layer`, shape (batch,)."""
    q: Tensor
    """Its dual, shape (batch,): q g is 1, and 0 for all other examples' g. So rows @ q are its errors."""
    row: int | None = None
    """The row that it was."""


@torch.no_grad()
def peel(gradient: Tensor, noise: Tensor, public: Tensor, context: Context) -> Apart:
    """Every example's input and error.

    Args:
        gradient: [db, dW], float64, shape (outputs, 1 + inputs).
        noise: standard deviation of each element; infinite where unknown, and such rows are done without.
        public: [b, W], of the same shape.

    Raises: NotApart.
    """
    layer = _Layer(gradient, noise, public)
    try:
        return layer.polish(torch.linalg.inv(_duals(layer, context)))
    except torch.linalg.LinAlgError:
        raise NotApart("some examples' errors are nearly those of others: nothing tells them apart") from None


@torch.no_grad()
def peel_near(gradient: Tensor, noise: Tensor, public: Tensor, near: Tensor) -> Apart:
    """As `peel`, where inputs near the examples' are known, shape (batch, inputs). Raises: NotApart."""
    layer = _Layer(gradient, noise, public, batch=len(near))
    return layer.polish(torch.cat([torch.ones_like(near[:, :1]), near], 1) @ layer.right)


def count_inputs(gradient: Tensor, noise: Tensor) -> int:
    """The rank of the gradient above its noise, both as in `peel`. Raises: NotApart."""
    return _Layer(gradient, noise, gradient).batch


class _Layer:
    """The gradient's rows and the public layer in the coordinates g of the right singular vectors: [1, u] = V g."""

    def __init__(self, gradient: Tensor, noise: Tensor, public: Tensor, *, batch: int | None = None) -> None:
        """Raises: NotApart."""
        self._known = noise.isfinite().all(1)
        if int(self._known.sum()) < 2:
            raise NotApart("the layer's gradient is known for fewer than two units")
        parts = decompose(gradient[self._known], noise[self._known], rank=batch)
        self.batch, self.right = parts.rank, parts.right
        if self.batch == 0:
            raise NotApart("the layer's gradient is within its noise")
        self.rows = parts.left * parts.core
        self.noise = float(noise[self._known].max())
        """Of one coordinate of a row, as V's columns are orthonormal."""
        self.first = parts.right[0]
        self._public = public[self._known] @ parts.right
        self._room = torch.linalg.vector_norm(self._public, dim=1)
        self._live = torch.linalg.vector_norm(self.rows, dim=1) > ABOVE_NOISE * self.noise * self.batch**0.5

    def off(self, g: Tensor) -> Tensor:
        """Which units that have a gradient are surely off for inputs g, shape (examples, batch)."""
        return (self.margin(g) < -OPEN) & self._live

    def margin(self, g: Tensor) -> Tensor:
        """Units' inputs, as part of the largest that they could be; shape (..., units) for g of shape (..., batch)."""
        return g @ self._public.T / (self._room * torch.linalg.vector_norm(g, dim=-1, keepdim=True))

    def dual(self, g: Tensor, off: Tensor) -> Tensor | None:
        """q with q g = 1 and rows @ q zero where units are off; None where g, shape (batch,), is no example's.

        The rows of the units that are off for an example are of all others: they have one singular value within the
        noise, and no more.
        """
        rows = self.rows[off]
        if self.batch == 1:
            return 1 / g
        if len(rows) < self.batch - 1 + SURPLUS:
            return None
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
        limit = ABOVE_NOISE * self.noise * (len(rows) ** 0.5 + self.batch**0.5)
        scale = directions[-1] @ g
        if sizes[-1] > limit or sizes[-2] * SAME <= limit or scale.abs() <= SAME * torch.linalg.vector_norm(g):
            return None
        return directions[-1] / scale

    def examples(self, g: Tensor, rows: Tensor | None = None) -> list[_Example]:
        """Those that are examples, of candidates of shape (candidates, batch), which are these rows."""
        off = self.off(g)
        # All at once: of rows that should lack an example, the least mean square over directions.
        products = (self.rows[:, :, None] * self.rows[:, None, :]).flatten(1)
        squares = (off.to(products) @ products).view(len(g), self.batch, self.batch)
        least = torch.linalg.eigvalsh(squares)[:, 0] / off.sum(1).clamp(min=1)
        lacking = (least < (CLEAR * self.noise) ** 2).nonzero()[:, 0].tolist()
        examples = []
        for place in lacking:
            q = self.dual(g[place], off[place])
            if q is not None:
                examples.append(_Example(g=g[place], q=q, row=None if rows is None else int(rows[place])))
        return examples

    def singles(self, rest: Tensor) -> list[_Example]:
        """Those that some unit is on for alone, of those that make up the rest of the rows; the clearest first."""
        bias = rest @ self.first
        order = bias.abs().argsort(descending=True)[:LOOKS]
        order = order[bias[order].abs() > CLEAR * self.noise]
        return self.examples(rest[order] / bias[order, None], order)

    def polish(self, g: Tensor) -> Apart:
        """Inputs and errors of all examples, each one's dual found anew from all units that it says are off."""
        for _ in range(POLISHES):
            g = g / (g @ self.first)[:, None]
            off = self.off(g)
            duals = [self.dual(*pair) for pair in zip(g, off, strict=True)]
            found = [dual for dual in duals if dual is not None]
            if len(found) < self.batch:
                raise NotApart("an example has too few units off, or is nearly another one: nothing tells them apart")
            g = torch.linalg.inv(torch.stack(found, 1))
        error = g.new_zeros(len(g), len(self._known))
        error[:, self._known] = torch.linalg.lstsq(g.T, self.rows.T).solution.masked_fill(off, 0.0)
        return Apart(inputs=(g @ self.right.T)[:, 1:], error=error)


def _duals(layer: _Layer, context: Context) -> Tensor:
    """Every example's dual q, as columns. Raises: NotApart, LinAlgError."""
    g, q = layer.rows.new_zeros(0, layer.batch), layer.rows.new_zeros(layer.batch, 0)
    taken = torch.zeros_like(layer.rows[:, 0], dtype=torch.bool)  # rows that were taken for an example's
    while len(g) < layer.batch:
        if len(g):
            # A unit on for one example, and a little for another: then g is off by some of the other's, and q is not.
            g = torch.linalg.solve(g @ q, g)
        errors = layer.rows @ q
        rest = layer.rows - errors @ g
        fresh = _fresh(layer, layer.singles(rest), q)
        if not fresh:
            sure = _confirmed(errors[~taken], g, rest[~taken])
            rest = layer.rows - errors[:, sure] @ g[sure]
            fresh = _search(layer, rest, q, sure, context)
        if not fresh:
            raise NotApart(f"of {layer.batch} examples {len(g)} were found, and nothing tells the others apart")
        g = torch.cat([g, torch.stack([example.g for example in fresh])])
        q = torch.cat([q, torch.stack([example.q for example in fresh], 1)], 1)
        taken[[example.row for example in fresh if example.row is not None]] = True
    return q


def _confirmed(errors: Tensor, g: Tensor, rest: Tensor) -> Tensor:
    """Which examples' g leave nothing of some row that they have a part in; shape (examples,)."""
    part = errors.abs() * torch.linalg.vector_norm(g, dim=1)
    return (torch.linalg.vector_norm(rest, dim=1)[:, None] < VANISHING * part).any(0)


def _fresh(layer: _Layer, examples: list[_Example], found: Tensor) -> list[_Example]:
    """Of these examples those that are not among the found, whose duals are the columns given; each once."""
    known = list((layer.rows @ found).T)
    fresh = []
    for example in examples:
        error = layer.rows @ example.q
        if all(_sine(error, other) > SAME for other in known) and len(known) < layer.batch:
            known.append(error)
            fresh.append(example)
    return fresh


def _sine(one: Tensor, other: Tensor) -> float:
    across = one - (one @ other) / other.square().sum() * other
    return float(torch.linalg.vector_norm(across) / torch.linalg.vector_norm(one))


def _search(layer: _Layer, rest: Tensor, found: Tensor, gone: Tensor, context: Context) -> list[_Example]:
    """Some examples of those that make up the rest of the rows, by SPEAR's search; or none.

    Args:
        found: duals of examples, as columns.
        gone: which of these are not in the rest any more.
    """
    rank = layer.batch - int(gone.sum())
    left, _, _ = torch.linalg.svd(rest, full_matrices=False)
    left = left[:, :rank]
    rows = _fewest_first(layer, rest)
    if len(rows) < rank - 1 + SURPLUS:
        return []
    span = functional.normalize(left[rows], dim=1)
    best = functional.normalize((layer.rows @ found[:, ~gone]).T @ left, dim=1)
    for _ in range(0, MOST_DRAWS, DRAWS):
        if not context.seconds_left:
            break
        drawn = _draw(span, context)
        drawn = drawn[~((drawn @ best.T).abs() > 1 - SAME**2).any(1)]
        directions = torch.cat([best, drawn])
        vanishing = (span @ directions.T).abs().T < VANISHING
        counts = vanishing.sum(1)
        order = counts.argsort(descending=True, stable=True)[:POOL]
        order = order[counts[order] >= rank - 1 + SURPLUS]
        before, best = best, _independent(span, directions[order], vanishing[order])
        if len(best) < rank or best.equal(before):
            continue
        g = torch.linalg.lstsq(left @ best.T, rest).solution
        fresh = _fresh(layer, layer.examples(g / (g @ layer.first)[:, None]), found)
        if fresh:
            return fresh
    return []


def _fewest_first(layer: _Layer, rest: Tensor) -> Tensor:
    """Rows above the noise; those that are likely to be on for few examples before the others.

    Each row, scaled by its bias, is a mean of examples, with weights of either sign; the median over rows lies amid the
    examples, and a unit that is far from on there is on for few of them.
    """
    bias = rest @ layer.first
    rows = (bias.abs() > CLEAR * layer.noise).nonzero()[:, 0]
    if not len(rows):
        return rows
    amid = (rest[rows] / bias[rows, None]).median(0).values
    return rows[layer.margin(amid)[rows].argsort()]


def _draw(span: Tensor, context: Context) -> Tensor:
    """Unit directions, shape (draws, rank), on each of which all but one of as many rows as that vanish."""
    rank = span.shape[1]
    keys = torch.rand(DRAWS, len(span), generator=context.generator).to(span.device)
    for place, share in enumerate(AMONG):
        keys[place :: len(AMONG), int(share * rank) :] -= 1
    rows = span[keys.topk(rank - 1, dim=1).indices]
    other = context.normal((DRAWS, 1, rank)).to(span)
    wanted = torch.zeros(DRAWS, rank, dtype=span.dtype, device=span.device)
    wanted[:, -1] = 1
    directions, failed = torch.linalg.solve_ex(torch.cat([rows, other], 1), wanted)
    return functional.normalize(directions[failed == 0], dim=1)


def _independent(span: Tensor, directions: Tensor, vanishing: Tensor) -> Tensor:
    """Of unit directions the first ones that are independent, shape (at most rank, rank).

    Args:
        vanishing: on which rows each does. They must leave it alone: where they leave two, it is no one example's.
    """
    chosen: list[int] = []
    basis = directions.new_zeros(0, directions.shape[1])
    for place, direction in enumerate(directions):
        across = direction - basis.T @ (basis @ direction)
        size = torch.linalg.vector_norm(across)
        if size > NEW and (len(direction) == 1 or torch.linalg.svdvals(span[vanishing[place]])[-2] > NEW):
            basis = torch.cat([basis, across[None] / size])
            chosen.append(place)
    return directions[chosen]
