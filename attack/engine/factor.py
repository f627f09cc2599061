"""The Cholesky factor of a positive matrix, in blocks, with the inverses of its diagonal blocks.

By products of matrices all but, which take a third of the time of LAPACK's factors: M = L L', and with D the inverses
of L's diagonal blocks,

    L^-1 x = z,    z_i = D_i (x_i - sum over j < i of L_ij z_j)
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attack.engine.chain import Link, NoChain

BLOCK = 192
"""Rows of a block: LAPACK takes those apart."""


PARTS = 10
"""In which `lower_product` takes its rows: 55 of 100 products remain."""


def lower_product(rows: Tensor, others: Tensor) -> Tensor:
    """rows @ others.T, but not what is far above the diagonal, which no Cholesky factorization reads: that is not set.

    Args:
        rows, others: shape (rows, elements), as many of both.

    Returns: shape (rows, rows).
    """
    product = rows.new_empty(len(rows), len(rows))
    size = max(1, -(-len(rows) // PARTS))
    for first in range(0, len(rows), size):
        here = slice(first, first + size)
        torch.matmul(rows[here], others[: here.stop].T, out=product[here, : here.stop])
    return product


def inverse_factor(matrix: Tensor, link: Link) -> Tensor:
    """The inverse of the Cholesky factor, lower triangular, of a matrix of which the lower triangle alone is read.

    Raises: NoChain, where the matrix is not positive in its precision.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise NoChain(f"layer {link.name}: its equations are too ill-conditioned for {matrix.dtype}")
    return torch.linalg.solve_triangular(factor, torch.eye(len(matrix)).to(factor), upper=False)


class Cholesky:
    """L, of a matrix, shape (elements, elements), of which the lower triangle alone is read; it is overwritten.

    Raises: NoChain, where the matrix is not positive in its precision.
    """

    def __init__(self, matrix: Tensor, link: Link) -> None:
        self._lower, self._inverses = matrix, list[Tensor]()
        count = max(1, round(len(matrix) / BLOCK))
        edges = [len(matrix) * block // count for block in range(count + 1)]
        self._blocks = list(itertools.pairwise(edges))
        for first, end in self._blocks:
            matrix[first:, first:end].addmm_(matrix[first:, :first], matrix[first:end, :first].T, alpha=-1)
            inverse = inverse_factor(matrix[first:end, first:end], link)
            matrix[end:, first:end] = matrix[end:, first:end] @ inverse.T
            self._inverses.append(inverse)

    def forward(self, rows: Tensor) -> Tensor:
        """L^-1 of each: shape (vectors, elements), as given."""
        found = torch.empty_like(rows)
        for (first, end), inverse in zip(self._blocks, self._inverses, strict=True):
            left = torch.addmm(rows[:, first:end], found[:, :first], self._lower[first:end, :first].T, alpha=-1)
            torch.matmul(left, inverse.T, out=found[:, first:end])
        return found

    def backward(self, rows: Tensor) -> Tensor:
        """L'^-1 of each: shape (vectors, elements), as given."""
        found = torch.empty_like(rows)
        for (first, end), inverse in zip(self._blocks[::-1], self._inverses[::-1], strict=True):
            left = torch.addmm(rows[:, first:end], found[:, end:], self._lower[end:, first:end], alpha=-1)
            torch.matmul(left, inverse, out=found[:, first:end])
        return found

    def solve(self, rows: Tensor) -> Tensor:
        """The matrix's inverse times each: shape (vectors, elements), as given."""
        return self.backward(self.forward(rows))
