"""A convolution's weighted normal matrix, F' diag(w) F + floor + E'E, factored in stripes of rows, in float32.

Outputs of a convolution touch a few neighboring rows of its input, so F' diag(w) F couples a stripe of rows with the
next one and with no other: it is block tridiagonal, and its Cholesky factor L is as narrow, for 3x32x32 inputs a tenth
of the work of a dense one. The few dense rows E come in by Woodbury's identity:

    (L L' + E'E)^-1 = L^-T (1 - H (1 + H'H)^-1 H') L^-1,    H = L^-1 E'
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from attack.engine.chain import Link, NoChain
from attack.engine.layers import one_output_row, rows_touched

DAMPING = 1e-5
"""Of the diagonal's mean, which is added to it: float32 cannot tell smaller eigenvalues from zero."""


def lower_gram(rows: Tensor, blocks: int = 4) -> Tensor:
    """rows @ rows.T; above the diagonal only some of it, as no Cholesky factorization reads that: 5/8 of the work."""
    gram = rows.new_zeros(len(rows), len(rows))
    size = max(1, -(-len(rows) // blocks))
    for first in range(0, len(rows), size):
        gram[first : first + size, : first + size] = rows[first : first + size] @ rows[: first + size].T
    return gram


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
        self._carried: list[Tensor] = []  # what a stripe's part of L^-1 x takes of the part before
        carried = torch.diag(pairs.new_full((size,), floor + damping))
        for pair in pairs:
            factor, failed = torch.linalg.cholesky_ex(pair[:size, :size] + carried)
            if failed:
                raise NoChain(f"layer {link.name}: its equations are too ill-conditioned for float32")
            inverse = torch.linalg.solve_triangular(factor, torch.eye(size).to(factor), upper=False)
            self._carried.append(self._below[-1].T @ inverse.T if self._below else inverse.new_zeros(size, size))
            self._inverses.append(inverse)
            self._below.append(pair[size:, :size] @ self._inverses[-1].T)
            carried = pair[size:, size:] - self._below[-1] @ self._below[-1].T
            carried.diagonal().add_(floor + damping)

        self._rows = self._forward(self._of_one_channel(rows.float()))  # H'
        gram = lower_gram(self._rows)
        gram.diagonal().add_(1)
        self._gram, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise NoChain(f"layer {link.name}: its equations are too ill-conditioned for float32")

    def solve(self, right: Tensor) -> Tensor:
        """Shape (vectors, inputs) -> the same."""
        striped = self._striped(right.float())
        z = self._forward(part @ inverse.T for part, inverse in zip(striped.unbind(1), self._inverses, strict=True))
        z = z - torch.cholesky_solve(self._rows @ z.T, self._gram).T @ self._rows
        parts = list(z.view(len(z), self._count, -1).unbind(1))
        for at in range(self._count - 1, -1, -1):
            below = parts[at + 1] @ self._below[at] if at + 1 < self._count else 0
            parts[at] = (parts[at] - below) @ self._inverses[at]
        channels, height, width = self._shape
        solved = torch.stack(parts, 1).view(len(right), -1, channels, width)[:, :height]
        return solved.transpose(1, 2).flatten(1).to(right)

    def _forward(self, driven: Iterable[Tensor]) -> Tensor:
        """L^-1 x, shape (vectors, stripes x elements), from the stripes of x, each by its own block's inverse."""
        parts: list[Tensor] = []
        for carried, own in zip(self._carried, driven, strict=True):
            parts.append(own - parts[-1] @ carried if parts else own)
        return torch.cat(parts, 1)

    def _of_one_channel(self, rows: Tensor) -> Iterator[Tensor]:
        """What drives `_forward` for `rows` in each channel, zero in the others: shape (channels x rows, elements)."""
        channels, height, width = self._shape
        padded = rows.new_zeros(len(rows), self._count * self._stripe * width)
        padded[:, : height * width] = rows
        for part, inverse in zip(padded.split(self._stripe * width, dim=1), self._inverses, strict=True):
            by_channel = inverse.T.reshape(self._stripe, channels, width, -1).transpose(0, 1).flatten(1, 2)
            yield (part @ by_channel).flatten(0, 1)

    def _striped(self, inputs: Tensor) -> Tensor:
        channels, height, width = self._shape
        by_row = inputs.view(-1, *self._shape).transpose(1, 2).flatten(2)
        padded = by_row.new_zeros(len(by_row), self._count * self._stripe, channels * width)
        padded[:, :height] = by_row
        return padded.view(len(by_row), self._count, -1)
