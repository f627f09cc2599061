"""GradInversion: labels restored, and what its prior measures."""

from __future__ import annotations

import torch
from torch import nn

from attack.algorithms.gradinversion import gradinversion, restore_labels
from attack.engine.priors import BatchStatistics
from attack.engine.target import prepare
from tests.attack.toys import example, observe, told, unhurried


def test_labels_of_a_batch_are_restored():
    for seed in range(5):
        model, inputs, labels = example("sigmoid", seed=seed, batch=3)
        target = prepare(observe(model, inputs, labels), told("sigmoid", inputs), device=torch.device("cpu"))
        assert restore_labels(target).equal(labels.sort().values)


def test_searches_that_hold_together_are_polished_to_a_match():
    model, inputs, labels = example("sigmoid")
    target = prepare(observe(model, inputs, labels), told("sigmoid", inputs), device=torch.device("cpu"))
    context = unhurried()
    answer = gradinversion(target, context, iterations=200)
    assert answer.inputs is not None and target.residual(answer.inputs, labels) <= target.tolerance
    assert torch.allclose(answer.inputs.float(), inputs, atol=1e-2, rtol=0)


def test_statistics_are_zero_where_they_are_the_running_ones():
    norm = nn.BatchNorm2d(2, momentum=1.0)
    one, other = torch.rand(3, 2, 5, 5), 2 + torch.rand(3, 2, 5, 5)
    norm(one)
    variance = one.var((0, 2, 3), correction=0)
    norm.running_var.copy_(variance)  # torch keeps the unbiased one
    near, far = BatchStatistics(norm).distance(torch.stack([one, other]))
    assert near < 1e-4 < 1 < far
    assert BatchStatistics(nn.ReLU()).distance(one[None]).tolist() == [0.0]
