"""The quick walk back: its factors are those of the dense matrices, and its answer is near that of the full walk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attack.algorithms import Status
from attack.engine.by_outputs import ByOutputs
from attack.engine.chain import NoChain, trace
from attack.engine.layers import forward_matrix, gradient_rows, pull_back, push
from attack.engine.mean_field import QuickWalk
from attack.engine.stripes import Stripes
from attack.engine.target import prepare
from attack.engine.walk import FullWalk
from attack.observation import Knowledge
from attack.reconstruct import reconstruct
from harness.models import load_model
from tests.attack.toys import example, observe, told, unhurried

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
    rows = gradient_rows(link, torch.randn(link.outputs, dtype=torch.float64))[:20:5]
    dense = forward.T @ (weights[:, None] * forward) + torch.block_diag(*[rows.T @ rows] * shape[0])
    dense.diagonal().add_(0.5)
    right = torch.randn(3, link.inputs, dtype=torch.float64)
    parts = torch.randn(3, shape[0], len(rows), dtype=torch.float64)
    solved = kind(link, weights, rows, 0.5).solve(right, parts)
    assert torch.allclose(solved @ dense, right + (parts @ rows).flatten(1), atol=2e-3)  # float32, damped by 1e-5


@pytest.mark.parametrize("name", ["convolution", "sigmoid", "tanh"])
def test_quick_walk_is_near_the_full_one(name):
    model, inputs, labels = example(name)
    target = prepare(observe(model, inputs, labels), told(name, inputs), device=torch.device("cpu"))
    context = unhurried()
    links, seen = trace(target.model, target.input_shape), []
    walk = QuickWalk(links)
    quick = walk(target, context, lambda iteration, x: seen.append((iteration, x.clone())))
    full = FullWalk(links)(target, context)
    truth = inputs.double().flatten()
    for belief in (quick, full):
        assert float((belief.mean - truth).square().mean()) <= 10 * belief.variance + 1e-12
    assert quick.variance <= 100 * full.variance + 1e-12
    moved = target.replay(inputs + 1e-5 * torch.randn(inputs.shape, generator=context.generator), labels)
    together = walk.again([target, moved], context)
    assert torch.allclose(together[0], quick.mean, atol=10 * quick.variance**0.5, rtol=0)
    assert torch.allclose(together[1], walk.again([moved], context)[0], atol=0.1 * quick.variance**0.5, rtol=0)
    assert [at for at, _ in seen] == list(range(len(seen))) and seen[-1][1].equal(quick.mean)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", ["convolution", "sigmoid", "tanh"])
def test_gradient_near_by_is_walked_back_as_if_in_full(name, holes):
    model, inputs, labels = example(name)
    seen = observe(model, inputs, labels)
    if holes:
        seen.known[3] = 0
    target = prepare(seen, told(name, inputs), device=torch.device("cpu"))
    context = unhurried()
    walk, links = FullWalk(trace(target.model, target.input_shape)), trace(target.model, target.input_shape)
    first = walk(target, context)
    moved = inputs + 1e-5 * torch.randn(inputs.shape, generator=context.generator)
    near = target.replay(moved, labels)
    again, afresh = walk.again(near, context), FullWalk(links)(near, context)
    deviation = afresh.variance**0.5 + 1e-7
    assert torch.linalg.vector_norm(again - afresh.mean) <= deviation * len(again) ** 0.5
    assert not torch.allclose(first.mean, again, atol=1e-7)  # it did move


@pytest.mark.parametrize(("channels", "size"), [(4, 16), (4, 24)])  # by outputs, and in stripes
def test_too_few_equations_are_no_picture_either_way(channels, size, tmp_path):
    torch.manual_seed(0)
    source = tmp_path / "narrow.py"
    source.write_text(
        "from torch import nn\n\n\ndef build():\n"
        f"    convolution = nn.Conv2d(3, {channels}, 5, stride=2, padding=2)\n"
        f"    head = nn.Linear({channels * size * size // 4}, 10)\n"
        "    return nn.Sequential(convolution, nn.Sigmoid(), nn.Flatten(), head)\n"
    )
    knowledge = Knowledge(model=f"{source}:build", input_shape=(3, size, size))
    model, inputs = load_model(knowledge.model), torch.rand(1, 3, size, size)
    found = reconstruct(observe(model, inputs, torch.tensor([3])), knowledge, method="rgap")
    assert found.status is Status.NOT_CONVERGED and found.inputs is None
    assert found.reason is not None and "so do other inputs" in found.reason


def test_gradient_with_holes_is_left_to_the_full_walk():
    model, inputs, labels = example("sigmoid")
    seen = observe(model, inputs, labels)
    seen.known[3] = 0
    target = prepare(seen, told("sigmoid", inputs), device=torch.device("cpu"))
    context = unhurried()
    with pytest.raises(NoChain, match="not known"):
        QuickWalk(trace(target.model, target.input_shape))(target, context)
