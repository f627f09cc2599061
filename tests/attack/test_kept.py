"""A victim that is done comes back to the bit, and counts for nothing but its own question and observation."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attack.algorithms import Reconstruction, Status
from attack.errors import AnswerError, AttackError
from attack.files import unfinished
from attack.kept import Kept, Victim
from tests.attack.toys import example, observe

QUESTION: dict[str, Any] = {"method": "auto", "deadline_s": 300.0, "knowledge": {"model": "lenet", "labels": None}}


def victim(seed: int = 0) -> Victim:
    return Victim.of(observe(*example("linear", seed=seed), rank=1, step=3))


def converged() -> Reconstruction:
    return Reconstruction(
        rank=1,
        step=3,
        status=Status.CONVERGED,
        method="dlg",
        route="dlg (because)",
        inputs=torch.rand(2, 3, 4, 4).transpose(2, 3),
        labels=torch.tensor([4, 1]),
        soft_labels=torch.rand(2, 5),
        frames=torch.rand(3, 2, 3, 4, 4),
        frame_iterations=(0, 1, 7),
        history=((0, 1 / 3), (1, 0.1), (7, math.inf)),
        gradient_residual=1e-7,
        predicted_mse=math.pi,
        seconds=0.1,
        evaluations=7,
    )


def failed() -> Reconstruction:
    return Reconstruction(rank=1, step=3, status=Status.NOT_OBSERVED, method="auto", reason="nothing was seen")


@pytest.mark.parametrize("found", [converged(), failed()], ids=["converged", "failed"])
def test_answer_comes_back_to_the_bit(found: Reconstruction, tmp_path: Path) -> None:
    kept = Kept(out=tmp_path, question=QUESTION)
    assert kept.status(victim()) is None
    kept.write(victim(), found)
    assert kept.status(victim()) is found.status
    back = kept.read(victim())
    for field in dataclasses.fields(found):
        was, now = getattr(found, field.name), getattr(back, field.name)
        assert type(was) is type(now), field.name
        assert torch.equal(was, now) if isinstance(was, torch.Tensor) else was == now, field.name


@pytest.mark.parametrize(
    ("changes", "seed", "says"),
    [
        ({"deadline_s": 60.0}, 0, "its deadline_s was 300.0, not 60.0"),
        ({"knowledge": {"model": "lenet", "labels": [1]}}, 0, r"its knowledge labels was None, not \[1\]"),
        ({}, 1, "other traffic"),
    ],
)
def test_answer_to_another_question_stands_in_the_way(
    changes: dict[str, Any], seed: int, says: str, tmp_path: Path
) -> None:
    Kept(out=tmp_path, question=QUESTION).write(victim(), failed())
    asked = Kept(out=tmp_path, question=QUESTION | changes)
    with pytest.raises(AttackError, match=says):
        asked.status(victim(seed))
    anew = dataclasses.replace(asked, overwrite=True)
    assert anew.status(victim(seed)) is None
    anew.write(victim(seed), converged())
    assert asked.read(victim(seed)).status is Status.CONVERGED


@pytest.mark.parametrize("content", [b"", b"not tensors", b"\xff" * 64])
def test_damaged_file_counts_as_not_there(content: bytes, tmp_path: Path) -> None:
    kept = Kept(out=tmp_path, question=QUESTION)
    kept.write(victim(), converged())
    (file,) = kept.folder.iterdir()
    file.write_bytes(content)
    assert kept.status(victim()) is None
    with pytest.raises(AnswerError, match=r"step3\.rank1\.safetensors: it was there"):
        kept.read(victim())
    kept.write(victim(), failed())
    assert kept.read(victim()) == failed()


def test_nothing_is_left_of_what_is_forgotten(tmp_path: Path) -> None:
    kept = Kept(out=tmp_path, question=QUESTION)
    other = dataclasses.replace(victim(), rank=2)
    kept.write(victim(), failed())
    kept.write(other, failed())
    unfinished(kept.folder / "step3.rank1.safetensors").write_bytes(b"killed in the middle")
    kept.forget([victim()])
    assert [file.name for file in kept.folder.iterdir()] == ["step3.rank2.safetensors"]
    kept.forget([victim(), other])
    assert list(tmp_path.iterdir()) == []
