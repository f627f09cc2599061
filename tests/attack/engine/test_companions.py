"""A token's sentence from its context alone."""

from __future__ import annotations

import torch

from attack.engine.anatomy import Rows
from attack.engine.companions import Companions
from attack.engine.span import Span

LENGTH, SENTENCES, HEADS, WIDTH = 7, 4, 4, 96


def test_every_token_names_its_sentence() -> None:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    count = LENGTH * SENTENCES
    scores, values = normal(count, count, HEADS), normal(count, HEADS, WIDTH // HEADS)
    # Candidate n stands at position n // SENTENCES, and is in sentence n % SENTENCES.
    at = tuple(torch.arange(count).view(LENGTH, SENTENCES))
    sentence_of = torch.arange(count) % SENTENCES
    apart = sentence_of[:, None] != sentence_of
    weights = scores.masked_fill(apart[..., None], -torch.inf).softmax(1)
    contexts = torch.einsum("nmh,mhd->nhd", weights, values).flatten(1)
    span = Span(Rows(values=normal(WIDTH, count) @ contexts + 1e-7 * normal(WIDTH, WIDTH), noise=1e-7))
    companions = Companions(at, scores, values, span)
    right = [
        companions.of(token, LENGTH, None).tolist() == (sentence_of == sentence_of[token]).nonzero()[:, 0].tolist()
        for token in range(count)
    ]
    assert sum(right) > 0.9 * count
