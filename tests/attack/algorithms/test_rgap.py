"""The walk back on real architectures: exact where its equations are, and honest where they are not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attack.algorithms import Status
from attack.observation import Knowledge, Known
from attack.reconstruct import reconstruct
from harness.models import load_model
from tests.attack.toys import example, observe, told


@pytest.mark.parametrize("steps", [0, 3])
def test_lenet_of_the_paper_comes_back_beyond_what_eyes_see(steps: int) -> None:
    torch.manual_seed(1)
    model = load_model("lenet")
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(torch.rand(1, 3, 32, 32)), torch.randint(100, (1,)))
        with torch.no_grad():
            for parameter, slope in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
                parameter -= 0.1 * slope
    inputs, labels = torch.rand(1, 3, 32, 32), torch.tensor([42])
    found = reconstruct(observe(model, inputs, labels), Knowledge(model="lenet", input_shape=(3, 32, 32)))
    assert found.status is Status.CONVERGED and found.method == "rgap" and found.batch_size_assumed
    assert found.inputs is not None and found.labels is not None and found.labels.tolist() == [42]
    error = float((found.inputs - inputs).square().mean())
    assert error < 1e-5  # 50 dB; some 95 are usual, and after training some 85
    assert found.predicted_mse is not None and error < found.predicted_mse < 1e-3
    assert found.frames is not None and len(found.frames) == len(found.frame_iterations) <= 24
    assert found.frames[-1].equal(found.inputs)


@pytest.mark.parametrize("seed", range(4))
def test_small_convolutions_of_other_shapes(seed: int) -> None:
    model, inputs, labels = example("convolution", seed=seed)
    found = reconstruct(observe(model, inputs, labels), told("convolution", inputs), method="rgap")
    # 128 unknowns, 96 forward rows and 108 gradient rows: enough, if only just.
    assert found.status is Status.CONVERGED
    assert found.inputs is not None and torch.allclose(found.inputs, inputs, atol=1e-2, rtol=0)


def test_relu_network_is_exact() -> None:
    torch.manual_seed(0)
    model, inputs, labels = load_model("mlp:input=1x8x8,classes=7"), torch.rand(1, 1, 8, 8), torch.tensor([4])
    knowledge = Knowledge(model="mlp:input=1x8x8,classes=7", input_shape=(1, 8, 8))
    found = reconstruct(observe(model, inputs, labels), knowledge, method="rgap")
    assert found.inputs is not None and torch.allclose(found.inputs, inputs, atol=1e-5, rtol=0)


def test_error_within_a_bound_widens_what_it_predicts() -> None:
    model, inputs, labels = example("sigmoid")
    seen = observe(model, inputs, labels)
    exact = reconstruct(seen, told("sigmoid", inputs))
    bound = 1e-5
    noise = bound * (2 * torch.rand(seen.gradient.shape, generator=torch.Generator().manual_seed(0)) - 1)
    differenced = dataclasses.replace(
        seen,
        gradient=seen.gradient + noise,
        known=torch.full_like(seen.known, Known.DIFFERENCED),
        bound=torch.full_like(seen.gradient, bound),
    )
    found = reconstruct(differenced, told("sigmoid", inputs))
    assert found.status is Status.CONVERGED and found.inputs is not None
    assert found.predicted_mse is not None and exact.predicted_mse is not None
    assert float((found.inputs - inputs).square().mean()) < found.predicted_mse
    assert found.predicted_mse > exact.predicted_mse


def test_more_than_one_example_is_seen_and_said() -> None:
    model, inputs, labels = example("sigmoid", batch=3)
    found = reconstruct(
        observe(model, inputs, labels), told("sigmoid", inputs, batch_size=1, labels=(0,)), method="rgap"
    )
    assert found.status is Status.NOT_CONVERGED
    assert found.reason and "more than one example" in found.reason


def test_too_few_equations_are_no_picture() -> None:
    # One known row of the first layer's gradient in seven, and only forward rows of 8 units for 12 unknowns.
    model, inputs, labels = example("sigmoid")
    seen = observe(model, inputs, labels)
    known = seen.known.clone()
    known[: 12 * 8] = Known.UNKNOWN
    found = reconstruct(dataclasses.replace(seen, known=known), told("sigmoid", inputs), method="rgap")
    assert found.status is Status.NOT_CONVERGED
    assert found.reason and "so do other inputs" in found.reason
    assert found.inputs is None


def test_shortcut_goes_to_a_search_and_says_why() -> None:
    model, inputs, labels = example("shortcut")
    found = reconstruct(observe(model, inputs, labels), told("shortcut", inputs), deadline_s=60)
    assert found.status is Status.CONVERGED and found.method == "idlg"
    assert found.route is not None and "is not a layer" in found.route
    assert found.inputs is not None and torch.allclose(found.inputs, inputs, atol=1e-2, rtol=0)
    assert found.predicted_mse is not None
