"""How often each label is in a batch, from the last layer's gradient alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attack.engine.labels import NoLabel, estimate_counts, likely_counts, read_labels
from attack.engine.target import Target, prepare
from nodes.benchmarks.subjects import Subject, stage
from tests.attack.toys import example, observe, told


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "mnist"])
@pytest.mark.parametrize("model", ["lenet", "mlp", "mlp:hidden=50,activation=tanh"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_labels_of_an_untrained_net(model: str, data: str, batch_size: int) -> None:
    subject = Subject(model=model, data=data, batch_size=batch_size, trained=0, observed="raw", seed=1)
    observation, knowledge, truth = stage(subject)
    target = prepare(observation, knowledge, device=torch.device("cpu"))
    estimate, _ = estimate_counts(target, batch_size)
    assert (estimate - torch.bincount(truth.labels, minlength=target.classes)).abs().max() < 0.5
    labels = read_labels(sized(target, batch_size))
    assert labels.equal(truth.labels.sort().values)


def test_likely_counts_are_distinct_whole_and_complete() -> None:
    estimate = torch.tensor([2.6, 0.1, -0.2, 1.5, 0.0])
    found = likely_counts(estimate, 4, most=6)
    assert found[0].tolist() == [3, 0, 0, 1, 0]
    assert len({tuple(counts.tolist()) for counts in found}) == 6
    assert all(int(counts.sum()) == 4 and int(counts.min()) >= 0 for counts in found)
    distances = [float((counts - estimate).square().sum()) for counts in found]
    assert distances == sorted(distances)


def test_more_than_the_batch_is_rounded_down() -> None:
    assert likely_counts(torch.tensor([2.2, 2.9, 0.0]), 4, most=1)[0].tolist() == [2, 2, 0]


def test_gradient_that_pulls_no_class_away_has_no_counts() -> None:
    model, inputs, labels = example("linear", batch=2)
    seen = observe(model, inputs, labels)
    target = prepare(seen, told("linear", inputs), device=torch.device("cpu"))
    target.gradient.abs_().neg_()
    with pytest.raises(NoLabel, match="no class pulls away"):
        estimate_counts(target, 2)


def sized(target: Target, batch_size: int) -> Target:
    return dataclasses.replace(target, batch_size=batch_size)
