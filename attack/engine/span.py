"""Which vectors a linear layer was given: those in the row space of its gradient.

    gradient = sum_n dY_n x_n^T + errors

With fewer independent x_n than columns, each x_n is a combination of the gradient's rows, and hardly any other vector
is. The errors blur that: a direction counts as far as its singular value stands above theirs.

Reference: DAGER, Petrov, Dimitrov, Baader, Müller, Vechev 2024, arXiv 2405.15586, section 4.1.
Differs from the paper: the rank is where the spectrum falls to the errors of float32 arithmetic, and the threshold is
derived from both, where the paper sets them by hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attack.engine.anatomy import Rows

EDGE = 4.0
"""Largest singular value of errors, in units of what independent ones of that deviation have (1 + sqrt(rows/columns)):
rounding of sums is not quite independent."""
MARGIN = 30.0
"""Between what a true input lacks, by its least singular value and the errors' deviation, and the threshold."""


class Span:
    """The row space of a gradient."""

    def __init__(self, rows: Rows) -> None:
        count, self.width = rows.values.shape
        _, self.values, self._directions = torch.linalg.svd(rows.values, full_matrices=False)
        """float64: singular values, the largest first."""
        edge = rows.noise * (math.sqrt(count) + math.sqrt(self.width))
        self.rank = int((self.values > EDGE * edge).sum())
        """Independent inputs that are seen."""
        least = float(self.values[self.rank - 1]) if self.rank else math.inf
        blur = rows.noise * math.sqrt(self.width)
        self._weights = 1 / (1 + (self.values / blur).square())
        self.threshold = MARGIN * max((blur / least) ** 2, torch.finfo(torch.float32).eps ** 2)
        """Of `lack`: more than an input's own part in the gradient and the errors beside it leave of it."""

    @property
    def room(self) -> int:
        """Independent inputs that there can be: those of a norm add up to a constant."""
        return self.width - 1

    @property
    def full(self) -> bool:
        """Whether there are as many independent inputs as there is room for, so that every vector is in it."""
        return self.rank >= self.room

    def lack(self, vectors: Tensor) -> Tensor:
        """Share of each vector, shape (..., width), that no input explains, 0 to 1, shape (...)."""
        along = (vectors @ self._directions.T).square()
        whole = vectors.square().sum(-1)
        outside = (whole - along.sum(-1)).clamp(min=0) if len(self.values) < self.width else 0.0
        return ((along * self._weights).sum(-1) + outside) / whole

    def has(self, vectors: Tensor) -> Tensor:
        """bool, shape (...): whether a vector is in the span."""
        return self.lack(vectors) < self.threshold

    def doubt(self, vectors: Tensor) -> float:
        """The largest lack of several, in units of the threshold: below one, all are in the span."""
        return float(self.lack(vectors).max()) / self.threshold

    def complement(self, vectors: Tensor) -> Tensor:
        """What of each vector lies outside, shape (..., width - rank), by coordinates."""
        return vectors @ self._directions[self.rank :].T

    def outside(self, coordinates: Tensor) -> Tensor:
        """The vectors outside with these coordinates, shape (..., width - rank), as `complement` gives them."""
        return coordinates @ self._directions[self.rank :]
