"""Training: seeds fix everything, a checkpoint goes on to the same bits, and what is logged is what happened."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.accuracy import accuracy
from harness.config import TrainConfig, read_config, write_config
from harness.data import load_data
from harness.errors import CheckpointError, ConfigError
from harness.exchange import LocalExchange
from harness.exchange.base import flat_state
from harness.training import Trainer, resolve_model


def trained(config: TrainConfig, run: Path | None = None, *, resume: bool = False) -> torch.Tensor:
    trainer = Trainer(config, rank=0, world_size=1)
    if resume:
        assert run is not None
        trainer.resume(run)
    trainer.train(LocalExchange(), run=run)
    return flat_state(trainer.model)


SMALL = TrainConfig(batch_size=2, steps=6, tensorboard=False, truth=False)

OPTIMIZERS = [
    "sgd:lr=0.1+cosine:T_max=5",
    "sgd:lr=0.1,momentum=0.9,weight_decay=0.01,nesterov=true",
    "adam:lr=0.01",
    "adamw:lr=0.01",
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["lenet", "resnet:depth=10,width=4"])
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, optimizer: str, model: str) -> None:
    config = dataclasses.replace(SMALL, optimizer=optimizer, model=model)
    whole = trained(config)
    trained(dataclasses.replace(config, steps=4, checkpoint_every=2), tmp_path)
    assert torch.equal(trained(config, tmp_path, resume=True), whole)


def test_two_equal_seeds_agree_and_two_different_ones_do_not() -> None:
    assert torch.equal(trained(SMALL), trained(SMALL))
    assert not torch.equal(trained(SMALL), trained(dataclasses.replace(SMALL, seed=1)))


def test_plain_sgd_is_the_update_that_it_says() -> None:
    config = dataclasses.replace(SMALL, steps=1, optimizer="sgd:lr=0.5")
    trainer = Trainer(config, rank=0, world_size=1)
    before, seen = flat_state(trainer.model), []
    trainer.train(LocalExchange(), progress=lambda step, gradients: seen.append(gradients.flat))
    # One float32 rounding of lr * g and one of the difference: a unit in the last place of weights below 1.
    assert torch.allclose(flat_state(trainer.model), before - 0.5 * seen[0], rtol=0, atol=2**-23)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trained(dataclasses.replace(SMALL, steps=2, checkpoint_every=2), tmp_path)
    with pytest.raises(CheckpointError, match="was written with seed = 0, and this run has 1"):
        trained(dataclasses.replace(SMALL, seed=1), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trained(SMALL, tmp_path / "none", resume=True)
    file = tmp_path / "checkpoints" / "step2.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step2\.safetensors: cannot be read"):
        trained(SMALL, tmp_path, resume=True)


def test_what_is_logged_is_what_happened(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, steps=4, truth=True, tensorboard=True, checkpoint_every=2)
    trained(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and {line["rank"] for line in lines} == {0}
    assert {"gradient", "exchange", "update"} <= set(lines[0]["seconds"]) == set(lines[0]["cpu_seconds"])
    assert list((tmp_path / "tensorboard").glob("events*"))
    truth = load_file(tmp_path / "truth" / "step2.rank0.safetensors")
    assert truth["inputs"].shape == (2, 3, 32, 32) and truth["labels"].shape == (2,)
    assert truth["gradient"].shape == truth["weights"].shape == (85036,)


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    trained(dataclasses.replace(SMALL, steps=5, checkpoint_every=3), tmp_path)
    trained(SMALL, tmp_path, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]


def test_settings_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size: wanted 1 or more, got 0"):
        TrainConfig(batch_size=0)
    with pytest.raises(ConfigError, match="zeromq, allreduce, ddp"):
        TrainConfig(exchange="mpi")
    with pytest.raises(ConfigError, match="learning rate is missing"):
        Trainer(dataclasses.replace(SMALL, optimizer="adam"), rank=0, world_size=1)
    with pytest.raises(ConfigError, match="does not take the pictures of mnist, 1x28x28"):
        Trainer(dataclasses.replace(SMALL, data="mnist", model="lenet:input=3x32x32"), rank=0, world_size=1)
    with pytest.raises(ConfigError, match="needs"):
        Trainer(dataclasses.replace(SMALL, model="lenet:classes=10"), rank=0, world_size=1)
    with pytest.raises(ConfigError, match="cross_entropy"):
        Trainer(dataclasses.replace(SMALL, loss="hinge"), rank=0, world_size=1)
    with pytest.raises(ConfigError, match="not the configuration of a run"):
        read_config(tmp_path)


def test_a_model_without_a_shape_takes_that_of_the_data() -> None:
    data = Trainer(dataclasses.replace(SMALL, data="fashion-mnist"), rank=0, world_size=1).data
    assert resolve_model("lenet", data, "cross_entropy") == "lenet:input=1x28x28,classes=10"
    assert resolve_model("mlp:hidden=20", data, "cross_entropy") == "mlp:input=1x28x28,classes=10,hidden=20"
    assert resolve_model("lenet:input=3x32x32", data, "cross_entropy") == "lenet:input=3x32x32,classes=10"
    assert resolve_model("some.package:factory", data, "cross_entropy") == "some.package:factory"


def test_the_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_config(tmp_path, SMALL)
    assert read_config(tmp_path) == SMALL


def test_weights_of_another_run_are_what_it_begins_with(tmp_path: Path) -> None:
    before = trained(dataclasses.replace(SMALL, data="fashion-mnist", checkpoint_every=6), tmp_path)
    file = tmp_path / "checkpoints" / "step6.safetensors"
    begun = dataclasses.replace(SMALL, data="mnist", seed=5, weights=str(file), optimizer="sgd:lr=0", steps=1)
    assert torch.equal(trained(begun), before)
    with pytest.raises(CheckpointError, match=r"step6\.safetensors: does not fit the model"):
        trained(dataclasses.replace(begun, data="cifar100"))


def test_accuracy_is_the_share_of_right_classes(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, data="mnist:part=train", steps=1, checkpoint_every=1)
    trainer = Trainer(config, rank=0, world_size=1)
    trainer.train(LocalExchange(), run=tmp_path)
    test = load_data("mnist:part=test")
    found = accuracy(trainer.config.model, tmp_path / "checkpoints" / "step1.safetensors", test)
    right = 0
    for picture, label in zip(test.pictures, test.labels, strict=True):  # slow and obvious
        right += int(trainer.model(torch.from_numpy(picture)[None].float() / 255).argmax()) == label
    assert found == pytest.approx(right / 1000, rel=1e-6)  # a float32's share
