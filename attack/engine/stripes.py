"""A convolution's weighted normal matrix, F' diag(w) F + floor + E'E, factored in stripes of rows, in float32.

Outputs of a convolution touch a few neighboring rows of its input, so F' diag(w) F couples a stripe of rows with the
next two and with no other: its Cholesky factor L is as narrow, for 3x32x32 inputs a tenth of the work of a dense one.
With D the inverses of L's diagonal blocks and C what is left of a stripe's rows of D L,

    L^-1 x = z,    z_i = D_i x_i - C_i (z_i-2, z_i-1)

The few dense rows E come in by Woodbury's identity, with H = L^-1 E':

    (L L' + E'E)^-1 (x + E'y) = L^-T (L^-1 x + H (1 + H'H)^-1 (y - H'L^-1 x))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.engine.chain import Link, NoChain
from attack.engine.layers import one_output_row, pull_back, rows_touched

DAMPING = 1e-5
"""Of the diagonal's mean, which is added to it: float32 cannot tell smaller eigenvalues from zero."""
WHOLE = 256
"""Rows of a matrix that is factored as a whole."""


def lower_gram(rows: Tensor, blocks: int = 8) -> Tensor:
    """rows @ rows.T; above the diagonal only some of it, as no Cholesky factorization reads that: 9/16 of the work."""
    gram = rows.new_zeros(len(rows), len(rows))
    size = max(1, -(-len(rows) // blocks))
    for first in range(0, len(rows), size):
        gram[first : first + size, : first + size] = rows[first : first + size] @ rows[: first + size].T
    return gram


def whitening(matrix: Tensor, link: Link) -> Tensor:
    """W, lower triangular, with W'W the inverse of a matrix of which only the lower triangle is read.

    Halves are taken apart by products of matrices, which take a third of the time of LAPACK's factors.

    Raises: NoChain, where the matrix is not positive in its precision.
    """
    size = len(matrix)
    if size <= WHOLE:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            raise NoChain(f"layer {link.name}: its equations are too ill-conditioned for {matrix.dtype}")
        return torch.linalg.solve_triangular(factor, torch.eye(size).to(factor), upper=False)
    half = size // 2
    first = whitening(matrix[:half, :half], link)
    below = matrix[half:, :half] @ first.T
    second = whitening(torch.addmm(matrix[half:, half:], below, below.T, alpha=-1), link)
    whole = torch.zeros_like(matrix)
    whole[:half, :half], whole[half:, half:] = first, second
    whole[half:, :half] = -second @ (below @ first)
    return whole


class Stripes:
    """The factored matrix; multiplies by its inverse, near enough to precondition.

    Args:
        link: a two-dimensional convolution.
        weights: of the outputs, flat.
        rows: E of one input channel, shape (rows, height x width); the same in each.
        floor: what is added to the diagonal.

    Raises: NoChain, where the matrix is not positive in float32.
    """

    def __init__(self, link: Link, weights: Tensor, rows: Tensor, floor: float) -> None:
        assert isinstance(link.module, nn.Conv2d)
        self._shape = channels, height, width = link.input_shape
        touched = one_output_row(link, torch.float32).transpose(1, 2)  # (outputs x columns, rows, channels, width)
        self._stripe = max(1, touched.shape[1] // 2)  # rows that share an output are at most two stripes apart
        self._count = -(-height // self._stripe)
        self._size = self._stripe * channels * width
        self._inverses = touched.new_empty(self._count, self._size, self._size)  # D
        self._carried = touched.new_empty(self._count, self._size, 2 * self._size)  # C
        self._factor(link, touched, weights.float(), floor)
        self._rows = self._forward(self._of_one_channel(rows.float()), channels * len(rows))  # H'
        gram = lower_gram(self._rows)
        gram.diagonal().add_(1)
        self._whitening = whitening(gram, link)

    def solve(self, right: Tensor, rows: Tensor) -> Tensor:
        """The inverse times `right` + E'`rows`: (vectors, inputs) and (vectors, channels, rows) -> (vectors, inputs).

        Apart, so that float32 need not take away again nearly all of what the rows say.
        """
        channels, height, width = self._shape
        padded = right.new_zeros(len(right), self._count * self._stripe, channels, width, dtype=torch.float32)
        padded[:, :height] = right.view(-1, *self._shape).transpose(1, 2)
        striped = padded.view(len(right), self._count, -1).unbind(1)
        z = self._forward((own @ d.T for own, d in zip(striped, self._inverses, strict=True)), len(right))
        unexplained = rows.flatten(1).float() - z @ self._rows.T
        z = z + unexplained @ self._whitening.T @ self._whitening @ self._rows
        parts = self._backward(z).view(len(right), -1, self._size).unbind(1)
        solved = torch.stack([part @ d for part, d in zip(parts, self._inverses, strict=True)], 1)
        return solved.view_as(padded)[:, :height].transpose(1, 2).flatten(1).to(right)

    def _factor(self, link: Link, touched: Tensor, weights: Tensor, floor: float) -> None:
        """D and C, stripe after stripe, each taken out of those that follow."""
        size, (outputs, count, _) = self._size, link.output_shape
        weight = next(link.module.parameters()).float()
        added = floor + DAMPING * float(pull_back(link, weights[None], weight.square()).mean())
        of_row = weights.view(outputs, count, -1).transpose(0, 1).flatten(1)[:, :, None]
        window = touched.new_zeros(3 * size, 3 * size)  # of a stripe and the next two
        before = [touched.new_zeros(2 * size, size)] * 2  # what L holds below the last two stripes' blocks
        row = 0
        for stripe in range(self._count):
            while row < count and rows_touched(link, row)[0].start < (stripe + 1) * self._stripe:
                there, inside = rows_touched(link, row)
                part = touched[:, inside].flatten(1)
                at = (there.start - stripe * self._stripe) * size // self._stripe
                place = slice(at, at + part.shape[1])
                window[place, place].addmm_(part.T, of_row[row] * part)
                row += 1
            window.diagonal()[:size].add_(added)
            inverse = whitening(window[:size, :size], link)
            self._inverses[stripe] = inverse
            torch.matmul(inverse, torch.cat([before[0][size:], before[1][:size]], 1), out=self._carried[stripe])
            below = window[size:, :size] @ inverse.T
            before = [before[1], below]
            rest = window[size:, size:].addmm_(below, below.T, alpha=-1)
            window = torch.zeros_like(window)
            window[: 2 * size, : 2 * size] = rest

    def _forward(self, driven: Iterable[Tensor], vectors: int) -> Tensor:
        """L^-1 x, shape (vectors, stripes x elements), from D x, stripe after stripe."""
        size = self._size
        z = self._inverses.new_zeros(vectors, (self._count + 2) * size)
        for first, carried, own in zip(range(0, z.shape[1], size), self._carried, driven, strict=False):
            before, here = z[:, first : first + 2 * size], z[:, first + 2 * size : first + 3 * size]
            here.copy_(own).addmm_(before, carried.T, alpha=-1)
        return z[:, 2 * size :]

    def _backward(self, z: Tensor) -> Tensor:
        """D'^-1 L^-T z, shape (vectors, stripes x elements)."""
        size = self._size
        y = functional.pad(z, (2 * size, 0))
        for stripe in range(self._count - 1, -1, -1):
            here, before = y[:, (stripe + 2) * size :][:, :size], y[:, stripe * size :][:, : 2 * size]
            before.addmm_(here, self._carried[stripe], alpha=-1)
        return y[:, 2 * size :]

    def _of_one_channel(self, rows: Tensor) -> Iterator[Tensor]:
        """D E', for `rows` in each channel, zero in the others: shape (channels x rows, elements), each stripe's."""
        channels, height, width = self._shape
        padded = rows.new_zeros(len(rows), self._count * self._stripe * width)
        padded[:, : height * width] = rows
        for part, inverse in zip(padded.split(self._stripe * width, dim=1), self._inverses, strict=True):
            by_channel = inverse.T.reshape(self._stripe, channels, width, -1).transpose(0, 1).flatten(1, 2)
            yield (part @ by_channel).flatten(0, 1)
