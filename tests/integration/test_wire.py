"""Real processes in the lab: what is decoded is what the ranks sent, and nobody notices that somebody listens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attack.buffers import complete_buffers
from attack.decode.export import read_observations, write_observations
from attack.decode.recording import Desk, Recording
from attack.evaluate import evaluate
from attack.observation import EVERYONE, Known, Observation
from harness.config import TrainConfig
from nodes.cli import main
from nodes.commands.lab import Lab
from tests.attack.decode.gloo.loss import SEVERITIES, read_segments, reassembled

pytestmark = pytest.mark.lab


def record(run: Path, *, workers: int, servers: int, tap: str = "all", **options: Any) -> None:
    train = TrainConfig(tensorboard=False, **options)
    done = Lab(out=run, num_workers=workers, num_servers=servers, tap=tap, train=train).run()
    assert done.ok, done.text
    assert done.json["dropped"] == 0


def observed(run: Path, *, optimizer: str | None) -> list[Observation]:
    return list(Recording(run / "wire.pcapng", optimizer=optimizer).observations())


def truth(run: Path, seen: Observation) -> dict[str, torch.Tensor]:
    return load_file(run / "truth" / f"step{seen.step}.rank{seen.rank}.safetensors")


@pytest.mark.parametrize(
    ("workers", "servers", "options"),
    [
        (2, 1, {"optimizer": "sgd:lr=0.1,momentum=0.9,weight_decay=0.001", "steps": 5}),
        (3, 2, {"optimizer": "adam:lr=0.001", "model": "mlp:hidden=40", "batch_size": 2}),
        (2, 1, {"model": "resnet:depth=10,width=4", "data": "fashion-mnist", "batch_size": 2}),
    ],
)
def test_every_gradient_and_every_weight_to_the_bit(
    tmp_path: Path, workers: int, servers: int, options: dict[str, Any]
) -> None:
    record(tmp_path, workers=workers, servers=servers, **options)
    config = TrainConfig(**options)
    seen = observed(tmp_path, optimizer=config.optimizer)
    assert [(one.step, one.rank) for one in seen] == [(s, r) for s in range(config.steps) for r in range(workers)]
    for one in seen:
        sent = truth(tmp_path, one)
        assert one.weights is not None and bool((one.known == Known.RAW).all())
        assert torch.equal(one.gradient, sent["gradient"]), f"gradient of step {one.step} rank {one.rank}"
        assert torch.equal(one.weights, sent["weights"]), f"weights of step {one.step} rank {one.rank}"


def test_ddp_shows_the_statistics_before_and_after_rank_0s_forward_pass(tmp_path: Path) -> None:
    model = "resnet:depth=10,width=4"
    record(tmp_path, workers=2, servers=1, exchange="ddp", model=model, batch_size=2, steps=3)
    seen = [one for one in complete_buffers(observed(tmp_path, optimizer=None)) if one.rank == 0]
    left = [truth(tmp_path, one)["buffers"] for one in seen]  # as the step's forward pass left them
    for one, before, after in zip(seen[1:], left[:-1], left[1:], strict=True):
        assert one.buffers is not None and torch.equal(one.buffers, before)
        assert one.buffers_after is None if one is seen[-1] else torch.equal(one.buffers_after, after)
        assert not torch.equal(before, after)


def test_of_a_defended_job_no_more_is_known_than_its_code_says(tmp_path: Path) -> None:
    record(tmp_path, workers=2, servers=1, defense="clip:1e9+topk:0.9", steps=3)
    seen = observed(tmp_path, optimizer="sgd:lr=0.1")
    assert len(seen) == 6
    for one in seen:
        sent = truth(tmp_path, one)
        raw = one.known == Known.RAW
        assert one.complete and one.defense == "clip:1e9+topk:0.9"
        assert torch.equal(one.gradient[raw], sent["gradient"][raw]) and torch.equal(one.limited, raw)
        assert one.weights is not None and torch.equal(one.weights, sent["weights"])
    assert all(0.09 < one.known_fraction < 0.11 for one in seen if one.step == 0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    mask, values = 85_036 // 8, 4 * (90 + 360 + 360 + 7680 + 10 + 3 * 2)  # a tenth of each tensor, rounded up
    assert all(0 <= line["bytes_out"] - mask - values <= 2 for line in lines)


@pytest.mark.parametrize(
    "options",
    [
        {"exchange": "ddp", "defense": "prune:0.7", "model": "resnet:depth=10,width=4", "data": "fashion-mnist"},
        {"exchange": "allreduce", "defense": "bf16", "model": "mlp:hidden=40"},
    ],
)
def test_codes_that_ranks_gather_or_sum_are_read_as_those_that_a_server_gets(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    record(tmp_path, workers=2, servers=1, steps=2, **options)
    seen = observed(tmp_path, optimizer="sgd:lr=0.1")
    assert [(one.step, one.rank) for one in seen] == [(s, r) for s in range(2) for r in range(2)]
    for one in seen:
        sent = truth(tmp_path, one)
        raw = one.known == Known.RAW
        assert one.complete and one.known_fraction == 1 and one.defense and one.bound is not None
        assert torch.equal(one.gradient[raw], sent["gradient"][raw])
        assert bool(((one.gradient - sent["gradient"]).abs() <= one.bound).all())
        assert one.weights is not None and torch.equal(one.weights, sent["weights"])
        assert (one.defense == "prune:0.7") == (0.29 < one.exact_fraction < 0.31)
    # What the ranks counted is what the tap saw, but for a number or two that DDP agrees on as it starts.
    counted = sum(json.loads(line)["bytes_out"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    (group,) = Recording(tmp_path / "wire.pcapng").inspect()["groups"]
    on_the_wire = sum(kind["bytes"] for kind in group["collectives"] if kind["kind"] in ("allreduce", "allgather"))
    assert 0 <= on_the_wire - counted <= 64


def test_where_ranks_serve_the_rest_is_known_within_its_bound(tmp_path: Path) -> None:
    record(tmp_path, workers=3, servers=0)
    seen = observed(tmp_path, optimizer="sgd:lr=0.1")
    assert len(seen) == 9
    for one in seen:
        sent = truth(tmp_path, one)
        raw = one.known == Known.RAW
        assert one.complete and one.bound is not None
        assert one.weights is not None and torch.equal(one.weights, sent["weights"])
        assert torch.equal(one.gradient[raw], sent["gradient"][raw])
        assert bool(((one.gradient - sent["gradient"]).abs() <= one.bound).all())
        # Its own third of its own gradient never crosses the wire.
        assert one.exact_fraction == pytest.approx(2 / 3, abs=1e-4)


def test_training_with_the_tap_and_without_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    losses = []
    for tap in ("all", "none"):
        run = tmp_path / tap
        record(run, workers=2, servers=1, tap=tap, steps=6, truth=False)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append(sorted((line["step"], line["rank"], line["loss"]) for line in lines))
        assert (run / "wire.pcapng").exists() == (tap == "all")
    assert len(losses[0]) == 12 and losses[0] == losses[1]


def test_of_masked_gradients_the_mean_alone_is_known(tmp_path: Path) -> None:
    options = {"model": "mlp:hidden=64", "data": "mnist", "steps": 2}
    record(tmp_path / "run", workers=2, servers=1, defense="clip:1e9+secure-aggregation", **options)
    run = tmp_path / "run"
    seen = observed(run, optimizer="sgd:lr=0.1")
    assert [(one.step, one.rank, one.ranks) for one in seen] == [(s, EVERYONE, (0, 1)) for s in range(2)]
    plain = {}
    for one in seen:
        sent = [load_file(run / "truth" / f"step{one.step}.rank{rank}.safetensors") for rank in range(2)]
        mean = plain[one.step] = torch.stack([each["gradient"] for each in sent]).double().mean(dim=0)
        assert one.complete and one.bound is not None and one.defense == "clip:1e9+secure-aggregation"
        assert bool(((one.gradient - mean).abs() <= one.bound).all()) and float(one.bound.max()) < 1e-6
        assert one.weights is not None and torch.equal(one.weights, sent[0]["weights"])
    found = Recording(run / "wire.pcapng").inspect()
    assert any("masked" in note for note in found["notes"]) and found["steps"][0]["ranks"][0]["ranks"] == [0, 1]
    counts = write_observations(seen, tmp_path / "seen.safetensors")
    assert counts["complete"] == 2
    for one, again in zip(seen, read_observations(tmp_path / "seen.safetensors"), strict=True):
        assert (again.rank, again.ranks) == (one.rank, one.ranks) and torch.equal(again.gradient, one.gradient)
    segments = read_segments(run / "wire.pcapng")
    for severity in ("5 %", "20 % in bursts of 20", "one direction", "5 % and both ends cut off"):
        for one in Desk(reassembled(SEVERITIES[severity](list(segments), random.Random(0)))).observations():
            assert one.rank == EVERYONE and one.bound is not None
            known = one.known == Known.DIFFERENCED
            assert bool(((one.gradient - plain[one.step]).abs() <= one.bound)[known].all())
    knowledge = (
        "--batch-size",
        "1",
        "--model",
        "mlp:hidden=64,input=1x28x28,classes=10",
        "--optimizer",
        "sgd:lr=0.1",
        "--processes",
        "1",
    )
    assert main(["attack", str(run / "wire.pcapng"), *knowledge, "--out", str(run / "attack")]) == 0
    scores = evaluate(run)["victims"]
    assert [len(score["examples"]) for score in scores] == [2, 2]  # both ranks' batches, as one
    assert all(score["status"] == "converged" and score["psnr_db"] > 60 for score in scores)


def test_under_curve_nothing_is_observed_and_inspect_says_why(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["keys", "--out", str(tmp_path / "keys"), "--num-workers", "2"]) == 0
    train = TrainConfig(tensorboard=False, model="mlp:hidden=40", steps=2)
    done = Lab(out=tmp_path / "run", num_workers=2, keys=tmp_path / "keys", train=train).run()
    assert done.ok, done.text
    capture = str(tmp_path / "run" / "wire.pcapng")
    found = Recording(capture).inspect()
    assert found["encrypted"] and found["steps"] == []
    assert {entry["mechanism"] for entry in found["sealed"]} == {"CURVE"}
    assert (tmp_path / "keys" / "rank1.pem").stat().st_mode & 0o777 == 0o600  # and for the tunnel
    capsys.readouterr()
    assert main(["attack", capture, "--model", "mlp:hidden=40", "--out", str(tmp_path / "attack"), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["victims"], answer["status"]) == ([], "not_observed")
    assert answer["reason"] == "the traffic is encrypted (CURVE), and no gradient can be decoded"
