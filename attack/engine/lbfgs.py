"""L-BFGS on many searches at once, each with a curvature and a line search of its own.

Every round evaluates all searches at one point each. Where that point satisfies the weak Wolfe conditions of its own
search, the search moves there and takes a new direction; elsewhere only that search's step is bisected or doubled. So
none waits for another's line search, and a round costs one batched evaluation. Knows nothing of what is minimized.

References: Liu and Nocedal 1989, On the limited memory BFGS method; Lewis and Overton 2013, Nonsmooth optimization via
quasi-Newton methods, algorithm 2.6 (the bisection).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SUFFICIENT, CURVATURE = 1e-4, 0.9
"""Of the weak Wolfe conditions: Nocedal and Wright 2006, section 3.1."""
MAX_TRIES = 25
"""Points of one line search; then the search is exhausted."""

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Shape (searches, elements) -> values, shape (searches,), and gradients, shape (searches, elements)."""


class Searches:
    """Searches under way, row by row the same in all fields; rows can be added and dropped between rounds."""

    def __init__(self, elements: int, *, history: int, dtype: torch.dtype, device: torch.device) -> None:
        none = torch.empty(0, dtype=dtype, device=device)
        self.x = none.new_empty(0, elements)
        """Where each search is."""
        self.value = none.clone()
        """There."""
        self.exhausted = torch.empty(0, dtype=torch.bool, device=device)
        """Whether no step along the last direction, nor along the slope, made it less."""
        self._gradient = torch.empty_like(self.x)
        self._direction = torch.empty_like(self.x)
        self._step, self._low, self._high = (torch.empty_like(self.value) for _ in range(3))
        self._tries = torch.empty(0, dtype=torch.long, device=device)
        self._pairs = torch.empty(0, dtype=torch.long, device=device)  # pairs ever taken
        self._moves = none.new_empty(0, history, elements)
        self._bends = torch.empty_like(self._moves)
        # Of moves with bends, and of bends with bends; unused places hold zeros, and ones on the diagonal.
        self._products = none.new_empty(0, history, history)
        self._squares = torch.empty_like(self._products)

    def __len__(self) -> int:
        return len(self.x)

    def add(self, starts: Tensor, evaluate: Evaluate) -> None:
        """New rows at the end."""
        value, gradient = evaluate(starts)
        rows = len(starts)
        self.x, self.value = torch.cat([self.x, starts]), torch.cat([self.value, value])
        self._gradient = torch.cat([self._gradient, gradient])
        self._direction = torch.cat([self._direction, -gradient])
        self._step = torch.cat([self._step, (1 / gradient.abs().sum(1).clamp(min=1e-30)).clamp(max=1)])
        self._low = torch.cat([self._low, value.new_zeros(rows)])
        self._high = torch.cat([self._high, value.new_full((rows,), float("inf"))])
        for name in ("_tries", "_pairs", "exhausted"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(rows)]))
        for name in ("_moves", "_bends", "_products", "_squares"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(rows, *old.shape[1:])]))
        self._products[-rows:].diagonal(dim1=1, dim2=2).fill_(1)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, shape (searches,), bool."""
        for name, field in vars(self).items():
            setattr(self, name, field[rows])

    def round(self, evaluate: Evaluate) -> None:
        """One evaluation of every search."""
        trial = self.x + self._step[:, None] * self._direction
        value, gradient = evaluate(trial)
        slope = (self._gradient * self._direction).sum(1)
        low_enough = value <= self.value + SUFFICIENT * self._step * slope  # False for NaN
        flat_enough = (gradient * self._direction).sum(1) >= CURVATURE * slope
        self._tries += 1
        accepted = low_enough & (flat_enough | (self._tries >= MAX_TRIES))
        self._high = torch.where(low_enough, self._high, self._step)
        self._low = torch.where(low_enough & ~accepted, self._step, self._low)
        middle = (self._low + self._high) / 2
        self._step = torch.where(self._high.isfinite(), middle, 2 * self._step)
        self.exhausted = ~accepted & (self._tries >= MAX_TRIES)
        rows = accepted.nonzero()[:, 0]
        if len(rows):
            self._advance(rows, trial[rows], value[rows], gradient[rows])

    def _advance(self, rows: Tensor, x: Tensor, value: Tensor, gradient: Tensor) -> None:
        move, bend = x - self.x[rows], gradient - self._gradient[rows]
        bent = (move * bend).sum(1) > 0  # the weak Wolfe conditions give that, but for rounding
        at, move, bend = rows[bent], move[bent], bend[bent]
        place = self._pairs[at] % self._moves.shape[1]
        self._moves[at, place], self._bends[at, place] = move, bend
        self._products[at, :, place] = (self._moves[at] @ bend[:, :, None])[:, :, 0]
        self._products[at, place] = (self._bends[at] @ move[:, :, None])[:, :, 0]
        squares = (self._bends[at] @ bend[:, :, None])[:, :, 0]
        self._squares[at, :, place] = self._squares[at, place] = squares
        self._pairs[at] += 1
        self.x[rows], self.value[rows], self._gradient[rows] = x, value, gradient
        direction = -self._times_inverse(rows, gradient)
        downhill = (direction * gradient).sum(1, keepdim=True) < 0  # False for NaN
        self._direction[rows] = torch.where(downhill, direction, -gradient)
        self._step[rows], self._low[rows], self._high[rows], self._tries[rows] = 1, 0, float("inf"), 0

    def _times_inverse(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """H g in the compact form, with moves S, bends Y, R the upper triangle of S'Y in the order of time and D its
        diagonal:  g/c + S (R^-T (D + Y'Y/c) R^-1 S'g - R^-T Y'g/c) - Y R^-1 S'g/c,  c = y'y / s'y of the last pair.

        Reference: Byrd, Nocedal, Schnabel 1994, Representations of quasi-Newton matrices, theorem 2.2.
        """
        history, pairs = self._moves.shape[1], self._pairs[rows]
        order = (pairs[:, None] + torch.arange(history, device=pairs.device)) % history  # oldest, or unused, first
        pick = torch.arange(len(rows), device=pairs.device)[:, None]
        moves, bends = self._moves[rows], self._bends[rows]
        g = gradient[:, :, None]
        p, q = (moves @ g)[pick, order], (bends @ g)[pick, order]
        products = self._products[rows][pick[:, :, None], order[:, :, None], order[:, None]]
        squares = self._squares[rows][pick[:, :, None], order[:, :, None], order[:, None]]
        diagonal, upper = products.diagonal(dim1=1, dim2=2), products.triu()
        last = squares[:, -1, -1] > 0
        scale = torch.where(last, diagonal[:, -1] / squares[:, -1, -1].clamp(min=torch.finfo(g.dtype).tiny), 1.0)[
            :, None, None
        ]
        inner = torch.linalg.solve_triangular(upper, p, upper=True)
        right = diagonal[:, :, None] * inner + scale * (squares @ inner - q)
        outer = torch.linalg.solve_triangular(upper.mT, right, upper=False)
        back = order.argsort(1)
        inner, outer = inner[pick, back], outer[pick, back]
        return (scale * g + moves.mT @ outer - scale * (bends.mT @ inner))[:, :, 0]
