"""The quick walk back: its factors are those of the dense matrices, and its answer is near that of the full walk."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from attack.engine.by_outputs import ByOutputs
from attack.engine.chain import NoChain, trace
from attack.engine.context import Context
from attack.engine.layers import forward_matrix, pull_back, push
from attack.engine.mean_field import QuickWalk
from attack.engine.stripes import Stripes
from attack.engine.target import prepare
from attack.engine.walk import FullWalk
from tests.attack.toys import example, observe, told

CONVOLUTIONS = {
    "lenet's": (nn.Conv2d(3, 6, 5, stride=2, padding=2), (3, 16, 12)),
    "no padding, an odd height": (nn.Conv2d(2, 5, 3, stride=2), (2, 9, 7)),
    "one axis unlike the other": (nn.Conv2d(2, 5, (3, 5), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (2, 11, 7)),
    "a single pixel": (nn.Conv2d(2, 5, 1), (2, 4, 7)),
    "rows left out": (nn.Conv2d(2, 5, 2, stride=3, padding=1), (2, 10, 10)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", [Stripes, ByOutputs])
@torch.no_grad()
def test_factor_is_that_of_the_dense_matrix(name, kind):
    torch.manual_seed(0)
    module, shape = CONVOLUTIONS[name]
    (link,) = trace(nn.Sequential(module).double(), shape)
    forward = forward_matrix(link, torch.float64).detach()
    ones = torch.eye(len(forward), dtype=torch.float64)
    assert torch.allclose(forward, pull_back(link, ones)) and torch.allclose(push(link, forward), forward @ forward.T)
    weights = torch.rand(len(forward), dtype=torch.float64) + 0.1
    rows = torch.randn(4, shape[1] * shape[2], dtype=torch.float64)
    dense = forward.T @ (weights[:, None] * forward) + torch.block_diag(*[rows.T @ rows] * shape[0])
    dense.diagonal().add_(0.5)
    right = torch.randn(3, link.inputs, dtype=torch.float64)
    solved = kind(link, weights, rows, 0.5).solve(right)
    assert torch.allclose(solved @ dense, right, atol=5e-3)  # float32, and damped by 1e-4 of the diagonal


@pytest.mark.parametrize("name", ["convolution", "sigmoid", "tanh"])
def test_quick_walk_is_near_the_full_one(name):
    model, inputs, labels = example(name)
    target = prepare(observe(model, inputs, labels), told(name, inputs), device=torch.device("cpu"))
    context = Context(generator=torch.Generator().manual_seed(0), deadline=time.monotonic() + 60)
    links, seen = trace(target.model, target.input_shape), []
    walk = QuickWalk(links)
    quick = walk(target, context, lambda iteration, x: seen.append((iteration, x.clone())))
    full = FullWalk(links)(target, context)
    truth = inputs.double().flatten()
    for belief in (quick, full):
        assert float((belief.mean - truth).square().mean()) <= 10 * belief.variance + 1e-12
    assert quick.variance <= 100 * full.variance + 1e-12
    assert torch.allclose(walk(target, context).mean, quick.mean, atol=10 * quick.variance**0.5, rtol=0)
    assert [at for at, _ in seen] == list(range(len(seen))) and seen[-1][1].equal(quick.mean)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", ["convolution", "sigmoid", "tanh"])
def test_gradient_near_by_is_walked_back_as_if_in_full(name, holes):
    model, inputs, labels = example(name)
    seen = observe(model, inputs, labels)
    if holes:
        seen.known[3] = 0
    target = prepare(seen, told(name, inputs), device=torch.device("cpu"))
    context = Context(generator=torch.Generator().manual_seed(0), deadline=time.monotonic() + 60)
    walk, links = FullWalk(trace(target.model, target.input_shape)), trace(target.model, target.input_shape)
    first = walk(target, context)
    moved = inputs + 1e-5 * torch.randn(inputs.shape, generator=context.generator)
    near = target.replay(moved, labels)
    again, afresh = walk.again(near, context), FullWalk(links)(near, context)
    deviation = afresh.variance**0.5 + 1e-7
    assert torch.linalg.vector_norm(again - afresh.mean) <= deviation * len(again) ** 0.5
    assert not torch.allclose(first.mean, again, atol=1e-7)  # it did move


def test_gradient_with_holes_is_left_to_the_full_walk():
    model, inputs, labels = example("sigmoid")
    seen = observe(model, inputs, labels)
    seen.known[3] = 0
    target = prepare(seen, told("sigmoid", inputs), device=torch.device("cpu"))
    context = Context(generator=torch.Generator().manual_seed(0), deadline=time.monotonic() + 60)
    with pytest.raises(NoChain, match="not known"):
        QuickWalk(trace(target.model, target.input_shape))(target, context)
