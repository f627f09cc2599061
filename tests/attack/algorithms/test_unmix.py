"""Batches of fully connected nets come back exactly, with neither batch size nor labels told; or with a reason not."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack.algorithms import Reconstruction, Status
from attack.observation import Knowledge, Known
from attack.reconstruct import reconstruct
from harness.models import load_model
from tests.attack.toys import observe, spec

DEEP = "mlp:hidden=200x200"


def batch(model: str, size: int, *, seed: int = 0, classes: int = 100) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    return load_model(model), torch.rand(size, 3, 32, 32), torch.randint(classes, (size,))


def told(model: str, **more: Any) -> Knowledge:
    return Knowledge(model=model, input_shape=(3, 32, 32), **more)


def worst_error(found: Reconstruction, inputs: Tensor, labels: Tensor) -> float:
    """Largest mean squared error of an example, each beside its nearest; labels must be right."""
    assert found.inputs is not None and found.labels is not None
    apart = (inputs.flatten(1)[:, None] - found.inputs.flatten(1)).square().mean(-1)
    nearest = apart.min(1)
    assert sorted(nearest.indices.tolist()) == list(range(len(inputs)))
    assert found.labels[nearest.indices].equal(labels)
    return float(nearest.values.max())


@pytest.mark.parametrize("model", ["mlp", DEEP])
@pytest.mark.parametrize("size", [4, 8])
def test_batch_is_exact_and_its_size_is_read(model: str, size: int) -> None:
    net, inputs, labels = batch(model, size)
    found = reconstruct(observe(net, inputs, labels), told(model), method="unmix")
    assert found.status is Status.CONVERGED
    assert not found.batch_size_assumed
    error = worst_error(found, inputs, labels)
    assert error < 1e-10  # 100 dB; 140 are usual
    assert found.predicted_mse is not None and error / 10 < found.predicted_mse < 1e-6
    assert found.cpu_seconds < 10  # half a second is usual


def test_a_model_may_view_its_input_as_a_row_by_itself() -> None:
    torch.manual_seed(3)
    net, inputs, labels = load_model(spec("turned")), torch.rand(2, 1, 16, 16), torch.tensor([3, 8])
    knowledge = Knowledge(model=spec("turned"), input_shape=(1, 16, 16))
    found = reconstruct(observe(net, inputs, labels), knowledge)
    assert found.status is Status.CONVERGED, found.reason
    assert worst_error(found, inputs, labels) < 1e-10


def test_one_label_for_all_is_no_obstacle() -> None:
    net, inputs, _ = batch("mlp", 6)
    labels = torch.full((6,), 42)
    assert worst_error(reconstruct(observe(net, inputs, labels), told("mlp"), method="unmix"), inputs, labels) < 1e-8


def test_order_is_that_of_the_labels_where_they_were_told() -> None:
    net, inputs, _ = batch("mlp", 3)
    labels = torch.tensor([60, 5, 33])
    found = reconstruct(observe(net, inputs, labels), told("mlp", labels=(60, 5, 33)), method="unmix")
    assert found.labels is not None and found.labels.equal(labels)
    assert found.inputs is not None and torch.allclose(found.inputs, inputs, atol=1e-5, rtol=0)


def test_rows_that_were_not_seen_are_done_without() -> None:
    net, inputs, labels = batch("mlp", 4)
    seen = observe(net, inputs, labels)
    unknown = torch.arange(seen.gradient.numel()) % 7 == 0
    unknown[-100 * 101 :] = False  # the last layer must be known in full
    seen = dataclasses.replace(seen, known=torch.where(unknown, Known.UNKNOWN, Known.RAW).to(torch.uint8))
    assert worst_error(reconstruct(seen, told("mlp"), method="unmix"), inputs, labels) < 1e-10


@pytest.mark.parametrize(
    ("model", "knowledge", "reason"),
    [
        ("mlp", {"batch_size": 3}, "rank of 4 examples, and 3 were told"),
        ("mlp", {"labels": (1, 2, 3, 4)}, "others were told"),
        ("lenet", {}, "Conv2d.*fully connected layers alone"),
    ],
)
def test_what_it_cannot_do_has_a_reason(model: str, knowledge: dict[str, object], reason: str) -> None:
    net, inputs, labels = batch(model, 4, seed=1)
    found = reconstruct(observe(net, inputs, labels), told(model, **knowledge), method="unmix")
    assert found.status is Status.NOT_CONVERGED and found.inputs is None
    assert found.reason is not None and re.search(reason, found.reason)


def test_example_that_switches_a_whole_layer_off_is_no_picture() -> None:
    net, inputs, labels = batch("mlp", 4)
    inputs[2] = 0
    with torch.no_grad():
        net.get_parameter("body.1.bias").abs_().neg_()
    found = reconstruct(observe(net, inputs, labels), told("mlp"), method="unmix")
    assert found.status is Status.NOT_CONVERGED and found.inputs is None
    assert found.reason is not None and "an example's error does not reach it" in found.reason


@pytest.mark.parametrize("factory", ["tanh_net", "leaky_net"])
def test_other_activations(factory: str) -> None:
    model = f"{__name__}:{factory}"
    net, inputs, labels = batch(model, 5)
    assert worst_error(reconstruct(observe(net, inputs, labels), told(model)), inputs, labels) < 1e-9


def tanh_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.Tanh(), nn.Linear(64, 100))


def leaky_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.LeakyReLU(0.1), nn.Linear(64, 100))
