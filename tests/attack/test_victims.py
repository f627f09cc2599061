"""From observations to files to scores, with victims of every fate."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from attack.algorithms import Status
from attack.errors import AnswerError, AttackError
from attack.evaluate import evaluate
from attack.observation import Observation
from attack.victims import Plan, Share, VictimProgress, attack_all
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


class Stopped(Exception):
    pass


@pytest.mark.parametrize("processes", [1, 2])
def test_attack_that_is_broken_off_goes_on_where_it_was(tmp_path: Path, processes: int) -> None:
    seen, inputs = victims_of_every_fate(tmp_path)
    plan, knowledge = Plan(processes=processes), told("convolution", inputs)
    whole = attack_all(seen, knowledge, tmp_path / "whole", plan=plan)
    heard: list[VictimProgress] = []

    def stop_after_two(news: VictimProgress) -> None:
        if news.status is not None and news.done == 2:
            raise Stopped

    for listener in (stop_after_two, heard.append):
        with contextlib.suppress(Stopped):
            answer = attack_all(seen, knowledge, tmp_path / "attack", plan=plan, listener=listener)
        if listener is stop_after_two:
            assert len(list((tmp_path / "attack" / "kept").glob("*.safetensors"))) >= 2
            assert not (tmp_path / "attack" / "attack.json").exists()
            with pytest.raises(AttackError, match="its seed was 0, not 1; go on with what it was asked"):
                attack_all(seen, knowledge, tmp_path / "attack", plan=dataclasses.replace(plan, seed=1))
    assert answer is not None and whole is not None
    assert sum(news.kept for news in heard) == answer["resumed"] >= 2
    assert untimed(answer) == untimed(whole)
    assert not (tmp_path / "attack" / "kept").exists()
    one, two = (tmp_path / name / "reconstructions.safetensors" for name in ("whole", "attack"))
    assert one.read_bytes() == two.read_bytes()


def untimed(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The victims of an answer, as JSON, without how long they took."""
    return [{k: v for k, v in victim.items() if not k.endswith("seconds")} for victim in answer["victims"]]


def test_shares_meet_at_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, inputs = victims_of_every_fate(tmp_path)
    knowledge, plan = told("convolution", inputs), Plan(processes=1, deadline_s=30)
    whole = attack_all(seen, knowledge, tmp_path / "whole", plan=plan)
    shares = [Share(rank=rank, size=3) for rank in range(3)]
    assert attack_all(seen, knowledge, tmp_path / "attack", plan=plan, share=shares[2]) is None
    monkeypatch.setattr("attack.victims.PATIENCE_S", 0.1 - 2 * plan.deadline_s)
    with pytest.raises(AnswerError, match=r"no other process .* not done: step0\.rank1; .* the same command goes on"):
        attack_all(seen, knowledge, tmp_path / "attack", plan=plan, share=shares[0])
    assert attack_all(seen, knowledge, tmp_path / "attack", plan=plan, share=shares[1]) is None
    together = attack_all(seen, knowledge, tmp_path / "attack", plan=plan, share=shares[0])
    assert whole is not None and together is not None
    assert untimed(together) == untimed(whole) and (together["ranks"], together["resumed"]) == (3, 4)


def test_what_another_share_finishes_meanwhile_was_not_done_before(tmp_path: Path) -> None:
    seen, inputs = victims_of_every_fate(tmp_path)
    attack = functools.partial(
        attack_all, seen, told("convolution", inputs), tmp_path / "attack", plan=Plan(processes=1, deadline_s=30)
    )
    heard: list[VictimProgress] = []

    def other_share_works(news: VictimProgress) -> None:
        if not heard:
            heard.append(news)
            attack(share=Share(rank=1, size=2))
        heard.append(news)

    answer = attack(share=Share(size=2), listener=other_share_works)
    assert answer is not None and (answer["ranks"], answer["resumed"]) == (2, 0)
    assert not any(news.kept for news in heard)


def test_each_rank_takes_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    share = Share(rank=5, size=8, local_rank=1, local_size=4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)), raising=False)
    assert share.plan(Plan()).parallel == 2
    assert share.plan(Plan(processes=3)).parallel == 3
    assert Share().plan(Plan()).parallel == 9
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert share.plan(Plan()).device == "cuda:1"
    assert share.plan(Plan(device="cpu")).device == "cpu"


def test_victims_are_let_go_of_when_they_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attack.victims.AHEAD_BYTES", 1)
    seen, inputs = victims_of_every_fate(tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []
    heard: list[VictimProgress] = []

    def observations() -> Iterator[Observation]:
        for step in range(12):
            one = dataclasses.replace(seen[0], step=step, gradient=seen[0].gradient.clone())
            alive.append(weakref.ref(one.gradient))
            assert sum(ref() is not None for ref in alive) <= 4
            yield one

    plan = Plan(processes=1)
    answer = attack_all(
        observations(), told("convolution", inputs), tmp_path / "attack", plan=plan, listener=heard.append
    )
    assert answer is not None and len(answer["victims"]) == 12
    assert heard[0].total is None and (heard[-1].done, heard[-1].total) == (12, 12)


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
