"""What every attack on pictures keeps to. A new method gets these tests by being in METHODS."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attack.algorithms import METHODS, TEXT_ONLY, Reconstruction, Status
from attack.errors import AttackError
from attack.observation import Known
from attack.reconstruct import reconstruct
from tests.attack.toys import example, observe, told

pytestmark = pytest.mark.parametrize("method", [name for name in METHODS if name not in TEXT_ONLY])

DEADLINE_S = 60.0


def holds_no_picture(found: Reconstruction) -> bool:
    return found.inputs is found.labels is found.soft_labels is found.frames is None


def test_linear_layer_and_one_sample_is_exact(method: str) -> None:
    model, inputs, labels = example("linear")
    found = reconstruct(observe(model, inputs, labels), told("linear", inputs), method=method, deadline_s=DEADLINE_S)
    assert found.status is Status.CONVERGED
    assert found.labels is not None and found.labels.equal(labels)
    # A closed form comes to float32; a search stops at a third of its tolerance, 1e-5 of the gradient.
    assert found.inputs is not None and torch.allclose(found.inputs, inputs, atol=2e-4, rtol=0)
    assert (
        found.predicted_mse is not None and found.predicted_mse >= float((found.inputs - inputs).square().mean()) / 10
    )


def test_wrong_model_is_no_picture(method: str) -> None:
    model, inputs, labels = example("tanh")
    found = reconstruct(observe(model, inputs, labels), told("sigmoid", inputs), method=method, deadline_s=3.0)
    assert found.status is Status.NOT_CONVERGED
    assert found.reason and "\n" not in found.reason
    assert holds_no_picture(found)


def test_model_of_other_shapes_is_refused_in_one_line(method: str) -> None:
    model, inputs, labels = example("tanh")
    with pytest.raises(AttackError, match="does not fit the traffic: it has 2 parameter tensors of 65"):
        reconstruct(observe(model, inputs, labels), told("linear", inputs), method=method)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_gradient_that_says_nothing_gives_a_status(method: str, value: float) -> None:
    model, inputs, labels = example("linear")
    seen = observe(model, inputs, labels)
    seen = dataclasses.replace(seen, gradient=torch.full_like(seen.gradient, value))
    found = reconstruct(seen, told("linear", inputs), method=method, deadline_s=DEADLINE_S)
    assert found.status is Status.NOT_CONVERGED
    assert found.reason
    assert holds_no_picture(found)


def test_unknown_weights_are_not_observed(method: str) -> None:
    model, inputs, labels = example("linear")
    found = reconstruct(observe(model, inputs, labels, weights=None), told("linear", inputs), method=method)
    assert found.status is Status.NOT_OBSERVED
    assert found.reason == "the weights at this step were not seen"
    assert holds_no_picture(found)


def test_unknown_gradient_is_not_observed(method: str) -> None:
    model, inputs, labels = example("linear")
    seen = observe(model, inputs, labels)
    seen = dataclasses.replace(seen, known=torch.zeros_like(seen.known))
    assert reconstruct(seen, told("linear", inputs), method=method).status is Status.NOT_OBSERVED


def test_same_seed_same_answer(method: str) -> None:
    model, inputs, labels = example("sigmoid")
    seen = observe(model, inputs, labels)
    one, two = (reconstruct(seen, told("sigmoid", inputs), method=method, seed=3) for _ in range(2))
    assert one.status is two.status is Status.CONVERGED
    assert one.inputs is not None and two.inputs is not None and one.inputs.equal(two.inputs)
    assert one.predicted_mse == two.predicted_mse


def test_values_of_unknown_elements_change_nothing(method: str) -> None:
    model, inputs, labels = example("sigmoid")
    seen = observe(model, inputs, labels)
    unknown = torch.arange(seen.gradient.numel()) % 7 == 0
    unknown[-5:] = False  # the last bias: without it there is no label to read
    seen = dataclasses.replace(seen, known=torch.where(unknown, Known.UNKNOWN, Known.RAW).to(torch.uint8))
    other = dataclasses.replace(seen, gradient=torch.where(unknown, 1e3, seen.gradient))
    one, two = (reconstruct(seen, told("sigmoid", inputs), method=method) for seen in (seen, other))
    assert one.status is two.status is Status.CONVERGED
    assert one.inputs is not None and two.inputs is not None and one.inputs.equal(two.inputs)
    assert torch.allclose(one.inputs, inputs, atol=1e-2, rtol=0)


def test_global_generator_is_left_alone(method: str) -> None:
    model, inputs, labels = example("linear")
    before = torch.get_rng_state()
    reconstruct(observe(model, inputs, labels), told("linear", inputs), method=method, deadline_s=DEADLINE_S)
    assert torch.get_rng_state().equal(before)


def test_deadline_ends_it(method: str) -> None:
    model, inputs, labels = example("tanh")
    found = reconstruct(observe(model, inputs, labels), told("sigmoid", inputs), method=method, deadline_s=0.2)
    assert found.status is Status.NOT_CONVERGED
    assert found.seconds < 10  # one outer step of a search may run over


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cpu_and_gpu_agree(method: str) -> None:
    model, inputs, labels = example("sigmoid")
    seen = observe(model, inputs, labels)
    one, two = (reconstruct(seen, told("sigmoid", inputs), method=method, device=name) for name in ("cpu", "cuda"))
    assert one.inputs is not None and two.inputs is not None
    # Both stop within the tolerance of the match; the inputs then differ by no more than two such answers do.
    assert torch.allclose(one.inputs, two.inputs, atol=1e-3, rtol=0)
