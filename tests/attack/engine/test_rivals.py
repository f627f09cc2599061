"""Texts beside a text: which of them an observed gradient does not rule out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attack.engine.context import Context
from attack.engine.explained import Explained, swaps
from attack.engine.layout import Layout
from attack.engine.rivals import closest, doubt
from attack.engine.target import Target, prepare
from attack.observation import Knowledge
from harness.gradients import mean_gradient
from harness.models import LOSSES, load_model
from harness.types import Batch
from tests.attack.algorithms.test_coarse import defended
from tests.attack.algorithms.test_dager import SHAPE, batch_of
from tests.attack.toys import observe_gradient, unhurried


def coarsely(lengths: list[int], *, seed: int = 0) -> tuple[Target, Batch]:
    """What a rounded gradient of a causal model's sentences sets, and the truth."""
    torch.manual_seed(seed)
    model, batch = load_model(f"gpt2:{SHAPE}"), batch_of(lengths, "causal_lm", seed=seed)
    seen = defended("fp16", observe_gradient(model, mean_gradient(model, LOSSES["causal_lm"], batch).flat))
    knowledge = Knowledge(
        model=f"gpt2:{SHAPE}", loss="causal_lm", input_shape=(24,), tokens=model.tokens, batch_size=len(lengths)
    )
    return prepare(seen, knowledge, device=torch.device("cpu")), batch


def swapped(batch: Batch) -> tuple[Tensor, Tensor]:
    """Two tokens of the first sentence in each other's places, with the labels that a causal model then has."""
    there = (torch.tensor([0, 0]), torch.tensor([3, 5]))
    tokens, labels = (each.index_put(there, each[there].flip(0)) for each in (batch.inputs, batch.labels))
    assert not tokens.equal(batch.inputs)
    return tokens, labels


def test_the_truth_is_a_rival_of_sentences_of_different_length() -> None:
    target, batch = coarsely([9, 6])
    assert doubt(target, batch.inputs, batch.labels, unhurried()) is None
    rivals, _ = closest(Explained(target, Layout.of(target), *swapped(batch)))
    assert any(tokens.equal(batch.inputs) and labels.equal(batch.labels) for tokens, labels in rivals)


def test_rivals_that_the_deadline_left_are_not_ruled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target, batch = coarsely([9])
    monkeypatch.setattr("attack.engine.rivals.closest", lambda found: ([swapped(batch)], 1))
    late = Context(generator=torch.Generator(), deadline=0.0, clock=lambda: 1.0)
    assert doubt(target, batch.inputs, batch.labels, unhurried()) is None
    assert "deadline passed" in str(doubt(target, batch.inputs, batch.labels, late))


def test_a_causal_model_has_no_other_labels_than_its_tokens() -> None:
    target, batch = coarsely([9])
    found = Explained(target, Layout.of(target), batch.inputs, batch.labels)
    assert not found.better_labels().numel() and not found.better_places().numel()


def test_a_swap_is_worth_what_it_takes_off_the_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    left, variance, vectors = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    variance = variance.exp()

    def misfit(vectors: Tensor) -> float:
        return float(((left - vectors) ** 2 / variance).sum())

    def other(one: int, two: int) -> Tensor:
        order = torch.arange(4)
        order[[one, two]] = order[[two, one]]
        return vectors[order] - vectors

    for one in range(4):
        found = swaps(left, variance, vectors, one)
        wanted = [misfit(torch.zeros_like(vectors)) - misfit(other(one, two)) for two in range(4)]
        assert found.tolist() == pytest.approx(wanted)
