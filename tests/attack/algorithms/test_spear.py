"""Batches come back exactly from the first layer's gradient, more examples than classes too; or with a reason not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from attack.algorithms import Status
from attack.observation import Known
from attack.reconstruct import reconstruct
from harness.data import load_data
from harness.models import load_model
from tests.attack.algorithms.test_unmix import told, worst_error
from tests.attack.toys import observe

TEN = "mlp:hidden=200x100,classes=10"


def pictures(size: int, *, seed: int) -> Tensor:
    """CIFAR-100 samples and their mirror images, shape (size, 3, 32, 32)."""
    data = torch.from_numpy(load_data("cifar100").pictures) / 255
    both = torch.cat([data, data.flip(-1)])
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))[:size]]


def net_and_labels(model: str, size: int, *, seed: int, classes: int = 10) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return load_model(model), torch.randint(classes, (size,))


@pytest.mark.parametrize("size", [2, 16, 24])
def test_more_examples_than_classes_are_exact_and_counted(size: int) -> None:
    net, labels = net_and_labels(TEN, size, seed=size)
    inputs = pictures(size, seed=size)
    found = reconstruct(observe(net, inputs, labels), told(TEN))
    assert found.status is Status.CONVERGED and found.method == "spear"
    assert found.route is not None and f"{size} examples by the rank of the" in found.route
    error = worst_error(found, inputs, labels)
    assert error < 1e-10  # 140 dB are usual
    assert found.predicted_mse is not None and error / 10 < found.predicted_mse < 1e-6


def test_where_no_unit_is_on_for_one_example_alone_directions_are_drawn() -> None:
    net, labels = net_and_labels(TEN, 12, seed=1)
    inputs = torch.randn(12, 3, 32, 32)
    with torch.no_grad():
        on = net.get_submodule("body.1")(inputs.flatten(1)) > 0
    assert on.sum(0).min() >= 2
    assert worst_error(reconstruct(observe(net, inputs, labels), told(TEN), method="spear"), inputs, labels) < 1e-10


def test_order_is_that_of_the_labels_where_they_were_told() -> None:
    net, _ = net_and_labels(TEN, 3, seed=2)
    inputs, labels = pictures(3, seed=2), torch.tensor([7, 0, 3])
    found = reconstruct(observe(net, inputs, labels), told(TEN, labels=(7, 0, 3)), method="spear")
    assert found.labels is not None and found.labels.equal(labels)
    assert found.inputs is not None and torch.allclose(found.inputs, inputs, atol=1e-5, rtol=0)


def test_units_that_were_not_seen_are_done_without() -> None:
    net, labels = net_and_labels(TEN, 8, seed=3)
    inputs = pictures(8, seed=3)
    seen = observe(net, inputs, labels)
    unknown = torch.zeros_like(seen.gradient, dtype=torch.bool)
    unknown[: 200 * 3072].view(200, 3072)[::5, 17] = True
    seen = dataclasses.replace(seen, known=torch.where(unknown, Known.UNKNOWN, Known.RAW).to(torch.uint8))
    assert worst_error(reconstruct(seen, told(TEN), method="spear"), inputs, labels) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_gradient_is_no_answer(dtype: torch.dtype) -> None:
    net, labels = net_and_labels(TEN, 6, seed=6)
    seen = observe(net, pictures(6, seed=6), labels)
    rounded = seen.gradient.to(dtype).float()
    seen = dataclasses.replace(seen, gradient=rounded, bound=(seen.gradient - rounded).abs().max().expand_as(rounded))
    found = reconstruct(seen, told(TEN, batch_size=6), method="spear")
    assert found.status is Status.NOT_CONVERGED and found.inputs is None and found.reason


def test_one_picture_twice_is_no_answer() -> None:
    net, labels = net_and_labels(TEN, 6, seed=4)
    inputs = pictures(6, seed=4)
    inputs[1] = inputs[0]
    found = reconstruct(observe(net, inputs, labels), told(TEN), method="spear")
    assert found.status is Status.NOT_CONVERGED and found.inputs is None


@pytest.mark.parametrize(
    ("model", "knowledge", "reason"),
    [
        (TEN, {"batch_size": 3}, "4 examples, and 3 were told"),
        (TEN, {"labels": (1, 1, 1, 1)}, "others were told"),
        ("lenet:classes=10", {}, "the first must be a fully connected one"),
        ("mlp:classes=10,activation=tanh", {}, "no ReLU"),
    ],
)
def test_what_it_cannot_do_has_a_reason(model: str, knowledge: dict[str, object], reason: str) -> None:
    net, labels = net_and_labels(model, 4, seed=5)
    found = reconstruct(observe(net, pictures(4, seed=5), labels), told(model, **knowledge), method="spear")
    assert found.status is Status.NOT_CONVERGED and found.inputs is None
    assert found.reason is not None and reason in found.reason
