"""DAGER on gradients of small transformers: every token, every sentence, the labels; and what it says where it cannot
be done."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from attack.algorithms import Reconstruction, Status
from attack.engine.anatomy import Anatomy
from attack.engine.standing import standing
from attack.observation import Knowledge, Observation
from attack.reconstruct import reconstruct
from harness.gradients import mean_gradient
from harness.models import IGNORED, LOSSES, load_model
from harness.types import Batch
from tests.attack.toys import observe_gradient

SHAPE = "vocab=300,hidden=96,depth=2,heads=4,length=24"
MASK = 4


def batch_of(lengths: list[int], loss: str, *, seed: int) -> Batch:
    """Sentences of words that are as unevenly frequent as words are, each between a first and a last token."""
    draw = torch.Generator().manual_seed(seed)
    chances = 1 / torch.arange(10.0, 300)
    rows = [
        torch.tensor([1, *(10 + torch.multinomial(chances, length - 2, generator=draw)).tolist(), 2])
        for length in lengths
    ]
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if loss == "cross_entropy":
        return Batch(inputs=inputs, labels=torch.randint(5, (len(rows),), generator=draw))
    if loss == "causal_lm":
        return Batch(inputs=inputs, labels=torch.where(inputs == 0, IGNORED, inputs))
    asked = torch.zeros_like(inputs, dtype=torch.bool)
    asked[:, 2] = asked[0, 4] = True
    return Batch(inputs=torch.where(asked, MASK, inputs), labels=torch.where(asked, inputs, IGNORED))


def attacked(
    spec: str, loss: str, batch: Batch, *, seed: int, method: str = "auto", deadline_s: float = 60.0
) -> Reconstruction:
    torch.manual_seed(seed)
    spec = f"{spec}{',' if ':' in spec else ':'}{SHAPE}"
    model = load_model(spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A fresh model looks at all tokens alike; a trained one does not.
            if "self.query.weight" in name or "self.key.weight" in name:
                parameter *= 5
    gradient = mean_gradient(model, LOSSES[loss], batch).flat
    seen = observe_gradient(model, gradient, world_size=2)
    knowledge = Knowledge(model=spec, loss=loss, input_shape=(24,), tokens=model.tokens)
    return reconstruct(seen, knowledge, method=method, deadline_s=deadline_s)


def rows(inputs: Tensor, labels: Tensor) -> list[tuple[object, ...]]:
    """Sentences with their labels, in an order of their own."""
    together = []
    for row, label in zip(inputs.tolist(), labels.tolist(), strict=True):
        length = sum(token != 0 for token in row)
        together.append((*row[:length], *(label[:length] if isinstance(label, list) else [label])))
    return sorted(together)


CASES = [
    ("bert", "masked_lm", [12]),
    ("bert:tied=false", "masked_lm", [12]),
    ("bert:head=classify,classes=5", "cross_entropy", [15]),
    ("bert", "masked_lm", [9, 7]),
    ("bert:head=classify,classes=5", "cross_entropy", [8, 11]),
    ("bert", "masked_lm", [9, 12, 7, 10]),
    ("bert:head=classify,classes=5", "cross_entropy", [6, 9, 8, 7, 9, 5, 8, 7]),
    ("gpt2", "causal_lm", [14]),
    ("gpt2:tied=false", "causal_lm", [9, 14, 11]),
    ("gpt2", "causal_lm", [9, 14, 11, 7]),
    ("gpt2:head=classify,classes=5", "cross_entropy", [9, 14, 11, 14]),
]


@pytest.mark.parametrize(("spec", "loss", "lengths"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_token_comes_back(spec: str, loss: str, lengths: list[int], seed: int) -> None:
    batch = batch_of(lengths, loss, seed=seed)
    found = attacked(spec, loss, batch, seed=seed)
    assert found.status is Status.CONVERGED, found.reason
    assert found.inputs is not None and found.labels is not None and found.inputs.dtype == torch.int64
    assert rows(found.inputs, found.labels) == rows(batch.inputs, batch.labels)
    assert not found.batch_size_assumed


def test_a_place_that_the_embeddings_do_not_show_is_found_in_the_span(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([9, 12, 7, 10], "masked_lm", seed=0)
    missed = []

    def all_but_one(anatomy: Anatomy, words: Tensor, total: int, generator: torch.Generator) -> Tensor:
        told = standing(anatomy, words, total, generator)
        assert told is not None
        for word, places in zip(words.tolist(), told, strict=True):
            true = (batch.inputs == word).any(0)
            assert (places[: len(true)] == true).all()
        word = int((words == MASK).nonzero()[0, 0])
        missed.append(int(told[word].nonzero()[-1, 0]))
        told[word, missed[-1]] = False
        return told

    monkeypatch.setattr(importlib.import_module("attack.algorithms.dager"), "standing", all_but_one)
    found = attacked("bert", "masked_lm", batch, seed=0)
    assert missed and found.status is Status.CONVERGED, found.reason
    assert found.inputs is not None and found.labels is not None
    assert rows(found.inputs, found.labels) == rows(batch.inputs, batch.labels)


@pytest.mark.parametrize(("spec", "loss"), [("gpt2", "causal_lm"), ("bert", "masked_lm")])
def test_a_batch_as_long_as_the_model_is_wide_is_named_so(spec: str, loss: str) -> None:
    found = attacked(spec, loss, batch_of([20] * 8, loss, seed=0), seed=0)
    assert found.status is Status.NOT_CONVERGED and found.inputs is None
    assert "95 tokens or more, as many as the model is wide" in str(found.reason)


def test_dropout_is_named() -> None:
    found = attacked("bert:dropout=0.1", "masked_lm", batch_of([12], "masked_lm", seed=0), seed=0, deadline_s=3.0)
    assert found.status is Status.NOT_CONVERGED and "drops 10%" in str(found.reason)


def test_pictures_methods_do_not_take_text() -> None:
    from attack.errors import AttackError

    with pytest.raises(AttackError, match="for pictures; for text there are"):
        model = load_model(f"gpt2:{SHAPE}")
        size = sum(parameter.numel() for parameter in model.parameters())
        seen = Observation(
            rank=0,
            step=0,
            world_size=1,
            exchange="zeromq",
            gradient=torch.ones(size),
            known=torch.ones(size, dtype=torch.uint8),
            weights=torch.ones(size),
            shapes=tuple(tuple(parameter.shape) for parameter in model.parameters()),
        )
        knowledge = Knowledge(model=f"gpt2:{SHAPE}", loss="causal_lm", input_shape=(24,), tokens=model.tokens)
        reconstruct(seen, knowledge, method="rgap")
