"""Inverting Gradients: what its prior and its polish are for."""

from __future__ import annotations

import torch

from attack.algorithms.inverting_gradients import inverting_gradients
from attack.engine.priors import total_variation
from attack.engine.target import prepare
from tests.attack.toys import example, observe, told, unhurried


def test_a_smooth_net_is_polished_to_a_match_that_proves_itself():
    model, inputs, labels = example("convolution")
    target = prepare(observe(model, inputs, labels), told("convolution", inputs), device=torch.device("cpu"))
    context = unhurried()
    answer = inverting_gradients(target, context, iterations=400)
    assert answer.inputs is not None and target.residual(answer.inputs, labels) <= target.tolerance
    assert torch.allclose(answer.inputs.float(), inputs, atol=1e-2, rtol=0)


def test_inputs_stay_within_their_range_where_there_is_no_match():
    model, inputs, labels = example("tanh")
    target = prepare(observe(model, inputs, labels), told("sigmoid", inputs), device=torch.device("cpu"))
    context = unhurried()
    answer = inverting_gradients(target, context, iterations=50)
    assert answer.inputs is not None and 0 <= answer.inputs.min() <= answer.inputs.max() <= 1


def test_total_variation_is_that_of_each_search_on_its_own():
    flat, steps = torch.full((1, 1, 4, 4), 0.3), torch.arange(4.0).expand(1, 1, 4, 4)
    assert total_variation(torch.stack([flat, steps])).tolist() == [0.0, 1.0]
    assert total_variation(torch.rand(2, 1, 12)).tolist() == [0.0, 0.0]  # no pictures
