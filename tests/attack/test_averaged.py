"""What draws of one gradient say of it together."""

from __future__ import annotations

import dataclasses
import math

import pytest

from attack.averaged import average
from attack.defense import PublicDefense
from attack.left_out import disbelieve
from attack.observation import Known
from tests.attack import toys


@pytest.mark.parametrize(
    "spec", ["noise-gaussian:1e-2", "noise-laplace:1e-2", "ternary", "qsgd:7,bucket=64", "int8:rounding=stochastic"]
)
@pytest.mark.parametrize("steps", [2, 8, 64])
def test_errors_are_as_large_as_they_are_said_to_be(spec, steps):
    seen, gradient = toys.defended(spec, steps)
    found = average(seen)
    assert found.bound is not None and found.again == () and found.defense is None
    off = (found.gradient - gradient) / (found.bound / math.sqrt(3))
    assert 0.5 < float(off.square().mean().sqrt()) < 1.6


def test_the_median_is_nearer_where_the_law_is_laplaces():
    seen, gradient = toys.defended("noise-laplace:1e-2", 32)
    median, mean = average(seen), average(dataclasses.replace(seen, defense="noise-gaussian:1e-2", again=tuple(
        dataclasses.replace(other, defense="noise-gaussian:1e-2") for other in seen.again)))  # fmt: skip
    off, other = (float((found.gradient - gradient).square().mean()) for found in (median, mean))
    assert off < 0.85 * other


@pytest.mark.parametrize("spec", ["int8", "fp16", "prune:0.5", "sign", "topk:0.5", ""])
def test_what_is_not_drawn_is_no_better_for_coming_again(spec):
    seen = dataclasses.replace(toys.defended("int8", 4)[0], defense=spec or None)
    assert average(seen) is seen


def test_another_gradient_is_left_out():
    seen, _ = toys.defended("noise-gaussian:1e-2", 4)
    assert seen.weights is not None
    moved = dataclasses.replace(seen.again[1], weights=1.01 * seen.weights)
    found = average(dataclasses.replace(seen, again=(seen.again[0], moved, seen.again[2])))
    assert [other.step for other in found.again] == [2]
    assert average(dataclasses.replace(seen, again=(moved,))).again == (moved,)


def test_noise_on_a_sum_is_spread_over_its_examples():
    assert PublicDefense.read("dp-sgd:noise=2,clip=0.5").noise_of(4) == 0.25
    assert PublicDefense.read("dp-sgd:clip=0.5,noise=2+noise-gaussian:0.25").noise_of(4) == math.hypot(0.25, 0.25)


def test_columns_that_were_left_out_are_not_known_and_the_rest_is():
    model, inputs, labels = toys.example("convolution")
    plain = toys.observe(model, inputs, labels)
    weight = plain.gradient[-85:-5].view(5, 16)
    weight[:, [2, 7]] = 0
    found = disbelieve(dataclasses.replace(plain, defense="soteria:0.125"))
    unknown = (found.known == Known.UNKNOWN)[-85:-5].view(5, 16)
    assert unknown.sum() == (found.known == Known.UNKNOWN).sum() == 10 and bool(unknown[:, [2, 7]].all())
    assert disbelieve(plain) is plain
