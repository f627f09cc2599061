"""Single sentences from rounded, pruned and noisy gradients, and what may be claimed of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from attack.algorithms import Reconstruction, Status
from attack.algorithms.coarse_text import Reader
from attack.engine.explained import Explained
from attack.engine.labels import NoLabel
from attack.engine.layout import Layout
from attack.engine.rivals import doubt
from attack.engine.target import prepare
from attack.observation import Knowledge, Observation
from attack.reconstruct import reconstruct
from harness.gradients import mean_gradient
from harness.models import LOSSES, load_model
from harness.types import Batch
from tests.attack.algorithms.test_coarse import defended, in_steps
from tests.attack.algorithms.test_dager import SHAPE, batch_of, rows
from tests.attack.toys import observe_gradient, unhurried

CASES = [
    ("bert", "masked_lm", "fp16"),
    ("bert", "masked_lm", "prune:0.5"),
    ("bert:tied=false", "masked_lm", "fp16"),
    ("bert:head=classify,classes=5", "cross_entropy", "prune:0.5"),
    ("gpt2", "causal_lm", "int8"),
    ("gpt2", "causal_lm", "int8:rounding=stochastic"),
    ("gpt2", "causal_lm", "noise-laplace:1e-3"),
    ("gpt2:tied=false", "causal_lm", "prune:0.9"),
    ("gpt2:head=classify,classes=5", "cross_entropy", "bf16"),
]


def sent(spec: str, loss: str, defense: str, *, seed: int, length: int = 14) -> tuple[Observation, Knowledge, Batch]:
    """What is seen of one sentence's gradient under a defense, if any, what is told, and the truth."""
    torch.manual_seed(seed)
    spec = f"{spec}{',' if ':' in spec else ':'}{SHAPE}"
    model, batch = load_model(spec), batch_of([length], loss, seed=seed)
    seen = observe_gradient(model, mean_gradient(model, LOSSES[loss], batch).flat)
    knowledge = Knowledge(model=spec, loss=loss, input_shape=(24,), tokens=model.tokens, batch_size=1)
    return defended(defense, seen) if defense else seen, knowledge, batch


def right(found: Reconstruction, batch: Batch) -> bool:
    assert found.inputs is not None and found.labels is not None
    return rows(found.inputs, found.labels) == rows(batch.inputs, batch.labels)


@pytest.mark.parametrize(("spec", "loss", "defense"), CASES)
def test_every_token_comes_back(spec: str, loss: str, defense: str) -> None:
    seen, knowledge, batch = sent(spec, loss, defense, seed=2)
    found = reconstruct(seen, knowledge, deadline_s=60)
    assert found.status is Status.CONVERGED, found.reason
    assert found.method == "coarse-text" and right(found, batch)


def test_what_noise_hides_is_not_claimed() -> None:
    # The slopes of a fresh encoder's tokens without a label are next to nothing.
    seen, knowledge, _ = sent("bert", "masked_lm", "noise-gaussian:1e-2", seed=0, length=8)
    found = reconstruct(seen, knowledge, method="coarse-text", deadline_s=60)
    assert found.status is Status.NOT_CONVERGED and found.inputs is None
    assert "match about as well" in str(found.reason)


def test_a_text_with_two_tokens_swapped_is_in_doubt() -> None:
    seen, knowledge, batch = sent("bert", "masked_lm", "fp16", seed=1)
    target = prepare(seen, knowledge, device=torch.device("cpu"))
    assert doubt(target, batch.inputs, batch.labels, unhurried()) is None
    swapped = batch.inputs.clone()
    swapped[0, [6, 8]] = batch.inputs[0, [8, 6]]
    assert not swapped.equal(batch.inputs) and doubt(target, swapped, batch.labels, unhurried()) is not None


def test_several_sentences_are_not_read_coarsely() -> None:
    seen, knowledge, _ = sent("gpt2", "causal_lm", "fp16", seed=0)
    found = reconstruct(seen, dataclasses.replace(knowledge, batch_size=2), method="coarse-text", deadline_s=5)
    assert found.status is Status.NOT_CONVERGED and "one sentence" in str(found.reason)


