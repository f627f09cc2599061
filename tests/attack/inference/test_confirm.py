"""Weights of an inferred rule are passed on where a gradient confirms them, and not beyond a step that changes it."""

from __future__ import annotations

import dataclasses

import pytest

from attack.inference.confirm import Confirmation
from attack.observation import Observation
from attack.shadow import Shadow
from tests.attack.inference.paper import train


def shadowed(observations: list[Observation], optimizer: str) -> list[Observation]:
    first = observations[0]
    assert first.weights is not None
    shadow = Shadow(weights=first.weights, step=0, shapes=first.shapes, optimizer=optimizer)
    followed = []
    for seen in observations:
        followed.append(dataclasses.replace(seen, weights=shadow.weights(seen.step)))
        if seen.rank == 1:
            shadow.advance(seen.step, seen.average)
    return followed


@pytest.mark.parametrize("batch", [1, 3])
def test_a_learning_rate_that_changes_ends_the_weights(batch: int) -> None:
    observations, truth = train("sgd:lr=0.1+step:step_size=4,gamma=0.1", steps=8, batch=batch)
    right = shadowed(observations, "sgd:lr=0.1+step:step_size=4,gamma=0.1")
    confirmation = Confirmation(right)
    assert [seen.weights is not None for seen in confirmation] == [True] * len(right)
    assert confirmation.confirmed == 7 and not confirmation.refused
    confirmation = Confirmation(shadowed(observations, "sgd:lr=0.1"))
    passed = list(confirmation)
    assert [(seen.step, seen.rank) for seen in passed] == [(seen.step, seen.rank) for seen in observations]
    for seen in passed:  # the fifth update is the first one with the smaller rate
        assert (seen.weights is not None) == (seen.step <= 4)
        assert seen.weights is None or seen.weights.equal(truth[seen.step])
    assert confirmation.confirmed == 4 and confirmation.refused == [5, 6, 7]
