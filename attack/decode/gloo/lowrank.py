"""PowerSGD, DDP's hook that sends low-rank factors in place of gradients: recognized by the sizes of its sums.

A bucket becomes three sums, none of them divided: the tensors that are not worth compressing, then P = M Q of all other
matrices M, then Q = M^T P, with P made orthogonal in between (Vogels et al. 2019, arXiv 1905.13727; torch,
powerSGD_hook.py). A rank's parts of P and Q are no gradients. Nor is its part of the first sum, but in the first step
that is compressed: with error feedback (the default) torch adds to it from then on what the rank's own gradient was off
the mean one step before. Knows shapes and sizes, no values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from attack.decode.gloo.allreduce import Vector
from attack.observation import Factor, Shapes

_MAX_RANK = 256
"""Of a factor: torch's default is 1, the paper goes to 4."""


class Matrix(NamedTuple):
    """A parameter as PowerSGD sees it."""

    parameter: int
    rows: int
    columns: int
    rank: int
    """Columns of its factors."""


class Compression(NamedTuple):
    """What becomes of a bucket."""

    plain: tuple[int, ...]
    """Parameters that are sent as they are, in order."""
    matrices: tuple[Matrix, ...]
    """The others, in the order of both factors."""


def solve_compression(shapes: Shapes, order: Sequence[int], sizes: tuple[int, int, int]) -> Compression | None:
    """The one way to compress a bucket that gives sums of these sizes; None where there is none, or a choice.

    Args:
        shapes: of all parameters.
        order: the bucket's parameters, in its order.
        sizes: elements of the three sums, as seen.
    """
    matrices = [_matrix(shapes[index]) for index in order]
    rows, columns = np.array(matrices, np.int64).reshape(-1, 2).T
    found: set[Compression] = set()
    for rank in range(1, min(max(map(min, matrices), default=0), _MAX_RANK) + 1):
        ranks = np.minimum(np.minimum(rows, columns), rank)
        # By how much compression makes each smaller: a job compresses all of more than its threshold.
        rates = rows * columns / ((rows + columns) * np.maximum(ranks, 1))
        by_rate = np.argsort(-rates, kind="stable")
        summed = [np.cumsum(part[by_rate]) for part in (rows * columns, rows * ranks, columns * ranks)]
        total = summed[0][-1]
        fits = (total - summed[0] == sizes[0]) & (summed[1] == sizes[1]) & (summed[2] == sizes[2])
        for last in np.flatnonzero(fits):
            chosen = np.zeros(len(order), np.bool_)
            chosen[by_rate[: last + 1]] = True
            if rates[chosen].min() <= rates[~chosen].max(initial=0):
                continue  # no threshold lies between
            by_shape = dict.fromkeys(matrices[at] for at in np.flatnonzero(chosen).tolist())
            grouped = [
                Matrix(order[at], *shape, int(ranks[at]))
                for shape in by_shape
                for at in np.flatnonzero(chosen).tolist()
                if matrices[at] == shape
            ]
            plain = [order[at] for at in np.flatnonzero(~chosen).tolist()]
            found.add(Compression(tuple(plain), tuple(grouped)))
    return found.pop() if len(found) == 1 else None


def factors_of(way: Compression, shapes: Shapes, sums: Sequence[Vector]) -> tuple[Factor, ...]:
    """One rank's parts of the three sums, cut up."""
    pieces: list[list[tuple[int, str, tuple[int, ...]]]] = [
        [(index, "sent", shapes[index]) for index in way.plain],
        [(one.parameter, "p", (one.rows, one.rank)) for one in way.matrices],
        [(one.parameter, "q", (one.columns, one.rank)) for one in way.matrices],
    ]
    found = []
    for vector, names in zip(sums, pieces, strict=True):
        at = 0
        for parameter, name, shape in names:
            part = slice(at, at := at + math.prod(shape))
            tensors = (
                torch.from_numpy(array[part]).view(shape) for array in (vector.values, vector.known, vector.bound)
            )
            values, known, bound = tensors
            found.append(Factor(parameter=parameter, name=name, values=values, known=known, bound=bound))
    return tuple(found)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])
