"""Dummy text against the true batch: the same gradient, the same tokens, the same labels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from attack.engine.dummy_labels import asked_tokens
from attack.engine.dummy_text import DummyText, NoText
from attack.engine.labels import NoLabel
from attack.engine.target import Target, prepare
from attack.observation import Knowledge
from harness.gradients import mean_gradient
from harness.models import IGNORED, LOSSES, load_model
from harness.types import Batch
from tests.attack.algorithms.test_dager import batch_of
from tests.attack.toys import observe_gradient

SHAPE = "vocab=300,hidden=32,depth=1,heads=2,length=24"
SURE = 40.0
"""Logit of a label that is certain."""


def target_of(spec: str, loss: str, batch: Batch) -> Target:
    torch.manual_seed(0)
    model = load_model(spec)
    gradient = mean_gradient(model, LOSSES[loss], batch).flat
    seen = observe_gradient(model, gradient)
    told = Knowledge(model=spec, loss=loss, input_shape=(24,), tokens=model.tokens, batch_size=len(batch.inputs))
    return prepare(seen, told, device=torch.device("cpu"))


def true_logits(batch: Batch, loss: str, target: Target) -> Tensor:
    if loss == "cross_entropy":
        return torch.empty(0)
    if loss == "causal_lm":
        return SURE * torch.nn.functional.one_hot(batch.labels[:, 1:], target.classes).float()
    asked = asked_tokens(target, batch.inputs.numel())
    places = [int((batch.labels.flatten() == token).nonzero()[0]) for token in asked]
    return SURE * torch.nn.functional.one_hot(torch.tensor(places), batch.inputs.numel()).float()


@pytest.mark.parametrize(
    ("spec", "loss"),
    [
        ("bert:" + SHAPE, "masked_lm"),
        ("bert:tied=false," + SHAPE, "masked_lm"),
        ("bert:head=classify,classes=5," + SHAPE, "cross_entropy"),
        ("gpt2:" + SHAPE, "causal_lm"),
    ],
)
def test_the_true_batch_has_the_observed_gradient(spec: str, loss: str) -> None:
    batch = batch_of([9], loss, seed=1)
    target = target_of(spec, loss, batch)
    dummy = DummyText(target, torch.Generator().manual_seed(0))
    scale = dummy.embeddings.square().mean().sqrt()
    z = torch.cat([dummy.embeddings[batch.inputs].flatten() / scale, true_logits(batch, loss, target).flatten()])
    assert z.shape == dummy.start().shape
    for own, seen in zip(dummy.gradients(z), dummy.observed, strict=True):
        # Both are float32; the smallest gradients are sums of larger ones.
        assert torch.allclose(own, seen, rtol=1e-3, atol=1e-5 * float(max(part.abs().max() for part in dummy.observed)))
    tokens, labels = dummy.read(z)
    assert tokens.equal(batch.inputs) and labels.equal(batch.labels)


def test_tokens_are_narrowed_to_those_that_occur() -> None:
    batch = batch_of([9], "cross_entropy", seed=1)
    target = target_of("bert:head=classify,classes=5," + SHAPE, "cross_entropy", batch)
    dummy = DummyText(target, torch.Generator().manual_seed(0), narrowed=True)
    assert dummy.narrowed and dummy.readable.equal(batch.inputs.unique())
    tokens, _ = dummy.read(dummy.start())
    assert torch.isin(tokens, dummy.readable).all()


def test_reordering_moves_tokens_of_one_sentence() -> None:
    target = target_of(
        "gpt2:head=classify,classes=5," + SHAPE, "cross_entropy", batch_of([9, 9], "cross_entropy", seed=1)
    )
    dummy = DummyText(target, torch.Generator().manual_seed(0))
    z, order = dummy.start(), torch.arange(9).roll(2)
    before, after = dummy.words(z), dummy.words(dummy.reordered(z, 1, order))
    assert after[0].equal(before[0]) and after[1].equal(before[1, order])


def test_tokens_asked_for_twice_are_counted_twice() -> None:
    batch = batch_of([12], "masked_lm", seed=0)
    labels = torch.full_like(batch.inputs, IGNORED)
    labels[0, torch.tensor([2, 4, 7])] = torch.tensor([50, 60, 50])
    target = target_of("bert:" + SHAPE, "masked_lm", dataclasses.replace(batch, labels=labels))
    assert asked_tokens(target, 12).tolist() == [50, 50, 60]


def test_what_is_missing_is_named() -> None:
    target = target_of("bert:" + SHAPE, "masked_lm", batch_of([9], "masked_lm", seed=0))
    with pytest.raises(NoText, match="takes numbers"):
        DummyText(dataclasses.replace(target, tokens=None), torch.Generator())
    with pytest.raises(NoLabel, match="makes no sense of up to 1"):
        asked_tokens(target, 1)
