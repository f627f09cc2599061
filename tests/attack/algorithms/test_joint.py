"""A batch that came at several steps: exact where one step's equations run out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from attack.algorithms import Status
from attack.observation import Observation
from attack.reconstruct import reconstruct
from harness.models import load_model
from tests.attack.algorithms.test_gauss_newton import batch, errors, spec, told
from tests.attack.toys import observe

NARROW, WIDE = spec("narrow"), spec("wide")
RATE = 0.1


def train(inputs: Tensor, labels: Tensor, *, steps: int, seed: int, model: str = NARROW) -> list[Observation]:
    """What a tap sees of gradient descent on one batch."""
    torch.manual_seed(seed)
    net, seen = load_model(model), []
    for step in range(steps):
        seen.append(observe(net, inputs, labels, step=step))
        parts = seen[-1].gradient.split([parameter.numel() for parameter in net.parameters()])
        with torch.no_grad():
            for parameter, part in zip(net.parameters(), parts, strict=True):
                parameter -= RATE * part.view_as(parameter)
    return seen


def joined(seen: list[Observation]) -> Observation:
    return dataclasses.replace(seen[0], again=tuple(seen[1:]))


@pytest.mark.parametrize(("size", "seed"), [(1, 7), (4, 3)])
def test_steps_together_determine_what_one_does_not(size: int, seed: int) -> None:
    _, inputs, labels = batch(NARROW, size, seed=seed)
    seen = train(inputs, labels, steps=4, seed=seed)
    alone = reconstruct(seen[0], told(NARROW, batch_size=size), method="gauss-newton")
    assert alone.status is not Status.CONVERGED
    found = reconstruct(joined(seen), told(NARROW, batch_size=size))
    assert found.status is Status.CONVERGED and found.steps == (0, 1, 2, 3)
    error = errors(found, inputs, labels).mean()
    assert error < 1e-4
    assert found.predicted_mse is not None and error < found.predicted_mse < 1e-3


def test_another_batch_is_noticed_and_left_out() -> None:
    _, inputs, labels = batch(NARROW, 4, seed=5)
    _, others, _ = batch(NARROW, 4, seed=6)
    other = observe(load_model(NARROW), others, labels, step=1)  # the same labels
    found = reconstruct(joined([*train(inputs, labels, steps=1, seed=5), other]), told(NARROW))
    assert found.status is Status.FILLED and found.steps == (0,)
    assert found.reason is not None and "step" in found.reason
    assert errors(found, inputs, labels).max() < 0.1 * inputs.var()


def test_exact_methods_say_which_steps_they_explain() -> None:
    _, inputs, labels = batch(WIDE, 1, seed=7)
    seen = train(inputs, labels, steps=2, seed=7, model=WIDE)
    found = reconstruct(joined(seen), told(WIDE, batch_size=1))
    assert found.status is Status.CONVERGED and found.steps == (0, 1)
