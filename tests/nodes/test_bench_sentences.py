"""`bench sentences` without a lab: what it tells the attacks, and what it says where there was nothing to attack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from attack.observation import Knowledge
from harness.data import load_data
from harness.data.text import TextSet
from harness.errors import GradtapError
from nodes.benchmarks import sentences
from nodes.benchmarks.sentences import Sentences

PROSE = "prose:length=10"


def record(monkeypatch: pytest.MonkeyPatch, *observations: Any) -> Sentences:
    """The benchmark, with captures that show these observations."""
    job = SimpleNamespace(run=lambda: SimpleNamespace(ok=True))
    monkeypatch.setattr(sentences, "Lab", lambda **_: job)
    monkeypatch.setattr(sentences, "Recording", lambda *_, **__: SimpleNamespace(observations=lambda: observations))
    return Sentences(model="gpt2:hidden=32,depth=1,heads=2", loss="causal_lm", data=PROSE, methods=sentences.TEXT_ONLY)


def test_all_that_do_not_read_the_batch_size_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}

    def attempt(seen: Any, knowledge: Knowledge, *, method: str, **_: Any) -> tuple[None, None]:
        told[method] = knowledge.batch_size
        return None, None

    bench = record(monkeypatch, SimpleNamespace(step=0, rank=0))
    monkeypatch.setattr(sentences, "attempt", attempt)
    monkeypatch.setattr(Sentences, "_score", lambda *_: {})
    data = load_data(PROSE)
    assert isinstance(data, TextSet)
    assert len(list(bench._job(data, 2, 0))) == 4
    assert told == {"dager": None, "coarse-text": 2, "lamp": 2, "tag": 2}


def test_captures_without_a_gradient_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GradtapError, match="captures of jobs with batch size 1 show none"):
        record(monkeypatch).run()
