"""What is written is what is read; a damaged or foreign file is one line; a failed write leaves nothing behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from attack.decode.export import read_observations, write_observations
from attack.decode.recording import Desk
from attack.errors import DecodeError
from attack.observation import Observation
from tests.attack.decode.job import Job, events


def observed(job: Job) -> list[Observation]:
    return list(Desk(events(job.writes, lost=lambda index: index % 9 == 4), optimizer=job.optimizer).observations())


def same(one: Observation, other: Observation) -> bool:
    """Field by field, tensors as bits."""
    for field in dataclasses.fields(Observation):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            if left.dtype != right.dtype or left.numpy().tobytes() != right.numpy().tobytes():
                return False
        elif left != right:
            return False
    return True


@pytest.mark.parametrize("job", [Job(buffers=((3,),)), Job(world=3, ranks_serve=True)], ids=["server", "ranks serve"])
def test_what_is_written_is_what_is_read(job: Job, tmp_path: Path) -> None:
    want = observed(job)
    summary = write_observations(want, tmp_path / "seen.safetensors")
    got = list(read_observations(tmp_path / "seen.safetensors"))
    assert len(got) == len(want) and all(map(same, got, want))
    assert (summary["observations"], summary["steps"]) == (len(want), job.steps)
    assert summary["exact_fraction"] == pytest.approx(np.mean([seen.exact_fraction for seen in want]))
    assert summary["complete"] == sum(seen.complete for seen in want)
    assert [path.name for path in tmp_path.iterdir()] == ["seen.safetensors"]


def test_the_keys_are_those_of_the_design(tmp_path: Path) -> None:
    job = Job(steps=1, buffers=((3,),))
    write_observations(Desk(events(job.writes)).observations(), tmp_path / "seen")
    names = {f"step0.rank{rank}.{name}" for rank in range(2) for name in ("gradient", "known")}
    assert set(load_file(tmp_path / "seen")) == names | {"step0.weights", "step0.buffers", "step0.average"}


def test_nothing_observed_is_an_empty_file_that_can_be_read(tmp_path: Path) -> None:
    assert write_observations([], tmp_path / "seen")["observations"] == 0
    assert list(read_observations(tmp_path / "seen")) == []


def test_truncated_anywhere_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "seen"
    write_observations(observed(Job(steps=1)), path)
    data = path.read_bytes()
    for size in [*range(0, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(DecodeError, match=r"^[^\n]*seen: [^\n]*$"):
            list(read_observations(path))


def test_random_damage_is_one_line_or_an_observation(tmp_path: Path) -> None:
    path, generator = tmp_path / "seen", np.random.default_rng(0)
    write_observations(observed(Job(steps=1, shapes=((20,),))), path)
    data = path.read_bytes()
    for _ in range(500):
        at = int(generator.integers(len(data)))
        path.write_bytes(data[:at] + generator.bytes(1) + data[at + 1 :])
        try:
            list(read_observations(path))
        except DecodeError as error:
            assert "\n" not in str(error)


def test_a_foreign_or_missing_file_is_one_line(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "model")
    with pytest.raises(DecodeError, match="was it written by gradtap decode"):
        list(read_observations(tmp_path / "model"))
    with pytest.raises(DecodeError, match="missing"):
        list(read_observations(tmp_path / "missing"))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "seen"
    path.write_bytes(b"old")

    def failing() -> list[Observation]:
        raise DecodeError("halfway")

    with pytest.raises(DecodeError):
        write_observations((seen for seen in failing()), path)
    with pytest.raises(OSError):
        write_observations([], tmp_path / "no such folder" / "seen")
    assert path.read_bytes() == b"old" and [one.name for one in tmp_path.iterdir()] == ["seen"]
