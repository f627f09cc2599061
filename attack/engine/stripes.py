"""A convolution's weighted normal matrix, F' diag(w) F + floor + E'E, factored in stripes of rows, in float32.

Outputs of a convolution touch a few neighboring rows of its input, so F' diag(w) F couples a stripe of rows with the
next one and with no other: it is block tridiagonal, and its Cholesky factor L is as narrow, for 3x32x32 inputs a tenth
of the work of a dense one. The few dense rows E come in by Woodbury's identity:

    (L L' + E'E)^-1 = L^-T (1 - H (1 + H'H)^-1 H') L^-1,    H = L^-1 E'
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attack.engine.chain import Link, NoChain
from attack.engine.layers import one_output_row, rows_touched

DAMPING = 1e-5
"""Of the diagonal's mean, which is added to it: float32 cannot tell smaller eigenvalues from zero."""


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
        self._shape = link.input_shape
        channels, height, width = link.input_shape
        touched = one_output_row(link, torch.float32).transpose(1, 2)  # (outputs x columns, rows, channels, width)
        self._stripe = max(touched.shape[1] - 1, 1)  # rows further apart share no output
        self._count = -(-height // self._stripe)
        size = self._stripe * channels * width
        pairs = touched.new_zeros(self._count, 2 * size, 2 * size)  # of each stripe and the next
        outputs, count, _ = link.output_shape
        for row, weight in enumerate(weights.float().view(outputs, count, -1).transpose(0, 1).flatten(1)):
            there, inside = rows_touched(link, row)
            part = touched[:, inside].flatten(1)
            stripe, offset = divmod(there.start, self._stripe)
            at = offset * channels * width
            pairs[stripe, at : at + part.shape[1], at : at + part.shape[1]] += part.T @ (weight[:, None] * part)
        diagonal = pairs.diagonal(dim1=1, dim2=2)
        damping = DAMPING * float(diagonal.sum()) / (self._count * size)

        self._inverses: list[Tensor] = []
        self._below: list[Tensor] = []
        carried = torch.diag(pairs.new_full((size,), floor + damping))
        for pair in pairs:
            factor, failed = torch.linalg.cholesky_ex(pair[:size, :size] + carried)
            if failed:
                raise NoChain(f"layer {link.name}: its equations are too ill-conditioned for float32")
            self._inverses.append(torch.linalg.solve_triangular(factor, torch.eye(size).to(factor), upper=False))
            self._below.append(pair[size:, :size] @ self._inverses[-1].T)
            carried = pair[size:, size:] - self._below[-1] @ self._below[-1].T
            carried.diagonal().add_(floor + damping)

        dense = rows.new_zeros(channels, len(rows), channels, rows.shape[1], dtype=torch.float32)
        dense.diagonal(dim1=0, dim2=2).copy_(rows[:, :, None].expand(-1, -1, channels))
        self._rows = self._forward(self._striped(dense.flatten(2).flatten(0, 1)))  # H'
        gram = self._rows @ self._rows.T
        gram.diagonal().add_(1)
        self._gram, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise NoChain(f"layer {link.name}: its equations are too ill-conditioned for float32")

    def solve(self, right: Tensor) -> Tensor:
        """Shape (vectors, inputs) -> the same."""
        z = self._forward(self._striped(right.float()))
        z = z - torch.cholesky_solve(self._rows @ z.T, self._gram).T @ self._rows
        parts = list(z.view(len(z), self._count, -1).unbind(1))
        for at in range(self._count - 1, -1, -1):
            below = parts[at + 1] @ self._below[at] if at + 1 < self._count else 0
            parts[at] = (parts[at] - below) @ self._inverses[at]
        channels, height, width = self._shape
        solved = torch.stack(parts, 1).view(len(right), -1, channels, width)[:, :height]
        return solved.transpose(1, 2).flatten(1).to(right)

    def _forward(self, striped: Tensor) -> Tensor:
        """L^-1, shape (vectors, stripes, elements) -> (vectors, stripes x elements)."""
        parts = list(striped.unbind(1))
        for at, inverse in enumerate(self._inverses):
            above = parts[at - 1] @ self._below[at - 1].T if at else 0
            parts[at] = (parts[at] - above) @ inverse.T
        return torch.cat(parts, 1)

    def _striped(self, inputs: Tensor) -> Tensor:
        channels, height, width = self._shape
        by_row = inputs.view(-1, *self._shape).transpose(1, 2).flatten(2)
        padded = by_row.new_zeros(len(by_row), self._count * self._stripe, channels * width)
        padded[:, :height] = by_row
        return padded.view(len(by_row), self._count, -1)
