"""A convolution's weighted normal matrix, F' diag(w) F + floor + E'E, factored in stripes of rows, in float32.

Outputs of a convolution touch a few neighboring rows of its input, so F' diag(w) F couples a stripe of rows with the
next two and with no other: its Cholesky factor L is as narrow, for 3x32x32 inputs a tenth of the work of a dense one.
With D the inverses of L's diagonal blocks and C what is left of a stripe's rows of D L,

    L^-1 x = z,    z_i = D_i x_i - C_i (z_i-2, z_i-1)

The few dense rows E come in by Woodbury's identity:

    (L L' + E'E)^-1 = L^-T (1 - H (1 + H'H)^-1 H') L^-1,    H = L^-1 E'
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attack.engine.chain import Link, NoChain
from attack.engine.layers import one_output_row, pull_back, rows_touched

DAMPING = 1e-4
"""Of the diagonal's mean, which is added to it. What E then takes away again is lost to float32's rounding: with 1e-5,
two iterations of conjugate gradients more; with 1e-3, the damping itself costs as many."""


def lower_gram(rows: Tensor, blocks: int = 8) -> Tensor:
    """rows @ rows.T; above the diagonal only some of it, as no Cholesky factorization reads that: 9/16 of the work."""
    gram = rows.new_zeros(len(rows), len(rows))
    size = max(1, -(-len(rows) // blocks))
    for first in range(0, len(rows), size):
        gram[first : first + size, : first + size] = rows[first : first + size] @ rows[: first + size].T
    return gram


def cholesky(matrix: Tensor, link: Link) -> Tensor:
    """The lower factor. Raises: NoChain, where the matrix is not positive in its precision."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise NoChain(f"layer {link.name}: its equations are too ill-conditioned for {matrix.dtype}")
    return factor


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
        self._rows = self._forward(self._of_one_channel(rows.float()))  # H
        gram = lower_gram(self._rows.T)
        gram.diagonal().add_(1)
        self._gram = cholesky(gram, link)

    def solve(self, right: Tensor) -> Tensor:
        """Shape (vectors, inputs) -> the same."""
        channels, height, width = self._shape
        rows = right.new_zeros(self._count * self._stripe, channels, width, len(right), dtype=torch.float32)
        rows[:height] = right.view(-1, *self._shape).permute(2, 1, 3, 0)
        z = self._forward(self._inverses @ rows.view(self._count, self._size, -1))
        z = z - self._rows @ torch.cholesky_solve(self._rows.T @ z, self._gram)
        solved = self._inverses.mT @ self._backward(z)
        solved = solved.view(-1, channels, width, len(right))[:height]
        return solved.permute(3, 1, 0, 2).flatten(1).to(right)

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
                window[place, place] += part.T @ (of_row[row] * part)
                row += 1
            window.diagonal()[:size].add_(added)
            factor = cholesky(window[:size, :size], link)
            inverse = torch.linalg.solve_triangular(factor, torch.eye(size).to(factor), upper=False)
            self._inverses[stripe] = inverse
            self._carried[stripe] = inverse @ torch.cat([before[0][size:], before[1][:size]], 1)
            below = window[size:, :size] @ inverse.T
            before = [before[1], below]
            rest = window[size:, size:] - below @ below.T
            window = torch.zeros_like(window)
            window[: 2 * size, : 2 * size] = rest

    def _forward(self, driven: Tensor) -> Tensor:
        """L^-1 x, shape (stripes x elements, vectors), from D x, shape (stripes, elements, vectors)."""
        z = torch.cat([torch.zeros_like(driven[:1]), torch.zeros_like(driven[:1]), driven])
        for stripe, carried in enumerate(self._carried):
            z[stripe + 2].addmm_(carried, z[stripe : stripe + 2].flatten(0, 1), alpha=-1)
        return z[2:].flatten(0, 1)

    def _backward(self, z: Tensor) -> Tensor:
        """D'^-1 L^-T z, shape (stripes, elements, vectors)."""
        y = torch.cat([z.new_zeros(2 * self._size, z.shape[1]), z]).view(-1, self._size, z.shape[1])
        for stripe in range(self._count - 1, -1, -1):
            y[stripe : stripe + 2].flatten(0, 1).addmm_(self._carried[stripe].T, y[stripe + 2], alpha=-1)
        return y[2:]

    def _of_one_channel(self, rows: Tensor) -> Tensor:
        """D E', for `rows` in each channel, zero in the others: shape (stripes, elements, channels x rows)."""
        channels, height, width = self._shape
        padded = rows.new_zeros(self._count * self._stripe * width, len(rows))
        padded[: height * width] = rows.T
        striped = padded.view(self._count, 1, self._stripe * width, -1)
        blocks = self._inverses.view(self._count, self._size, self._stripe, channels, width)
        driven = blocks.permute(0, 3, 1, 2, 4).flatten(3) @ striped  # (stripes, channels, elements, rows)
        return driven.transpose(1, 2).flatten(2)