def part(spec: str, name: str) -> slice:
    """Where in the flat vector the parameter is whose name ends so."""
    at = 0
    for each, parameter in load_model(spec).named_parameters():
        if each.endswith(name):
            return slice(at, at + parameter.numel())
        at += parameter.numel()
    raise AssertionError(name)


def unseen(seen: Observation, spec: str, name: str) -> Observation:
    """The same, with a hole where that parameter was sent."""
    known = seen.known.clone()
    known[part(spec, name)] = 0
    return dataclasses.replace(seen, known=known)


def test_a_causal_sentence_has_no_slope_in_the_last_position() -> None:
    seen, knowledge, _ = sent("gpt2", "causal_lm", "fp16", seed=0, length=24)
    assert reconstruct(seen, knowledge, method="coarse-text", deadline_s=60).status is Status.CONVERGED
    gradient = seen.gradient.clone()
    gradient[part(knowledge.model, "wpe.weight")] = 0.01
    found = reconstruct(dataclasses.replace(seen, gradient=gradient), knowledge, method="coarse-text", deadline_s=60)
    assert found.status is Status.NOT_CONVERGED and "the last position has a slope" in str(found.reason)


def test_labels_that_the_last_bias_does_not_name_are_a_reason() -> None:
    seen, knowledge, _ = sent("bert", "masked_lm", "fp16", seed=2)
    seen = unseen(seen, knowledge.model, "predictions.bias")
    found = reconstruct(seen, knowledge, method="coarse-text", deadline_s=60)
    assert found.status is Status.NOT_CONVERGED and "does not say how many tokens" in str(found.reason)


def test_a_later_reading_without_labels_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, asked = Reader.labels, []

    def twice(reader: Reader, tokens: Tensor) -> Tensor:
        asked.append(tokens)
        if len(asked) > 2:
            raise NoLabel("no more")
        return labels(reader, tokens)

    monkeypatch.setattr(Reader, "labels", twice)
    seen, knowledge, batch = sent("bert", "masked_lm", "fp16", seed=3)
    found = reconstruct(seen, knowledge, method="coarse-text", deadline_s=60)
    assert len(asked) == 3 and found.status is Status.CONVERGED and right(found, batch)


@pytest.mark.parametrize("spec", ["gpt2", "gpt2:tied=false"])
def test_padding_is_no_token_of_a_sentence(spec: str) -> None:
    seen, knowledge, _ = sent(spec, "causal_lm", "fp16", seed=0)
    # Nothing is left that tells one word from another.
    for name in ("wte.weight", "lm_head.weight")[: 2 if "tied" in spec else 1]:
        seen = unseen(seen, knowledge.model, name)
    found = reconstruct(seen, knowledge, method="coarse-text", deadline_s=60)
    assert found.status is Status.NOT_CONVERGED and found.history


def test_rivals_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("attack.reconstruct.doubt")
    seen, knowledge, batch = sent("gpt2", "causal_lm", "int8", seed=2)
    found = reconstruct(seen, knowledge, deadline_s=60)
    assert found.status is Status.CONVERGED and right(found, batch)


@pytest.mark.parametrize("method", ["auto", "coarse-text", "dager"])
def test_directions_of_a_matrix_are_not_taken_for_its_rows(method: str) -> None:
    seen, knowledge, batch = sent("gpt2", "causal_lm", "", seed=0)
    seen = in_steps("powersgd:2", seen, 2, model=knowledge.model)
    target = prepare(seen, knowledge, device=torch.device("cpu"))
    found = Explained(target, Layout.of(target), batch.inputs, batch.labels)
    residual = target.residual(batch.inputs, batch.labels)
    assert found.residual == pytest.approx(residual) and residual < target.tolerance
    answer = reconstruct(seen, knowledge, method=method, deadline_s=5)
    assert answer.status is Status.NOT_CONVERGED and answer.reason
