"""What an answer predicts of its own error, beside the error that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch

from attack.algorithms import Answer, Status
from attack.certificate import certify
from attack.engine.target import prepare
from attack.reconstruct import reconstruct
from nodes.benchmarks.subjects import Subject, stage
from tests.attack.toys import example, observe, told, unhurried

FLOAT32_RESOLUTION = 2.0**-50


@pytest.mark.parametrize("observed", ["raw", "differenced", "holes", "float16"])
@pytest.mark.parametrize(
    ("model", "batch_size"), [("lenet:channels=8", 1), ("mlp:hidden=64", 1), ("mlp:hidden=100,activation=tanh", 2)]
)
def test_it_holds_and_is_not_far_off(model: str, batch_size: int, observed: str) -> None:
    ratios = []
    for seed in range(2):
        subject = Subject(
            model=model, data="faces", batch_size=batch_size, trained=20 * seed, observed=observed, seed=seed
        )
        observation, knowledge, truth = stage(subject)
        found = reconstruct(observation, knowledge, method="rgap" if batch_size == 1 else "unmix")
        if found.status is not Status.CONVERGED:
            continue
        assert found.inputs is not None and found.predicted_mse is not None
        apart = (found.inputs.flatten(1)[:, None] - truth.inputs.flatten(1)).double().square().mean(-1)
        true = float(apart.min(1).values.mean())
        assert found.predicted_mse >= true
        # Below half a unit in float32's last place, squared, rounding makes most of the answer equal to the truth.
        ratios.append(found.predicted_mse / max(true, FLOAT32_RESOLUTION))
    assert ratios
    assert min(ratios) < 100


def test_answer_beside_the_best_match_is_widened() -> None:
    model, inputs, labels = example("sigmoid", batch=1)
    target = prepare(observe(model, inputs, labels), told("sigmoid", inputs), device=torch.device("cpu"))
    context = unhurried()

    def exactly(moved: Iterable[object]) -> Iterable[torch.Tensor]:
        return (inputs.double() for _ in moved)

    near = Answer(inputs=inputs.double(), labels=labels, again=exactly)
    far = dataclasses.replace(near, inputs=inputs.double() + 1e-4)
    one, two = (certify(target, answer, context).predicted_mse for answer in (near, far))
    assert one is not None and two is not None and two > 100 * one


def test_replay_has_the_error_of_float32_and_the_holes_of_the_observation() -> None:
    model, inputs, labels = example("tanh", batch=2)
    seen = observe(model, inputs, labels)
    seen = dataclasses.replace(seen, known=(torch.arange(len(seen.known)) % 3 > 0).to(torch.uint8))
    target = prepare(seen, told("tanh", inputs), device=torch.device("cpu"))
    again = target.replay(inputs.double(), labels)
    assert again.gradient.equal(target.gradient)  # the same arithmetic, to the bit
    assert 0 < again.residual(inputs.double(), labels) < 1e-6
