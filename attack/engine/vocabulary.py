"""Which tokens a batch holds, and how long it is, from the gradients of the embeddings.

A word embedding's gradient is zero where the word does not occur. Where the embeddings are the last layer's weights as
well, every row has a part from there: a combination of the few states that a label belongs to, so that the rows of
words that do not occur lie in a small space, and those that do stand out of it. Position embeddings say the longest
length.

A word's gradient is the sum of its tokens' slopes, and so is a position's. Where some words stand at some positions and
nowhere else, and no other word does, the sums over both are equal; no others are, as slopes of tokens are independent.

Reference: Gupta et al. 2022 (FILM), arXiv 2205.08514, section 4.1, for embeddings that are not tied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attack.engine.anatomy import Anatomy, Rows
from attack.engine.span import Span

SAMPLE = 4
"""Rows in a sample, in units of the width: enough to see the space of the last layer's part."""
SURE = 10.0
"""Standard errors from which on a row stands out."""
EXACT = 3e-5
"""Largest singular value, of rows of norm one, that counts as zero: errors of float32 leave some 1e-7, others 1e-2."""
ALIKE = 1e-2
"""Largest relative distance of coefficients that count as equal."""


def words_of(anatomy: Anatomy, generator: torch.Generator) -> Tensor | None:
    """Tokens that occur, int64, ascending, perhaps with a few that do not; None where that cannot be told."""
    rows = anatomy.words
    sizes = torch.linalg.vector_norm(rows.values, dim=1)
    floor = SURE * rows.noise * math.sqrt(rows.values.shape[1])
    if (sizes > floor).float().mean() < 0.5 and not (sizes > 0).all():
        return (sizes > floor).nonzero()[:, 0]
    order = torch.randperm(len(rows.values), generator=generator).to(rows.values.device)
    size = _sample_size(rows)
    stands_out = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    # A word that occurs may be in one sample, where it spoils the space, but not in both.
    for sample in (order[:size], order[size : 2 * size]):
        space = Span(Rows(values=rows.values[sample], noise=rows.noise))
        if space.rank > 0.75 * space.width:
            return None
        outside = torch.linalg.vector_norm(space.complement(rows.values), dim=1)
        stands_out |= outside > torch.hypot(torch.tensor(floor), SURE * rows.noise / rms(rows.values) * sizes)
    return stands_out.nonzero()[:, 0]


def linked(anatomy: Anatomy, words: Tensor, generator: torch.Generator) -> Tensor:
    """bool, shape (words, positions): whether a word may stand at a position, by what their gradients add up to.

    Args:
        words: all tokens that occur, as `words_of` gives them.
    """
    given, places = anatomy.words.values[words], anatomy.positions.values[: longest(anatomy)]
    space = last_layer(anatomy, words, generator)
    if space is not None:
        given, places = space.complement(given), space.complement(places)
    sums = torch.cat([given, -places])
    sizes = torch.linalg.vector_norm(sums, dim=1)
    if len(sums) > sums.shape[1] or not (sizes > 0).all():
        return torch.ones(len(given), len(places), dtype=torch.bool, device=words.device)
    left, values, _ = torch.linalg.svd(sums / sizes[:, None], full_matrices=False)
    # Those that add up to zero together have one coefficient in every combination that is zero.
    zero = left[:, values < EXACT] / sizes[:, None]
    apart = torch.cdist(zero[: len(given)], zero[len(given) :])
    return apart <= ALIKE * torch.linalg.vector_norm(zero[: len(given)], dim=1, keepdim=True)


def last_layer(anatomy: Anatomy, words: Tensor, generator: torch.Generator) -> Span | None:
    """The space of the last layer's part in the gradient of the word embeddings; None where they are not that layer.

    Args:
        words: all tokens that occur, as `words_of` gives them.
    """
    if not (torch.linalg.vector_norm(anatomy.words.values, dim=1) > 0).all():
        return None
    order = torch.randperm(len(anatomy.words.values), generator=generator).to(words.device)
    sample = order[~torch.isin(order, words)][: _sample_size(anatomy.words)]
    return Span(Rows(values=anatomy.words.values[sample], noise=anatomy.words.noise))


def _sample_size(rows: Rows) -> int:
    return min(SAMPLE * rows.values.shape[1], len(rows.values) // 2)


def longest(anatomy: Anatomy) -> int:
    """Tokens of the longest sentence: padding leaves no trace in the gradient of its positions."""
    sizes = torch.linalg.vector_norm(anatomy.positions.values, dim=1)
    used = (sizes > SURE * anatomy.positions.noise).nonzero()[:, 0]
    return int(used.max()) + 1 if len(used) else 0


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())
