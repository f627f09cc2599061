"""From observations to files to scores, with victims of every fate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from attack.algorithms import Status
from attack.errors import AnswerError, AttackError
from attack.evaluate import evaluate
from attack.observation import Observation
from attack.victims import Plan, VictimProgress, attack_all
from tests.attack.toys import example, observe, told


def victims_of_every_fate(run: Path) -> tuple[list[Observation], torch.Tensor]:
    """Two that come back, one without weights, one with a spoiled gradient; and the truth in the run folder."""
    (run / "truth").mkdir()
    seen = []
    for step, rank in ((1, 0), (0, 1), (0, 0), (1, 1)):
        model, inputs, labels = example("convolution", seed=10 * step + rank)
        seen.append(observe(model, inputs, labels, rank=rank, step=step, world_size=2))
        tensors = {"inputs": inputs, "labels": labels}
        safetensors.torch.save_file(tensors, run / "truth" / f"step{step}.rank{rank}.safetensors")
    seen[0] = dataclasses.replace(seen[0], weights=None)
    seen[3] = dataclasses.replace(seen[3], gradient=seen[3].gradient * float("nan"))
    return seen, inputs


@pytest.mark.parametrize("processes", [1, 2])
def test_answer_and_evaluation(tmp_path: Path, processes: int) -> None:
    seen, inputs = victims_of_every_fate(tmp_path)
    heard: list[VictimProgress] = []
    plan = Plan(processes=processes, deadline_s=30)
    answer = attack_all(iter(seen), told("convolution", inputs), tmp_path / "attack", plan=plan, listener=heard.append)

    assert answer == json.loads((tmp_path / "attack" / "attack.json").read_text())
    fates = {(v["step"], v["rank"]): v["status"] for v in answer["victims"]}
    assert fates == {(0, 0): "converged", (0, 1): "converged", (1, 0): "not_observed", (1, 1): "not_converged"}
    assert list(fates) == sorted(fates)
    assert all(victim["reason"] for victim in answer["victims"] if victim["status"] != "converged")
    tensors = safetensors.torch.load_file(tmp_path / "attack" / "reconstructions.safetensors")
    assert {name for name in tensors if name.startswith("step1")} == set()
    assert tensors["step0.rank1.inputs"].shape == (1, 2, 8, 8)
    assert len(tensors["step0.rank1.frames"]) == len(tensors["step0.rank1.frame_iterations"])
    endings = [news.status for news in heard if news.status is not None]
    assert sorted(endings) == sorted(Status(fate) for fate in fates.values())
    assert (heard[-1].done, heard[-1].total) == (4, 4)

    evaluation = evaluate(tmp_path)
    assert evaluation == json.loads((tmp_path / "attack" / "evaluation.json").read_text())
    assert evaluation["counts"]["converged"] == evaluation["counts"]["read_back"] == 2
    for victim in evaluation["victims"]:
        if victim["status"] == "converged":
            assert victim["psnr_db"] > 40 and victim["label_ok"] is True
        else:
            assert victim["psnr_db"] is victim["mse"] is victim["ssim"] is victim["label_ok"] is None


def test_number_of_processes_does_not_change_an_answer(tmp_path: Path) -> None:
    seen, inputs = victims_of_every_fate(tmp_path)
    for processes in (1, 2):
        attack_all(seen, told("convolution", inputs), tmp_path / str(processes), plan=Plan(processes=processes))
    one, two = (safetensors.torch.load_file(tmp_path / n / "reconstructions.safetensors") for n in ("1", "2"))
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_no_victims_is_an_answer_too(tmp_path: Path) -> None:
    answer = attack_all([], told("linear", torch.zeros(1, 12)), tmp_path / "attack")
    assert answer["victims"] == []
    assert evaluate(tmp_path)["counts"]["victims"] == 0


def test_model_that_does_not_fit_ends_all_in_one_line(tmp_path: Path) -> None:
    seen, inputs = victims_of_every_fate(tmp_path)
    with pytest.raises(AttackError, match="does not fit the traffic"):
        attack_all(seen, told("linear", inputs), tmp_path / "attack", plan=Plan(processes=2))
    assert not (tmp_path / "attack" / "attack.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "there are: auto, rgap"),
        ({"deadline_s": 0}, "more than 0 s"),
        ({"processes": 0}, "at least 1"),
    ],
)
def test_plan_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(AttackError, match=message):
        Plan(**changes)


def test_evaluate_names_the_file_and_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(AnswerError, match=r"attack\.json: no such file; run first: gradtap attack"):
        evaluate(tmp_path)
    seen, inputs = victims_of_every_fate(tmp_path)
    attack_all(seen, told("convolution", inputs), tmp_path / "attack", plan=Plan(processes=1))
    truth = tmp_path / "truth" / "step0.rank0.safetensors"
    truth.write_bytes(b"not a tensor")
    with pytest.raises(AnswerError, match=r"step0\.rank0\.safetensors: damaged"):
        evaluate(tmp_path)
    truth.unlink()
    with pytest.raises(AnswerError, match=r"step0\.rank0\.safetensors: no such file"):
        evaluate(tmp_path)
    (tmp_path / "attack" / "attack.json").write_text("{}")
    with pytest.raises(AnswerError, match=r"attack\.json: KeyError\('knowledge'\) is not as an attack writes it"):
        evaluate(tmp_path)
