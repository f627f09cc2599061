"""Blocks of convolution and max pooling, beside torch's own derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attack.engine.chain import NoChain
from attack.engine.pooling import Block, read
from attack.engine.target import Target, prepare
from attack.observation import Knowledge
from tests.attack.toys import convolution, observe, pooled, spec


@pytest.fixture
def block() -> Block:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    return Block(conv=conv, window=(2, 3), input_shape=(2, 8, 12), output_shape=(3, 4, 6))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_transposes_are_transposes(block: Block) -> None:
    u, z, patches = draw(2, 8, 12), draw(3, 4, 6), draw(2 * 9, 24)
    assert torch.allclose((block.apply(u) * z).sum(), (u * block.back(z)).sum())
    assert torch.allclose((block.patches(u) * patches).sum(), (u * block.unpatch(patches)).sum())


def test_cells_hold_each_window_and_go_back(block: Block) -> None:
    z = draw(3, 4, 6)
    cells = block.cells(z)
    assert block.uncells(cells).equal(z)
    assert cells.amax(-1).equal(nn.functional.max_pool2d(z[None], (2, 3))[0])


def test_gradient_of_the_weight_is_error_times_patches(block: Block) -> None:
    u, error = draw(2, 8, 12), draw(3, 4, 6)
    (expected,) = torch.autograd.grad((block.conv(u[None])[0] * error).sum(), block.conv.weight)
    assert torch.allclose(error.flatten(1) @ block.patches(u).T, expected.flatten(1))


def test_form_in_what_positions_see_is_gathered(block: Block) -> None:
    u, root = draw(2, 8, 12), draw(24, 24)
    form = root @ root.T
    expected = block.unpatch(block.patches(u) @ form)
    assert torch.allclose((u.flatten(1) @ block.gather(form)).view_as(u), expected)


def target_of(model: nn.Module, name: str) -> Target:
    inputs = torch.rand(1, 2, 8, 8)
    knowledge = Knowledge(model=spec(name), input_shape=(2, 8, 8), batch_size=1)
    return prepare(observe(model, inputs, torch.tensor([2])), knowledge, device=torch.device("cpu"))


def test_last_layer_gives_features_and_error() -> None:
    torch.manual_seed(0)
    model = pooled()
    torch.manual_seed(1)
    target = target_of(model, "pooled")
    torch.manual_seed(1)
    inputs = torch.rand(1, 2, 8, 8).double()
    assert isinstance(target.model, nn.Sequential)
    features = target.model[:-1](inputs).detach().requires_grad_()
    loss = nn.functional.cross_entropy(target.model[-1](features), torch.tensor([2]))
    (error,) = torch.autograd.grad(loss, features)
    net = read(target)
    assert net.active.flatten().equal(features[0] > 0)
    assert torch.allclose(net.features.flatten(), features[0], atol=1e-6)
    assert torch.allclose(net.error.flatten(), torch.where(features[0] > 0, error[0], 0.0), atol=1e-6)


def test_other_nets_are_refused_in_one_line() -> None:
    torch.manual_seed(0)
    with pytest.raises(NoChain, match="not two blocks"):
        read(target_of(convolution(), "convolution"))
