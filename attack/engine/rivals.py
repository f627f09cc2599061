"""What else a text could be: other tokens or labels in their places, which an observed gradient does not rule out.

Evidence against a rival is by how much worse it matches, as a sum over elements of (observed - explained)^2 / variance;
where errors are normal, that is twice the logarithm of how much less likely they make it. What a rival changes in the
rows of the embeddings and of the last layer says most of it for nearly nothing (`attack.engine.explained`); only those
that this leaves are laid beside the whole gradient.

Errors are taken to be as large as what the text itself leaves says they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attack.engine.context import Context
from attack.engine.explained import Explained
from attack.engine.labels import NoLabel
from attack.engine.layout import Layout
from attack.engine.target import Target
from harness.models import IGNORED

SURE = 60.0
"""Evidence from which on a rival is ruled out: there are some 1e6 of them, each then as likely as 1e-13."""
LOOSE = 1.1
"""Of `Explained.looseness`: errors of thousands of elements add up to 1 or less. A text with three of 23 tokens wrong
left 1.6 to 2.4."""
TRIED = 24
"""Rivals whose whole gradient is looked at, at most."""

Text = tuple[Tensor, Tensor]
"""Tokens and labels."""


def doubt(target: Target, tokens: Tensor, labels: Tensor, context: Context) -> str | None:
    """Why a text that matches is not proven, in one line; None where every rival is ruled out."""
    try:
        found = Explained(target, Layout.of(target), tokens, labels)
    except NoLabel as error:
        return str(error)
    if found.looseness > LOOSE:
        return f"it leaves {found.looseness:.2f} times what rounding, pruning and noise may leave of a true text"
    rivals, count = closest(found)
    if count > len(rivals):
        return f"{count:,} texts with one other token or label match about as well"
    for text in rivals:
        if not context.seconds_left:
            return "the deadline passed before all texts that are nearly alike were looked at"
        if (Explained(target, found.layout, *text).misfit - found.misfit) / found.errors < SURE:
            return "the gradient matches, but so does another text"
    return None


def closest(found: Explained) -> tuple[list[Text], int]:
    """The likeliest rivals that the rows do not rule out, likeliest first, and how many there are."""
    ranked: list[tuple[float, Text]] = []
    count = 0
    for table, change in _tables(found):
        evidence = (-table / found.errors).flatten()
        count += int((evidence < SURE).sum())
        least = evidence.topk(min(TRIED, len(evidence)), largest=False)
        for each, at in zip(least.values.tolist(), least.indices.tolist(), strict=True):
            if each < SURE:
                ranked.append((each, change(*divmod(at, table.shape[1]))))
    ranked.sort(key=lambda one: one[0])
    return [text for _, text in ranked[:TRIED]], count


def _tables(found: Explained) -> list[tuple[Tensor, Callable[[int, int], Text]]]:
    """Improvements by rivals, and the rival for each row and column."""
    places, asked = found.real.nonzero(), found.asked.nonzero()
    free = (found.real & ~found.asked).nonzero() if found.masked else places[:0]

    def retold(tokens: Tensor) -> Text:
        return tokens, tokens.masked_fill(~found.real, IGNORED) if found.causal else found.labels

    def token(row: int, place: int) -> Text:
        return retold(found.tokens.index_put(tuple(places[place]), torch.tensor(row)))

    def swap(one: int, other: int) -> Text:
        pair = places[[one, other]].unbind(1)
        return retold(found.tokens.index_put(pair, found.tokens[pair].flip(0)))

    def label(row: int, which: int) -> Text:
        return found.tokens, found.labels.index_put(tuple(asked[which]), torch.tensor(row))

    def move(place: int, which: int) -> Text:
        pair = torch.stack([asked[which], free[place]]).unbind(1)
        return found.tokens, found.labels.index_put(pair, found.labels[pair].flip(0))

    return [
        (found.better_tokens(), token),
        (found.better_swaps(), swap),
        (found.better_labels(), label),
        (found.better_places(), move),
    ]
