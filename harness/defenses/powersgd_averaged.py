"""PowerSGD as published: its factors are averaged over the ranks, in two rounds, where ranks can sum.

    M = gradient + residual,   P = orthogonal basis of the mean of M Q,   Q = the mean of M^T P,   residual = M - P Q^T

    powersgd-averaged:2        rank 2; over allreduce and ddp

All ranks have one P and one Q, so the average has that rank. A rank's residual is what it is off that average: over all
ranks, averages + mean of the residuals = mean of the sums of gradients.

Public side: each rank's M Q and M^T P, where the sums can be taken apart; of tensors that are no matrices, all.

Reference: Vogels, Karimireddy, Jaggi 2019, PowerSGD, arXiv 1905.13727, algorithms 1 and 2; the sums of a bucket and
their order are those of torch's hook (powerSGD_hook.py), which differs in when it starts, what it factors, and that its
tensors that are no matrices have a residual, too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from harness.defenses.base import Moment, Sizes, State
from harness.defenses.powersgd import Matrices, PowerSGD
from harness.errors import DefenseError
from harness.wire.coded import Coded, Defended, Float32, Part


@dataclasses.dataclass(frozen=True, slots=True)
class PowerSGDAveraged(PowerSGD):
    """Low rank, with factors of the mean."""

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        """What is remembered is brought up to date when the ranks have averaged."""
        kept = state["residual"].numpy()
        kept += gradient.numpy()
        if not np.isfinite(kept).all():
            raise DefenseError("the gradient is not finite; the training diverged: lower the learning rate")
        return Rounds(kept, state["q"].numpy(), self._fitted(sizes)), state


@dataclasses.dataclass(frozen=True, slots=True)
class Rounds:
    """A vector that ranks average in rounds. It cannot be sent as it is."""

    kept: Float32
    """Gradient and residual; the residual alone once `average` has been called for all tensors."""
    start: Float32
    """Q of all matrices, of the step before; then of this one."""
    matrices: Matrices

    @property
    def codec(self) -> str:
        return "rounds"

    @property
    def size(self) -> int:
        return self.kept.size

    def values(self) -> Float32:
        raise DefenseError("powersgd-averaged sums factors: it needs the exchange allreduce or ddp; or take powersgd")

    def part(self, at: int, count: int) -> Part:
        raise DefenseError("powersgd-averaged sums factors: it needs the exchange allreduce or ddp; or take powersgd")

    def average(self, tensors: Sequence[int], mean: Callable[[Float32], Float32]) -> Float32:
        """The average of some tensors, one after the other; each tensor once a step.

        Args:
            mean: over the ranks, of a vector that is given away; called two or three times, by all ranks alike.
        """
        ends, ends_q = self._ends(lambda rows, columns, _: rows * columns), self._ends(lambda _, n, rank: n * rank)
        part = {each: self.kept[ends[each] : ends[each + 1]] for each in tensors}
        plain = [each for each in tensors if not self.matrices[each][2]]
        # Those of one shape together, as torch's hook has them.
        thin = sorted((each for each in tensors if self.matrices[each][2]), key=self._first_of_shape(tensors))
        averages = dict(zip(plain, _split(mean, [part[each] for each in plain]), strict=True))
        for each in plain:
            part[each][:] = 0
        matrix = {each: part[each].reshape(self.matrices[each][:2]) for each in thin}
        start = {each: self.start[ends_q[each] : ends_q[each + 1]].reshape(-1, self.matrices[each][2]) for each in thin}
        bases = [np.linalg.qr(p)[0] for p in _split(mean, [matrix[each] @ start[each] for each in thin])]
        ends_of_q = _split(mean, [matrix[each].T @ p for each, p in zip(thin, bases, strict=True)])
        for each, p, q in zip(thin, bases, ends_of_q, strict=True):
            average = p @ q.T
            matrix[each] -= average
            averages[each] = average.reshape(-1)
            if q.any():  # from nothing there is no direction to go on in
                start[each][:] = q
        return np.concatenate([*(averages[each] for each in tensors), np.empty(0, np.float32)])

    def _ends(self, count: Callable[[int, int, int], int]) -> list[int]:
        return [0, *itertools.accumulate(itertools.starmap(count, self.matrices))]

    def _first_of_shape(self, tensors: Sequence[int]) -> Callable[[int], int]:
        shapes = [self.matrices[each][:2] for each in tensors]
        return lambda each: shapes.index(self.matrices[each][:2])


def rounds_of(coded: object) -> Rounds | None:
    """The vector behind a chain that ends in averaged factors; None for any other."""
    inner = coded.coded if isinstance(coded, Defended) else coded
    return inner if isinstance(inner, Rounds) else None


def _split(mean: Callable[[Float32], Float32], arrays: list[Float32]) -> list[Float32]:
    """The mean of each array, of all of them together in one vector; nothing is asked for where there are none."""
    if not arrays:
        return []
    vector = mean(np.concatenate([array.reshape(-1) for array in arrays]))
    cut = np.cumsum([array.size for array in arrays])[:-1]
    return [piece.reshape(array.shape) for piece, array in zip(np.split(vector, cut), arrays, strict=True)]
