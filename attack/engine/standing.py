"""Where each word of a batch stands, from the gradient of an encoder's embeddings, by least squares.

What the first attention is given is x_n = scale * u_n / deviation_n + shift, u_n the centered sum of a word's and a
position's embedding. With slopes d_n of the loss by x_n, the gradient of that sum is

    g_n = (scale * d_n - a mean - a multiple of u_n) / deviation_n,        d_n = W^T (slopes of query, key, value) + r_n

and a word's gradient is the sum of its tokens' g_n. The part of query, key and value is had from their gradients, since
that is a sum of slopes times x_n, and words and positions are independent. r_n, the slope of what the attention's
output layer gives, is in the column space of that layer's gradient. Outside of that space nothing is left but multiples
of the u_n: a combination of the word's embedding and of the positions where it stands. Where the embeddings are the
last layer as well, the space of that part is left out too.

The sums of words and positions alone do not tell that: sentences that share words and positions put every combination
of these into the first span.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attack.engine.anatomy import Anatomy
from attack.engine.vocabulary import last_layer, longest

STANDS = 4.0
"""Standard errors from which on a word has a part along a position; one that stands there has hundreds. A few
candidates too many do no harm: whole sentences are proven."""
SPARE = 8
"""Equations beyond the unknowns, at least: the errors are judged by what is left."""


def standing(anatomy: Anatomy, words: Tensor, total: int, generator: torch.Generator) -> Tensor | None:
    """bool, shape (words, positions): whether a word is seen to stand at a position; None where there are too few
    equations, or the model is none whose embeddings are normalized first. One of hundreds is missed, as its part
    is nothing by chance.

    Args:
        words: all tokens that occur, as `words_of` gives them.
        total: tokens of the batch.
    """
    entrance = anatomy.entrance
    if entrance is None:
        return None
    embedded = _centered(entrance.words(words))
    places = _centered(entrance.positions[: longest(anatomy)])
    basis = torch.cat([entrance.scale * embedded, entrance.scale * places, entrance.shift[None]])
    width = basis.shape[1]
    if len(basis) > width:
        return None
    attended = entrance.weight.T @ anatomy.inputs.values  # sum_n W^T (slopes of query, key, value)_n x_n^T
    by_word = (attended @ torch.linalg.pinv(basis)).T[: len(words)]
    seen = _centered(anatomy.words.values[words] - entrance.scale * by_word)
    slopes = torch.linalg.svd(anatomy.contexts.values)[0][:, :total].T
    unknown = torch.cat([entrance.scale * slopes, torch.ones_like(entrance.scale)[None]])
    head = last_layer(anatomy, words, generator)
    if head is not None:
        seen, unknown, embedded, places = (head.complement(rows) for rows in (seen, unknown, embedded, places))
    spare = seen.shape[1] - len(unknown) - len(places) - 1
    if spare < SPARE:
        return None
    outside = torch.linalg.qr(unknown.T, mode="complete")[0][:, len(unknown) :]
    seen, embedded, places = seen @ outside, embedded @ outside, places @ outside
    # One small regression a word: on its own embedding and on all positions.
    columns = torch.cat([embedded[:, None], places.expand(len(words), -1, -1)], 1).mT
    columns = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    q, r = torch.linalg.qr(columns)
    parts = torch.einsum("wfk,wf->wk", q, seen)
    errors = torch.linalg.vector_norm(seen - torch.einsum("wfk,wk->wf", q, parts), dim=1) / spare**0.5
    inverse = torch.linalg.inv(r)
    shares = torch.einsum("wij,wj->wi", inverse, parts)
    deviations = errors[:, None] * torch.linalg.vector_norm(inverse, dim=2)
    return shares[:, 1:].abs() > STANDS * deviations[:, 1:]


def _centered(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
