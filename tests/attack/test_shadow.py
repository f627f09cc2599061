"""The shadow's weights are the worker's, to the bit; and where they are not known it has none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from attack.decode.recording import Recording
from attack.errors import AttackError
from attack.shadow import Shadow
from harness.models import load_model, load_optimizer
from nodes.commands.lab import environment
from nodes.lab import LabConfig, run_lab
from nodes.node import Node
from tests.attack.stock_rules import STEPS, STOCK

RULES = [
    "sgd:lr=0.1",
    "sgd:lr=0.1,momentum=0.9",
    "sgd:lr=0.05,momentum=0.9,weight_decay=0.0005,nesterov=true",
    "adam:lr=0.001",
    "adamw:lr=0.001,weight_decay=0.01",
    "clip:norm=0.1+sgd:lr=0.1,momentum=0.9+cosine:T_max=9",
]


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def gradients(count: int, steps: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(count, generator=generator) * 0.01 for _ in range(steps))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The shadow's process may have more threads than a worker."""
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wide", [False, True])
def test_equal_to_a_worker_to_the_bit(rule: str, wide: bool, threads: int) -> None:
    torch.manual_seed(0)
    # The wide one is above the size at which torch divides elementwise work among threads (32,768 elements).
    worker = nn.Linear(300, 701) if wide else load_model("lenet")
    parameters = list(worker.parameters())
    optimizer = load_optimizer(rule, parameters)
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    shadow = Shadow(weights=flat(worker), step=5, shapes=shapes, optimizer=rule)
    for step, average in enumerate(gradients(flat(worker).numel(), 6), start=5):
        seen = shadow.weights(step)
        assert seen is not None and torch.equal(seen.view(torch.int32), flat(worker).view(torch.int32))
        torch.set_num_threads(1)
        at = 0
        for parameter in parameters:
            own = average[at : at + parameter.numel()].view_as(parameter).clone()
            parameter.grad, at = own, at + parameter.numel()
        optimizer.step()
        torch.set_num_threads(threads)
        shadow.advance(step, average.clone())


def test_it_does_not_guess_beyond_an_average_that_is_not_known() -> None:
    shadow = Shadow(weights=torch.ones(3), step=0, shapes=((3,),), optimizer="sgd:lr=1")
    shadow.advance(0, torch.ones(3))
    assert torch.equal(shadow.weights(1), torch.zeros(3))
    shadow.advance(1, None)
    shadow.advance(2, torch.ones(3))
    assert shadow.weights(2) is None and shadow.weights(3) is None


def test_it_does_not_guess_beyond_a_step_that_was_not_seen() -> None:
    shadow = Shadow(weights=torch.ones(3), step=4, shapes=((3,),), optimizer="sgd:lr=1")
    assert shadow.weights(3) is None
    shadow.advance(3, torch.ones(3))  # before its first step: no concern of its own
    assert shadow.weights(4) is not None
    shadow.advance(5, torch.ones(3))
    assert shadow.weights(5) is None and shadow.weights(6) is None


def test_without_a_declared_optimizer_only_the_first_weights_are_known() -> None:
    start = torch.arange(4.0)
    shadow = Shadow(weights=start, step=0, shapes=((2, 2),), optimizer=None)
    start += 1  # the caller's own: the shadow has a copy
    assert torch.equal(shadow.weights(0), torch.arange(4.0))
    shadow.advance(0, torch.ones(4))
    assert shadow.weights(1) is None


def test_a_wrong_specification_is_one_line() -> None:
    with pytest.raises(AttackError, match="the learning rate is missing"):
        Shadow(weights=torch.ones(1), step=0, shapes=((1,),), optimizer="sgd")


@pytest.mark.lab
def test_a_recorded_job_is_followed_to_the_bit_whatever_its_script_does_to_its_weights(tmp_path: Path) -> None:
    script = Path(__file__).with_name("stock_rules.py")
    argv = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path / "truth"),
    )
    node = Node(name="command", argv=argv, env=environment(hosts=False))
    run_lab(LabConfig(nodes=(node,), run=tmp_path, ring_mib=32, deadline_s=120.0, echo=False))
    truth = [np.load(tmp_path / "truth" / f"step{step}.npz") for step in range(STEPS)]
    for rule in STOCK:
        observations = list(Recording(tmp_path / "wire.pcapng", optimizer=rule).observations())
        assert [(seen.step, seen.rank) for seen in observations] == [(s, r) for s in range(STEPS) for r in range(2)]
        for seen in observations:
            assert seen.weights is not None
            assert np.array_equal(seen.weights.numpy(), truth[seen.step][rule]), f"{rule}: step {seen.step}"
