"""A convolution's weighted normal matrix, F' diag(w) F + floor + E'E, factored in stripes of rows, in float32.

Outputs of a convolution touch a few neighboring rows of its input, so F' diag(w) F couples a row with few rows above
it, and its Cholesky factor L with no others: for 3x32x32 inputs that is a tenth of the work of a dense one. Stripes
end where the windows of outputs end, which keeps what is above them narrow. With D the inverses of L's diagonal blocks
and C what is left of a stripe's rows of D L,

    L^-1 x = z,    z_i = D_i x_i - C_i z_above

The few dense rows E come in by Woodbury's identity, with H = L^-1 E':

    (L L' + E'E)^-1 (x + E'y) = L^-T (L^-1 x + H (1 + H'H)^-1 (y - H'L^-1 x))
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from attack.engine.chain import Link
from attack.engine.factor import Cholesky, inverse_factor, lower_product
from attack.engine.layers import one_output_row, pull_back, rows_touched

DAMPING = 1e-5
"""Of the diagonal's mean, which is added to it: float32 cannot tell smaller eigenvalues from zero."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Stripe:
    """Rows of the input, and of the factor."""

    above: slice
    """The elements before `own` with which those are coupled; elements go by row, channel and column."""
    own: slice
    inverse: Tensor
    """D, shape (own, own)."""
    carried: Tensor
    """C = D L, shape (own, above)."""


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
        self._shape = link.input_shape
        self._stripes = _factored(link, weights.float(), floor)
        self._rows = self._forward(self._of_one_channel(rows.float()), self._shape[0] * len(rows))  # H'
        gram = lower_product(self._rows, self._rows)
        gram.diagonal().add_(1)
        self._gram = Cholesky(gram, link)

    def solve(self, right: Tensor, rows: Tensor) -> Tensor:
        """The inverse times `right` + E'`rows`: (vectors, inputs) and (vectors, channels, rows) -> (vectors, inputs).

        Apart, so that float32 need not take away again nearly all of what the rows say.
        """
        channels, height, width = self._shape
        x = right.float().view(-1, *self._shape).transpose(1, 2).flatten(1)
        z = self._forward((x[:, stripe.own] @ stripe.inverse.T for stripe in self._stripes), len(right))
        unexplained = rows.flatten(1).float() - z @ self._rows.T
        y = z + self._gram.solve(unexplained) @ self._rows
        for stripe in reversed(self._stripes):
            y[:, stripe.above].addmm_(y[:, stripe.own], stripe.carried, alpha=-1)
            y[:, stripe.own] = y[:, stripe.own] @ stripe.inverse
        return y.view(-1, height, channels, width).transpose(1, 2).flatten(1).to(right)

    def _forward(self, driven: Iterable[Tensor], vectors: int) -> Tensor:
        """L^-1 x, shape (vectors, elements), from D x, stripe after stripe."""
        z = self._stripes[0].inverse.new_empty(vectors, self._stripes[-1].own.stop)
        for stripe, own in zip(self._stripes, driven, strict=True):
            torch.addmm(own, z[:, stripe.above], stripe.carried.T, alpha=-1, out=z[:, stripe.own])
        return z

    def _of_one_channel(self, rows: Tensor) -> Iterable[Tensor]:
        """D E', for `rows` in each channel, zero in the others: shape (channels x rows, elements), each stripe's."""
        channels, _, width = self._shape
        for stripe in self._stripes:
            by_channel = stripe.inverse.T.unflatten(0, (-1, channels, width)).transpose(0, 1).flatten(1, 2)
            part = rows[:, stripe.own.start // channels : stripe.own.stop // channels]
            yield (part @ by_channel).flatten(0, 1)


def _factored(link: Link, weights: Tensor, floor: float) -> list[_Stripe]:
    """From the first row to the last. Raises: NoChain."""
    assert isinstance(link.module, nn.Conv2d)
    (outputs, count, _), (channels, _, width) = link.output_shape, link.input_shape
    touched = one_output_row(link, torch.float32).transpose(1, 2).flatten(1)  # (outputs x columns, rows touched)
    of_row = weights.view(outputs, count, -1).transpose(0, 1).flatten(1)[:, :, None]
    added = floor + DAMPING * float(pull_back(link, weights[None], link.module.weight.float().square()).mean())
    unit = channels * width
    windows = [rows_touched(link, row) for row in range(count)]
    stripes: list[_Stripe] = []
    before: list[tuple[_Stripe, Tensor]] = []
    for first, end in itertools.pairwise(_edges(link)):
        met = [row for row, (there, _) in enumerate(windows) if there.start < end and there.stop > first]
        above = min(first, *(windows[row][0].start for row in met)) if met else first
        block = touched.new_zeros((end - first) * unit, (end - above) * unit)
        for row in met:
            there, inside = windows[row]
            start = inside.start - there.start  # of the window, in rows of the input
            own, upto = slice(max(there.start, first), min(there.stop, end)), slice(there.start, min(there.stop, end))
            part = touched[:, (own.start + start) * unit : (own.stop + start) * unit]
            weighted = of_row[row] * touched[:, (upto.start + start) * unit : (upto.stop + start) * unit]
            place = slice((own.start - first) * unit, (own.stop - first) * unit)
            block[place, (upto.start - above) * unit : (upto.stop - above) * unit].addmm_(part.T, weighted)
        block.diagonal((first - above) * unit).add_(added)
        before = [(other, lower) for other, lower in before if other.own.stop > above * unit]
        before.append(_next_stripe(block, above * unit, first * unit, before, link))
        stripes.append(before[-1][0])
    return stripes


def _edges(link: Link) -> list[int]:
    """The rows between which stripes lie: each ends with the window of an output, but for the last."""
    module, height = link.module, link.input_shape[1]
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    reach, stride = module.dilation[0] * (module.kernel_size[0] - 1) + 1, module.stride[0]
    rows = stride * max(1, reach // (2 * stride))
    return [0, *range(1 + (reach - module.padding[0] - 1) % rows, height, rows), height]


def _next_stripe(
    block: Tensor, above: int, first: int, before: list[tuple[_Stripe, Tensor]], link: Link
) -> tuple[_Stripe, Tensor]:
    """A stripe, with L's rows left of its diagonal block, shape (own, above).

    Args:
        block: the matrix's rows, left of the diagonal block and in it; overwritten.
        above: the first element of the block's columns.
        first: the same of its rows.
        before: of the stripes that it is coupled with.

    Raises: NoChain.
    """
    for other, lower in before:
        start, left = max(other.own.start, above), max(other.above.start, above)
        inside = slice(start - other.own.start, None)
        shared = lower[inside, left - other.above.start :]
        here = block[:, start - above : other.own.stop - above]
        rest = torch.addmm(here, block[:, left - above : left - above + shared.shape[1]], shared.T, alpha=-1)
        torch.matmul(rest, other.inverse[inside, inside].T, out=here)
    lower, square = block[:, : first - above], block[:, first - above :]
    inverse = inverse_factor(torch.addmm(square, lower, lower.T, alpha=-1), link)
    own = slice(first, first + len(block))
    return _Stripe(above=slice(above, first), own=own, inverse=inverse, carried=inverse @ lower), lower
