"""TAG and LAMP on gradients of small transformers: they search, so one sentence, and what they say where they fail."""

from __future__ import annotations

import pytest

from attack.algorithms import Status
from tests.attack.algorithms.test_dager import attacked, batch_of, rows

CASES = [
    ("tag", "gpt2", "causal_lm", 10),
    ("lamp", "bert", "masked_lm", 10),
    ("lamp", "bert:head=classify,classes=5", "cross_entropy", 9),
]


@pytest.mark.parametrize(("method", "spec", "loss", "length"), CASES)
def test_a_sentence_comes_back(method: str, spec: str, loss: str, length: int) -> None:
    batch = batch_of([length], loss, seed=0)
    found = attacked(spec, loss, batch, seed=0, method=method, deadline_s=150.0)
    assert found.status is Status.CONVERGED, found.reason
    assert found.inputs is not None and found.labels is not None
    assert rows(found.inputs, found.labels) == rows(batch.inputs, batch.labels)


def test_tokens_are_kept_by_iteration() -> None:
    batch = batch_of([10], "causal_lm", seed=1)
    found = attacked("gpt2", "causal_lm", batch, seed=1, method="tag", deadline_s=150.0)
    assert found.frames is not None and found.frames.shape[1:] == batch.inputs.shape
    right = (found.frames == batch.inputs).flatten(1).float().mean(1)
    assert found.frame_iterations[0] == 0 and right[0] < 0.5 and right[-1] == 1
    assert [iteration for iteration, _ in found.history] == list(found.frame_iterations)


@pytest.mark.parametrize("method", ["tag", "lamp"])
def test_an_unfinished_search_shows_no_sentence(method: str) -> None:
    batch = batch_of([12], "masked_lm", seed=0)
    found = attacked("bert", "masked_lm", batch, seed=0, method=method, deadline_s=0.2)
    assert found.status is Status.NOT_CONVERGED and found.inputs is found.frames is None
    assert "the deadline passed" in str(found.reason) and found.history
