"""Batches of convolutional nets: exact where the equations suffice, and said to be filled where a prior had to."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack.algorithms import Reconstruction, Status
from attack.observation import Knowledge, Known, Observation
from attack.reconstruct import reconstruct
from harness.models import load_model
from tests.attack.toys import observe

SHAPE, CLASSES = (3, 8, 8), 30


def net(channels: int, function: type[nn.Module] = nn.Sigmoid) -> nn.Module:
    """The LeNet of Deep Leakage from Gradients, smaller."""
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, stride=2),
        function(),
        nn.Conv2d(channels, channels, 3, padding=1),
        function(),
        nn.Flatten(),
        nn.Linear(channels * 16, CLASSES),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def wide() -> nn.Module:
    return net(24)


def wide_tanh() -> nn.Module:
    return net(24, nn.Tanh)


def narrow() -> nn.Module:
    return net(5)


def spec(factory: str) -> str:
    return f"{__name__}:{factory}"


def batch(model: str, size: int, *, seed: int = 0, twice: bool = False) -> tuple[Observation, Tensor, Tensor]:
    """What a tap sees of one batch of smooth pictures, and whether a label occurs twice."""
    torch.manual_seed(seed)
    gray, color = torch.rand(size, 1, 4, 4), torch.rand(size, 3, 4, 4)
    inputs = nn.functional.interpolate(0.8 * gray + 0.2 * color, size=SHAPE[1:], mode="bilinear")
    labels = torch.randperm(CLASSES)[:size]
    if twice:
        labels[-1] = labels[0]
    return observe(load_model(model), inputs, labels), inputs, labels


def told(model: str, **more: Any) -> Knowledge:
    return Knowledge(model=model, input_shape=SHAPE, **more)


def errors(found: Reconstruction, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of every example, beside its nearest; labels must be right."""
    assert found.inputs is not None and found.labels is not None
    nearest = (inputs.flatten(1)[:, None] - found.inputs.flatten(1)).square().mean(-1).min(1)
    assert sorted(nearest.indices.tolist()) == list(range(len(inputs)))
    assert found.labels[nearest.indices].equal(labels)
    return nearest.values


@pytest.mark.parametrize("factory", ["wide", "wide_tanh"])
def test_batch_is_exact_where_equations_suffice(factory: str) -> None:
    seen, inputs, labels = batch(spec(factory), 4, twice=True)
    found = reconstruct(seen, told(spec(factory)))
    assert found.status is Status.CONVERGED and found.method == "gauss-newton"
    assert found.route is not None and "at most 768 independent equations for 768 unknowns" in found.route
    assert errors(found, inputs, labels).max() < 1e-8
    assert found.predicted_mse is not None and errors(found, inputs, labels).mean() < found.predicted_mse < 1e-6


def test_what_a_prior_filled_says_so() -> None:
    seen, inputs, labels = batch(spec("narrow"), 4)
    found = reconstruct(seen, told(spec("narrow")))
    assert found.status is Status.FILLED
    assert found.reason is not None
    # 4 x 80 features, 5 x 3 x 9 gradients of the first layer's weights; its bias's are known through its output.
    assert re.search("at most 455 independent equations for 768 unknowns; .* filled by a prior", found.reason)
    error = errors(found, inputs, labels)
    assert error.max() < 0.1 * inputs.var()
    assert found.predicted_mse is not None and error.mean() < found.predicted_mse < 1


def test_order_is_that_of_the_labels_where_they_were_told() -> None:
    seen, inputs, labels = batch(spec("wide"), 3)
    found = reconstruct(seen, told(spec("wide"), labels=tuple(labels.tolist())), method="gauss-newton")
    assert found.labels is not None and found.labels.equal(labels)
    assert found.inputs is not None and torch.allclose(found.inputs[1], inputs[1], atol=1e-4, rtol=0)


def test_elements_that_were_not_seen_are_done_without() -> None:
    seen, inputs, labels = batch(spec("wide"), 3)
    unknown = torch.arange(seen.gradient.numel()) % 5 == 0
    unknown[-CLASSES * (24 * 16 + 1) :] = False  # the last layer must be known in full
    seen = dataclasses.replace(seen, known=torch.where(unknown, Known.UNKNOWN, Known.RAW).to(torch.uint8))
    assert errors(reconstruct(seen, told(spec("wide"))), inputs, labels).max() < 1e-7


def test_wrong_weights_are_no_picture() -> None:
    seen, _, _ = batch(spec("narrow"), 4)
    assert seen.weights is not None
    seen = dataclasses.replace(seen, weights=seen.weights.roll(1))
    found = reconstruct(seen, told(spec("narrow")), method="gauss-newton")
    assert found.status is Status.NOT_CONVERGED and found.inputs is None and found.reason


def test_same_seed_same_answer() -> None:
    seen, _, _ = batch(spec("narrow"), 2)
    one, two = (reconstruct(seen, told(spec("narrow")), seed=3) for _ in range(2))
    assert one.inputs is not None and two.inputs is not None and one.inputs.equal(two.inputs)
    assert one.predicted_mse == two.predicted_mse
