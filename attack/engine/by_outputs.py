"""A layer's weighted normal matrix, F' P F + floor + E'E, inverted in float32 by way of its outputs, which are few.

In the eigenvectors of E'E, the same for every input channel, most directions s of the input are known well, with
variances C; the others, o, are open. Seen from the outputs, the known ones are noise of covariance S = P^-1 + F_s C
F_s', and so

    (1/C_o + F_o' S^-1 F_o) a_o = r_o - F_o' S^-1 F_s C r_s,    a_s = C (r_s - F_s' S^-1 (F_s C r_s + F_o a_o))
"""

from __future__ import annotations

import torch
from torch import Tensor

from attack.engine.chain import Link
from attack.engine.factor import Cholesky, lower_product
from attack.engine.layers import phases, pull_back, push, push_covariance, push_each

KNOWN = 1e-3
"""A direction of a layer's input is known where its gradient rows say more than this share of what the forward rows
say of an element. Float32 tells S from what it is made of down to some 1e-5 of that."""


class ByOutputs:
    """Multiplies by the matrix's inverse, near enough to precondition.

    Args:
        link: a linear or two-dimensional convolutional layer.
        precision: P, of the outputs, flat.
        rows: E of one input channel, shape (rows, elements of a channel); the same in each.
        floor: what is added to the diagonal.

    Raises: NoChain, where the matrix is not positive in float32.
    """

    def __init__(self, link: Link, precision: Tensor, rows: Tensor, floor: float) -> None:
        self._link, self._rows, self._channels = link, rows, link.inputs // rows.shape[1]
        self._weight = next(link.module.parameters()).float()
        values, vectors = _eigenvectors(rows.T @ rows, link)
        values = values.clamp(min=0) + floor
        says = precision.float().clamp(min=1e-12 * float(precision.max()) + torch.finfo(torch.float32).tiny)
        typical = float(pull_back(link, says[None], self._weight.square()).mean())  # of the diagonal of F'PF
        opened = values < KNOWN * typical
        self._open, known = vectors[:, opened].float(), vectors[:, ~opened].float()
        self._covariance = known / values[~opened].float() @ known.T

        noise = push_covariance(link, self._covariance, self._weight)
        noise.diagonal().add_(1 / says)
        self._noise = Cholesky(noise, link)
        self._forward_open = push_each(link, self._open.T, self._weight).flatten(1)  # F_o
        forward = self._noise.forward(self._forward_open.T)
        matrix = lower_product(forward, forward)
        matrix.diagonal().add_(values[opened].float().repeat(self._channels))
        self._matrix = Cholesky(matrix, link)

    def solve(self, right: Tensor, rows: Tensor) -> Tensor:
        """The inverse times `right` + E'`rows`: (vectors, inputs), (vectors, channels, rows) -> (vectors, inputs)."""
        r = (right.view(len(right), self._channels, -1) + rows @ self._rows).float()
        explained = self._noise.solve(push(self._link, (r @ self._covariance).flatten(1), self._weight))
        free = self._matrix.solve((r @ self._open).flatten(1) - explained @ self._forward_open)
        explained = explained + self._noise.solve(free @ self._forward_open.T)
        left = r - pull_back(self._link, explained, self._weight).view_as(r)
        known = left @ self._covariance + free.view(len(r), self._channels, -1) @ self._open.T
        return known.flatten(1).to(right)


def _eigenvectors(gram: Tensor, link: Link) -> tuple[Tensor, Tensor]:
    """Eigenvalues and, in columns, eigenvectors of E'E, in no order: of each phase by itself."""
    values, vectors, first = gram.new_empty(len(gram)), torch.zeros_like(gram), 0
    for phase in phases(link):
        found = slice(first, first + len(phase))
        values[found], vectors[phase, found] = torch.linalg.eigh(gram[phase[:, None], phase])
        first = found.stop
    return values, vectors
