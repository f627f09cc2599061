"""The update rule is read off the traffic, or said to be unknown; a confident wrong one would be the worst."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from attack.inference.infer import Inference, Verdict, infer_optimizer
from attack.observation import Known, Observation
from attack.shadow import Shadow
from tests.attack.inference.paper import Step, train

RULES = [
    "sgd:lr=0.1",
    "sgd:lr=0.003,momentum=0.9",
    "sgd:lr=0.05,momentum=0.85,nesterov=true",
    "sgd:lr=0.1,momentum=0.9,weight_decay=0.0005",
    "sgd:lr=0.1,momentum=0.9,dampening=0.5",
    "adam:lr=0.001",
    "adam:lr=0.0003,betas=0.9/0.95",
    "adamw:lr=0.001",
    "adamw:lr=0.0003,weight_decay=0.1,betas=0.9/0.95",
    "rmsprop:lr=0.001",
    "adagrad:lr=0.01",
    "nadam:lr=0.002",
]


def expect_right(found: Inference, rule: str, observations: list[Observation], truth: list[torch.Tensor]) -> None:
    """The rule is the job's, and what is said of it holds: its weights are the job's, to the bit."""
    assert found.verdict is not Verdict.UNKNOWN, found.reason
    assert found.optimizer == rule and found.rounded
    first = observations[0]
    assert first.weights is not None
    shadow = Shadow(weights=first.weights, step=0, shapes=first.shapes, optimizer=found.optimizer)
    for step, weights in enumerate(truth):
        assert torch.equal(shadow.weights(step), weights)
        shadow.advance(step, next(seen.average for seen in observations if seen.step == step))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_inferred_to_the_bit(rule: str) -> None:
    observations, truth = train(rule, convolutional=len(rule) % 2 == 0, seed=len(rule))
    found = infer_optimizer(observations)
    expect_right(found, rule, observations, truth)
    assert found.checks == 8 and found.steps == 4 and found.equations == 8 * 19
    assert found.residual is not None and found.residual < 3


@pytest.mark.parametrize(("classes", "batch"), [(10, 3), (30, 4)])
def test_batches_of_several_examples_serve_too(classes: int, batch: int) -> None:
    rule = "sgd:lr=0.05,momentum=0.9"
    observations, truth = train(rule, classes=classes, batch=batch, steps=4, seed=batch)
    expect_right(infer_optimizer(observations), rule, observations, truth)


def test_what_cannot_be_told_apart_is_called_ambiguous() -> None:
    observations, _ = train("sgd:lr=0.1", steps=2)
    found = infer_optimizer(observations)
    assert found.verdict is Verdict.AMBIGUOUS and found.optimizer == "sgd:lr=0.1"
    assert any("momentum=0.9" in other for other in found.as_good)  # shows in the third step
    assert infer_optimizer(train("sgd:lr=0.1", steps=4)[0]).verdict is Verdict.DETERMINED


def test_numbers_that_are_not_round_are_not_called_the_jobs() -> None:
    found = infer_optimizer(train("sgd:lr=0.0123456789")[0])
    assert found.verdict is Verdict.AMBIGUOUS and not found.rounded
    assert found.optimizer is not None
    assert float(found.optimizer.partition("lr=")[2].partition(",")[0]) == pytest.approx(0.0123456789, rel=1e-5)


def sign_descent(parameters: list[nn.Parameter]) -> Step:
    @torch.no_grad()
    def step() -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter -= 0.001 * parameter.grad.sign() * (1 + parameter.grad.abs())

    return step


def lbfgs(parameters: list[nn.Parameter]) -> Step:
    optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=1)
    return lambda: optimizer.step(lambda: torch.tensor(1.0))


def noisy(parameters: list[nn.Parameter]) -> Step:
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def step() -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad += 1e-4 * torch.randn_like(parameter)
        optimizer.step()

    return step


@pytest.mark.parametrize(
    "rule",
    [
        sign_descent,
        lbfgs,
        noisy,
        "rmsprop:lr=0.001,centered=true",
        "adam:lr=0.001+warmup-linear:warmup=3,steps=20",
        "sgd:lr=0.1,momentum=0.9+exponential:gamma=0.7",
    ],
)
def test_a_rule_that_was_not_tried_is_unknown(rule: str | Callable[[list[nn.Parameter]], Step]) -> None:
    found = infer_optimizer(train(rule)[0])
    assert found.verdict is Verdict.UNKNOWN and found.optimizer is None, found
    assert "none of" in found.reason


def test_no_evidence_is_no_rule() -> None:
    observations, _ = train("sgd:lr=0.1")
    holes = [dataclasses.replace(seen, known=torch.full_like(seen.known, Known.UNKNOWN)) for seen in observations]
    blind = [dataclasses.replace(seen, weights=None) for seen in observations]
    smooth = train("sgd:lr=0.1", smoothing=0.1)[0]
    large = train("sgd:lr=0.1", batch=15)[0]
    still = train("sgd:lr=1e-9")[0]
    apart = [dataclasses.replace(seen, average=None) for seen in observations]
    for seen, why in [
        (holes, "not wholly known"),
        (blind, "no step's weights were seen"),
        (smooth, "cross-entropy"),
        (large, "tell 1 to 10 examples apart"),
        (still, "do not move"),
        (apart, "average"),
        (observations[:2], "after the first step"),
        ([], "no step's weights"),
    ]:
        found = infer_optimizer(seen)
        assert found.verdict is Verdict.UNKNOWN and found.optimizer is None and why in found.reason, found.reason


def test_two_equal_seeds_agree() -> None:
    observations, _ = train("adamw:lr=0.001", batch=2, steps=3)
    assert infer_optimizer(observations, seed=1) == infer_optimizer(observations, seed=1)
