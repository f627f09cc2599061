"""PowerSGD: of each matrix a product of two thin ones, by one power iteration; what that loses is added to the next.

    M = gradient + residual,   P = orthogonal basis of M Q,   Q = M^T P,   sent = P Q^T,   residual = M - sent

    powersgd:2        rank 2

Q starts at each step where the one before ended. A tensor is a matrix of as many rows as its first dimension has; one
of which the factors would not be smaller, as those of biases, is sent as it is.

Public side: P and Q, so of M, at the first step the gradient, its products with P's columns, exactly; nothing of what
is at right angles to them. What is no matrix, exactly.

Reference: Vogels, Karimireddy, Jaggi 2019, PowerSGD, arXiv 1905.13727, algorithms 1 and 2. Differs: there P and then Q
are averaged over the ranks, which only an all-reduce can; here each rank sends its own two over any exchange, and the
mean of the products is taken. So its rank is up to W times as high, and each rank's residual is what itself has lost.
Stock jobs with torch's hook, which averages both, are read off the wire, too (docs/gloo.md).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from harness.defenses.base import Coder, Moment, Sizes, State, nothing_yet
from harness.defenses.noise import gaussian
from harness.errors import ConfigError, DefenseError
from harness.seeding import Draws
from harness.wire.coded import Coded, Float32
from harness.wire.lowrank import Factors, LowRank

MOST_NUMBERS = 1 << 19
"""Of Q: half a message, the other half is for P's rows."""
Matrices: TypeAlias = tuple[tuple[int, int, int], ...]
"""Rows, columns and rank of each tensor; rank 0: sent as it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class PowerSGD(Coder):
    """Low rank with error feedback and a warm start."""

    rank: int
    _matrices: Matrices | None = None
    """Of the model that it was fitted to."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"wanted a rank of 1 or more, e.g. 2, got {self.rank}")

    def fit(self, model: nn.Module) -> Self:
        return dataclasses.replace(self, _matrices=tuple(self._matrix(each.shape) for each in model.parameters()))

    def begin(self, sizes: Sizes) -> State:
        start = np.empty(sum(columns * rank for _, columns, rank in self._fitted(sizes)), np.float32)
        gaussian(Draws(0, "powersgd"), start)
        return {"residual": nothing_yet(sizes), "q": torch.from_numpy(start)}

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        given, kept, start = gradient.numpy(), state["residual"].numpy(), state["q"].numpy()
        sent: list[Factors | Float32] = []
        begin = begin_q = 0
        for size, (rows, columns, rank) in zip(sizes, self._fitted(sizes), strict=True):
            part, begin = slice(begin, begin + size), begin + size
            if not rank:
                sent.append(given[part].copy())
                continue
            part_q, begin_q = slice(begin_q, begin_q + columns * rank), begin_q + columns * rank
            kept[part] += given[part]
            if not np.isfinite(kept[part]).all():
                raise DefenseError("the gradient is not finite; the training diverged: lower the learning rate")
            matrix = kept[part].reshape(rows, columns)
            p = np.linalg.qr(matrix @ start[part_q].reshape(columns, rank))[0]
            q = matrix.T @ p
            if q.any():  # from nothing there is no direction to go on in
                start[part_q] = q.reshape(-1)
            factors = Factors(p, q)
            kept[part] -= factors.product()
            sent.append(factors)
        return LowRank(tuple(sent)), state

    def _matrix(self, shape: torch.Size) -> tuple[int, int, int]:
        rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        rank = min(self.rank, rows, columns)
        if (rows + columns) * rank >= rows * columns:
            return rows, columns, 0
        if columns * rank > MOST_NUMBERS:
            raise ConfigError(
                f"powersgd: a factor of {columns} x {rank} numbers; {MOST_NUMBERS} fit a message: lower the rank"
            )
        return rows, columns, rank

    def _fitted(self, sizes: Sizes) -> Matrices:
        assert self._matrices is not None, "fit comes first"
        assert tuple(rows * columns for rows, columns, _ in self._matrices) == tuple(sizes), "fitted to another model"
        return self._matrices
