"""Real processes under torchrun: four ranks train what one process trains on the joined batch, over every exchange."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from harness.config import EXCHANGE_NAMES, TrainConfig, write_config
from harness.data import batch_at
from harness.exchange import LocalExchange
from harness.exchange.base import flat_state
from harness.models import load_optimizer
from harness.training import Trainer
from nodes.torchrun import TORCHRUN

RANKS, STEPS = 4, 20
CONFIG = TrainConfig(
    batch_size=2, steps=STEPS, optimizer="sgd:lr=0.05,momentum=0.9,weight_decay=0.0001", tensorboard=False, truth=False
)
JOINED = dataclasses.replace(CONFIG, batch_size=2 * RANKS)


def torchrun(run: Path) -> tuple[int, str]:
    """Exit code and what was said on standard error."""
    argv = (*TORCHRUN, "--standalone", "--nproc-per-node", str(RANKS), "-m", "nodes.worker", "--config", str(run))
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=120)[1]
    finally:
        # Told, and not killed, as it then ends its workers, which are in sessions of their own.
        process.terminate()
        process.wait(30)
    return process.returncode, said


def weights(run: Path, step: int) -> torch.Tensor:
    tensors = load_file(run / "checkpoints" / f"step{step}.safetensors")
    model = Trainer(CONFIG, rank=0, world_size=1).model
    model.load_state_dict({name.removeprefix("model."): tensors[name] for name in tensors if name.startswith("model.")})
    return flat_state(model)


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    """The weights that one process reaches in float64 with the four ranks' batches joined."""
    trainer = Trainer(JOINED, rank=0, world_size=1)
    model = trainer.model.double()
    optimizer = load_optimizer(JOINED.optimizer, model.parameters())
    for step in range(STEPS):
        batch = batch_at(trainer.data, seed=JOINED.seed, step=step, rank=0, world_size=1, batch_size=JOINED.batch_size)
        optimizer.zero_grad()
        cross_entropy(model(batch.inputs.double()), batch.labels).backward()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.fixture(scope="module")
def rounding(exact: torch.Tensor) -> float:
    """How far one process in float32 ends from that: what the dtype alone does in these steps to these weights."""
    trainer = Trainer(JOINED, rank=0, world_size=1)
    trainer.train(LocalExchange())
    return distance(flat_state(trainer.model), exact)


def distance(weights: torch.Tensor, exact: torch.Tensor) -> float:
    return float((weights.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("exchange", EXCHANGE_NAMES)
def test_four_ranks_equal_one_process(tmp_path: Path, exchange: str, exact: torch.Tensor, rounding: float) -> None:
    write_config(tmp_path, dataclasses.replace(CONFIG, exchange=exchange, checkpoint_every=STEPS))
    code, said = torchrun(tmp_path)
    assert code == 0, said
    # The ranks add the same examples' gradients in float32 in another order, so they end as far from the exact weights
    # as one process in float32 does, give or take: a relative 2e-7 (seen: 1.8e-7 to 2.5e-7), where a wrong average is
    # off by 1e-2. Each order is another draw of the roundings: three times the size of one draw is room enough.
    assert distance(weights(tmp_path, STEPS), exact) < 3 * rounding < 1e-5
