"""The audit of somebody else's job, as the README tells it: stock torchrun and DDP in, every rank's pictures out."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from nodes.cli import main
from nodes.node import PROJECT

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(find_spec("foolbox") is None, reason="needs the pictures that come with foolbox"),
]
RANKS = 2


def pictures(count: int) -> list[str]:
    """Files of real pictures, their class at the end of the name."""
    spec = find_spec("foolbox")
    assert spec is not None and spec.origin is not None
    return [str(file) for file in sorted((Path(spec.origin).parent / "data").glob("cifar100_*.png"))[:count]]


def gradtap(*arguments: object) -> None:
    """Runs a command, which must end well."""
    assert main([str(argument) for argument in arguments]) == 0


def psnr_db(found: np.ndarray, truth: np.ndarray) -> float:
    """Of inputs from 0 to 1."""
    return -10 * math.log10(float(np.mean((found - truth) ** 2)))


def test_every_picture_of_every_rank_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, saved = tmp_path / "run", tmp_path / "saved"
    monkeypatch.setenv("SAVE_BATCHES", str(saved))
    script = PROJECT / "examples/ddp_train.py"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", RANKS)
    gradtap("lab", "--out", run, "--", *torchrun, script, *pictures(2 * RANKS))

    capsys.readouterr()
    gradtap("inspect", run / "wire.pcapng", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == RANKS and found["gaps"] == []
    assert [[rank["complete"] for rank in step["ranks"]] for step in found["steps"]] == [[True] * RANKS] * 2

    seen = run / "observations.safetensors"
    capsys.readouterr()
    gradtap("decode", run / "wire.pcapng", "--out", seen, "--json")
    decoded = json.loads(capsys.readouterr().out)
    assert (decoded["optimizer"], decoded["optimizer_source"]) == ("sgd:lr=0.1", "inferred")
    assert decoded["inference"]["checks"] >= RANKS and decoded["steps_not_confirmed"] == []
    model = f"{PROJECT / 'examples/ddp_model.py'}:build"
    gradtap("attack", seen, "--model", model, "--input-shape", "3x32x32", "--out", run / "attack")
    answer = safetensors.numpy.load_file(run / "attack/reconstructions.safetensors")
    for truth in sorted(saved.iterdir()):
        batch = np.load(truth)
        assert psnr_db(answer[f"{truth.stem}.inputs"], batch["inputs"]) >= 40, truth.stem
        assert answer[f"{truth.stem}.labels"].tolist() == batch["labels"].tolist(), truth.stem
    assert len(list(saved.iterdir())) == 2 * RANKS

    capsys.readouterr()
    gradtap("evaluate", run, "--truth", saved, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["read_back"] == 2 * RANKS and Path(found["report"]).exists()
