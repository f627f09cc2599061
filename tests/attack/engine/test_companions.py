"""A token's sentence from its context alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attack.engine.anatomy import Rows
from attack.engine.companions import Companions
from attack.engine.span import Span

LENGTH, SENTENCES, HEADS, WIDTH = 7, 4, 4, 96
COUNT = LENGTH * SENTENCES
AT = tuple(torch.arange(COUNT).view(LENGTH, SENTENCES))
"""Candidate n stands at position n // SENTENCES, and is in sentence n % SENTENCES."""


def drawn() -> tuple[Tensor, Tensor, Span]:
    """Scores, values, and the span of the contexts that they make."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    scores, values = normal(COUNT, COUNT, HEADS), normal(COUNT, HEADS, WIDTH // HEADS)
    sentence_of = torch.arange(COUNT) % SENTENCES
    apart = sentence_of[:, None] != sentence_of
    weights = scores.masked_fill(apart[..., None], -torch.inf).softmax(1)
    contexts = torch.einsum("nmh,mhd->nhd", weights, values).flatten(1)
    return scores, values, Span(Rows(values=normal(WIDTH, COUNT) @ contexts + 1e-7 * normal(WIDTH, WIDTH), noise=1e-7))


def test_every_token_names_its_sentence() -> None:
    companions = Companions(AT, *drawn())
    right = [
        companions.of(token, LENGTH, None).tolist() == list(range(token % SENTENCES, COUNT, SENTENCES))
        for token in range(COUNT)
    ]
    assert sum(right) > 0.9 * COUNT


def test_a_head_that_looks_at_a_token_of_no_share_ends_the_search_for_shares() -> None:
    scores, values, span = drawn()
    scores[:, 5, 0] += 2000  # all else that the head looks at is then below the least number
    companions = Companions(AT, scores, values, span)
    for token in range(COUNT):
        found = companions.of(token, LENGTH, None)
        assert all(int(each) in there for each, there in zip(found, AT, strict=True))


def test_a_solver_that_gives_up_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*_: object) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr("attack.engine.companions.nnls", give_up)
    found = Companions(AT, *drawn()).of(0, LENGTH, None)
    assert all(int(each) in there for each, there in zip(found, AT, strict=True))
