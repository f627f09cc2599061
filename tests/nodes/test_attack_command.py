"""`gradtap attack` in processes that are really killed, alone and under torchrun: what is done is kept."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from attack.decode.export import write_observations
from nodes.cli import main
from nodes.torchrun import TORCHRUN
from tests.attack.algorithms.test_joint import NARROW, batch, train
from tests.attack.test_victims import untimed
from tests.attack.toys import example, observe, spec
from tests.nodes.labs import TOKEN, living, processes, read, until

PROJECT = Path(__file__).parents[2]
VICTIMS = 10
GRADTAP = ("-c", "import sys; from nodes.cli import main; sys.exit(main())")
TOGETHER = (*TORCHRUN, "--nproc-per-node", "2", "--no-python", sys.executable, *GRADTAP)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Observations, and what an attack that nobody interrupts makes of them: searches, so that it takes a while."""
    folder = tmp_path_factory.mktemp("whole")
    seen = [observe(*example("convolution", seed=seed), step=seed) for seed in range(VICTIMS)]
    write_observations(seen, folder / "seen.safetensors")
    assert main(options(folder, folder / "attack")) == 0
    return folder


def options(whole: Path, out: Path) -> list[str]:
    what = ["attack", str(whole / "seen.safetensors"), "--model", spec("convolution"), "--input-shape", "2x8x8"]
    return [*what, "--batch-size", "1", "--method", "idlg", "--out", str(out), "--json"]


def start(program: Sequence[str], whole: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (*program, *options(whole, out)),
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until_kept(out: Path, count: int) -> None:
    until(lambda: len(list((out / "kept").glob("*.safetensors"))) >= count, patience_s=60)


def kept_of(complaint: str) -> int:
    """How many victims an interrupted attack says that it kept."""
    said = re.search(
        rf"gradtap: interrupted; (\d+) of {VICTIMS} victims .* the same command goes on from there", complaint
    )
    assert said, complaint
    return int(said[1])


def answer(text: str) -> dict[str, Any]:
    """The one JSON object on standard output."""
    return dict(json.loads(text))


def assert_same(out: Path, whole: Path, said: dict[str, Any]) -> None:
    as_file, wanted = (json.loads((folder / "attack.json").read_text()) for folder in (out, whole / "attack"))
    assert untimed(said) == untimed(as_file) == untimed(wanted)
    tensors = [folder / "reconstructions.safetensors" for folder in (out, whole / "attack")]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
    assert not (out / "kept").exists()


def test_killed_attack_goes_on_where_it_was(whole: Path, tmp_path: Path, token: str) -> None:
    program = (sys.executable, *GRADTAP)
    with start(program, whole, tmp_path) as killed:
        until_kept(tmp_path, 1)
        killed.kill()
    until(lambda: not living(token))  # its processes end with it, in the middle of their victims
    before = len(list((tmp_path / "kept").glob("*.safetensors")))
    with start(program, whole, tmp_path) as interrupted:
        until_kept(tmp_path, before + 1)
        interrupted.send_signal(signal.SIGINT)
        out, complaint = interrupted.communicate(timeout=20)
    assert interrupted.returncode == 130 and out == ""
    assert kept_of(complaint) > before
    assert complaint.count("kept from before") == before and "Traceback" not in complaint
    assert not living(token)
    with start(program, whole, tmp_path) as last:
        out, complaint = last.communicate(timeout=60)
    assert last.returncode == 0, complaint
    assert_same(tmp_path, whole, answer(out))
    assert answer(out)["resumed"] >= before + 1


def test_ranks_of_torchrun_share_the_victims(whole: Path, tmp_path: Path, token: str) -> None:
    with start(TOGETHER, whole, tmp_path) as job:
        until_kept(tmp_path, 1)
        os.kill(process_of_rank(1, token), signal.SIGKILL)
        out, complaint = job.communicate(timeout=60)
    assert job.returncode == 1 and out == ""
    kept_of(complaint)  # of rank 0, which torchrun ended
    until(lambda: not living(token))
    with start(TOGETHER, whole, tmp_path) as job:
        out, complaint = job.communicate(timeout=60)
    assert job.returncode == 0, complaint
    assert_same(tmp_path, whole, answer(out))
    assert answer(out)["ranks"] == 2 and answer(out)["resumed"] >= 1
    assert len(re.findall(r"step \d rank \d: converged", complaint)) == VICTIMS


def process_of_rank(rank: int, token: str) -> int:
    """The first process with a rank's environment: those that it starts inherit that."""
    marks = {f"{TOKEN}={token}".encode(), f"RANK={rank}".encode()}
    return min(int(process.name) for process in processes() if marks <= set(read(process / "environ").split(b"\0")))


def test_steps_with_the_same_batch_are_one_victim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, inputs, labels = batch(NARROW, 1, seed=8)
    write_observations(train(inputs, labels, steps=4, seed=8), tmp_path / "seen.safetensors")
    command = ["attack", str(tmp_path / "seen.safetensors"), "--model", NARROW, "--input-shape", "3x8x8"]
    assert main([*command, "--same-batch-every", "1", "--out", str(tmp_path / "attack"), "--json"]) == 0
    (victim,) = answer(capsys.readouterr().out)["victims"]
    assert (victim["status"], victim["step"], victim["steps"]) == ("converged", 0, [0, 1, 2, 3])
    assert victim["observation"]["same_batch_steps"] == [1, 2, 3]
    assert main([*command, "--same-batch-every", "0", "--out", str(tmp_path / "attack")]) == 2
    assert "it comes again after 1 step or more, got 0" in capsys.readouterr().err
