"""What draws of one gradient say of it together."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from attack.averaged import average
from attack.defense import PublicDefense
from attack.feedback import settle
from attack.left_out import disbelieve
from attack.observation import EVERYONE, Known
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
    seen, _ = toys.defended("int8", 4)
    again = tuple(dataclasses.replace(other, defense=spec or None) for other in seen.again)
    seen = dataclasses.replace(seen, defense=spec or None, again=again)
    assert average(seen) is seen


def test_another_gradient_is_left_out():
    seen, _ = toys.defended("noise-gaussian:1e-2", 4)
    assert seen.weights is not None
    moved = dataclasses.replace(seen.again[1], weights=1.01 * seen.weights)
    found = average(dataclasses.replace(seen, again=(seen.again[0], moved, seen.again[2])))
    assert [other.step for other in found.again] == [2]
    assert average(dataclasses.replace(seen, again=(moved,))).again == (moved,)


def test_weights_that_moved_a_little_bound_what_many_draws_say():
    seen, gradient = toys.defended("noise-gaussian:1e-6", 16)
    assert seen.weights is not None
    away = 5e-5
    again = tuple(
        dataclasses.replace(other, weights=(1 + away) * seen.weights, gradient=(1 + 10 * away) * other.gradient)
        for other in seen.again
    )
    still, moved = average(seen), average(dataclasses.replace(seen, again=again))
    assert still.bound is not None and moved.bound is not None and len(moved.joined) == 15
    assert float(still.bound.max()) < 1e-6
    sizes = [math.prod(shape) for shape in seen.shapes]
    for found, part in zip(moved.bound.split(sizes), gradient.split(sizes), strict=True):
        assert 0.9 < float(found.mean() / (30 * away * part.square().mean().sqrt())) < 1.1
    off = (moved.gradient - gradient).abs()
    assert float((off > moved.bound).double().mean()) < 0.05 < float((off > still.bound).double().mean())


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


@pytest.mark.parametrize(
    "code",
    ["qsgd:7,bucket=64", "noise-gaussian:1e-3", "noise-laplace:1e-3", "noise-gaussian:1e-3+noise-laplace:1e-3+int8"],
)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_columns_that_were_left_out_stay_unknown_under_codes_and_noise(code, steps, seed):
    seen, gradient = toys.defended(f"soteria:0.125+{code}", steps, left_out=(2, 7), seed=seed)
    found = average(disbelieve(seen))
    assert len(found.joined) == steps - 1
    last = found.limited[-85:-5].view(5, 16)
    assert not last[:, [2, 7]].any() and last.any(0).sum() > 10 and found.limited[:-85].all()
    noise = PublicDefense.read(found.defense or "").noise
    bound = torch.zeros_like(gradient) if found.bound is None else found.bound
    off = (found.gradient - gradient) / torch.hypot(bound / math.sqrt(3), torch.tensor(noise))
    assert 0.3 < float(off[found.limited].square().mean().sqrt()) < 1.6


def test_differencing_hides_no_column_that_was_left_out():
    seen, _ = toys.defended("", left_out=(2, 7))
    off = 1e-8 * (2 * torch.rand(len(seen.gradient), generator=torch.Generator().manual_seed(0)) - 1)
    known = torch.full_like(seen.known, int(Known.DIFFERENCED))
    seen = dataclasses.replace(seen, gradient=seen.gradient + off, known=known, bound=torch.full_like(off, 1e-8))
    last = disbelieve(dataclasses.replace(seen, defense="soteria:0.125")).limited[-85:-5].view(5, 16)
    assert last.all(0).nonzero().flatten().tolist() == [column for column in range(16) if column not in (2, 7)]


def test_where_no_column_can_be_told_none_is_believed():
    seen, _ = toys.defended("", left_out=(2, 7))
    mean = dataclasses.replace(seen, defense="soteria:0.125+secure-aggregation", rank=EVERYONE, ranks=(0, 1))
    found = disbelieve(mean).limited
    assert not found[-85:-5].any() and found[:-85].all() and found[-5:].all()
    signs, _ = toys.defended("soteria:0.125+sign", 8, left_out=(2, 7))
    assert not settle(disbelieve(signs)).limited[-85:-5].any()
