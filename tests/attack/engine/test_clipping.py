"""What clipping left of a gradient is told from the last layer alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attack.engine.clipping import clipping_factor
from attack.engine.target import Target, prepare
from attack.observation import Knowledge, Known, Observation
from attack.reconstruct import reconstruct
from attack.victims import Status
from tests.attack import toys

KNOWLEDGE = Knowledge(model=toys.spec("convolution"), input_shape=(2, 8, 8), batch_size=1)


def target_of(seen: Observation, **more: object) -> Target:
    return prepare(seen, dataclasses.replace(KNOWLEDGE, **more), device=torch.device("cpu"))


@pytest.mark.parametrize("norm", ["0.3", "0.01"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("spec", ["clip:{}", "clip-examples:{}", "clip:{}+fp16"])
def test_the_gradient_is_as_long_again(spec, norm, seed):
    seen, gradient = toys.defended(spec.format(norm), seed=seed)
    assert torch.linalg.vector_norm(gradient) > 0.5
    off = (target_of(seen).gradient - gradient).norm() / gradient.norm()
    assert off < (1e-3 if "fp16" in spec else 1e-6)


@pytest.mark.parametrize(
    "spec", ["clip:0.3+int8", "clip:0.3+noise-gaussian:1e-3", "clip:0.3+prune:0.5", "dp-sgd:noise=1e-3,clip=0.3"]
)
def test_what_came_after_the_clipping_is_reckoned_with(spec):
    seen, gradient = toys.defended(spec)
    target = target_of(seen)
    off = (target.gradient - gradient).abs() / target.noise
    assert off.square().mean().sqrt() < 1.6
    assert float(target.gradient.norm()) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_what_was_not_clipped_stays_to_the_bit():
    seen, gradient = toys.defended("clip:100")
    assert target_of(seen).gradient.equal(gradient)


def test_what_several_examples_left_is_not_taken_for_one():
    seen, gradient = toys.defended("clip:0.3", batch=3)
    sent = seen.gradient.double()
    assert target_of(seen).gradient.equal(sent)  # as one example, which it is not
    assert target_of(seen, batch_size=3).gradient.equal(sent)
    assert 2 * sent.norm() < gradient.norm()


def test_a_last_layer_of_which_nothing_was_sent_says_nothing():
    seen, _ = toys.defended("clip:0.3")
    seen.known[-85:] = Known.UNKNOWN
    seen.gradient[-85:] = 0
    assert target_of(seen).gradient.equal(seen.gradient.double())


def test_a_last_layer_without_the_label_is_another_one():
    model, seen = toys.sigmoid(), torch.ones(149, dtype=torch.float64)
    assert clipping_factor(model, seen, 1e-6 * seen, norm=1.0, label=5) == 1


def test_a_clipped_picture_comes_back():
    seen, _ = toys.defended("clip:0.1")
    _, inputs, labels = toys.example("convolution")
    found = reconstruct(seen, KNOWLEDGE)
    assert found.status is Status.CONVERGED and found.inputs is not None and found.labels is not None
    assert (found.inputs - inputs).square().mean() < 1e-8 and found.labels.equal(labels)
    assert reconstruct(seen.taken_literally(), KNOWLEDGE, deadline_s=1).status is Status.NOT_CONVERGED
