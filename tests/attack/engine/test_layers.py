"""The algebra of layers against autograd, the slow and obvious way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attack.engine.chain import NoChain, trace
from attack.engine.layers import (
    activation,
    by_channel,
    check,
    gradient_rows,
    pull_back,
    push_covariance,
    weight_gradients,
)

LAYERS = [
    (nn.Linear(7, 4), (7,)),
    (nn.Conv2d(2, 3, 3), (2, 6, 5)),
    (nn.Conv2d(3, 2, 5, stride=2, padding=2), (3, 9, 8)),
    (nn.Conv2d(2, 3, (1, 2), stride=(3, 2), padding=(2, 3)), (2, 6, 5)),
    (nn.Conv2d(1, 4, (3, 2), stride=(1, 2), padding=(0, 1), dilation=2, bias=False), (1, 8, 8)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_pull_back_and_gradient_rows_are_what_autograd_says(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = layer.double()
    (link,) = trace(layer, shape)
    u = torch.rand(1, *shape, dtype=torch.float64, requires_grad=True)
    z = layer(u)
    error = torch.randn_like(z)
    by_input, by_weight = torch.autograd.grad(z, [u, layer.weight], error)
    assert torch.allclose(pull_back(link, error.flatten(1)), by_input.flatten(1))
    rows = gradient_rows(link, error.flatten())
    channels = u.detach().view(by_weight.shape[1], -1).T  # (elements of a channel, channels)
    assert torch.allclose(rows @ channels, by_channel(link, by_weight))
    assert torch.allclose(weight_gradients(link, error.flatten(1), u.detach().flatten(1))[0], (rows @ channels).T)


@pytest.mark.parametrize(("layer", "shape"), [*LAYERS, (nn.Conv2d(9, 2, 3, stride=2), (9, 7, 7))], ids=str)
@torch.no_grad()
def test_covariance_of_one_channel_is_pushed_as_the_dense_one(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    (link,) = trace(layer.double(), shape)
    rows = gradient_rows(link, torch.randn(link.outputs, dtype=torch.float64))
    covariance = rows.T @ rows
    dense = torch.block_diag(*[covariance] * (link.inputs // len(covariance)))
    forward = pull_back(link, torch.eye(link.outputs, dtype=torch.float64))
    pushed = push_covariance(link, covariance, link.module.get_parameter("weight"))
    assert torch.allclose(pushed.tril(), (forward @ dense @ forward.T).tril())


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.1)], ids=str)
def test_activation_is_undone(module: nn.Module) -> None:
    z = torch.linspace(-6, 6, 50, dtype=torch.float64, requires_grad=True)
    h = module(z)
    (slope,) = torch.autograd.grad(h.sum(), z)
    inverse = activation(module)
    assert inverse is not None
    assert torch.allclose(inverse.inverse(h.detach()), z.detach())
    assert torch.allclose(inverse.slope(h.detach()), slope)


def test_relu_says_nothing_of_units_that_are_off() -> None:
    inverse = activation(nn.ReLU())
    assert inverse is not None
    assert inverse.slope(torch.tensor([0.0, 1e-9, 0.5, 2.0])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), (4,), "layer 1 .GELU. has no closed inverse"),
        (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), (4,), "the last layer is not linear"),
        (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 2)), (2, 5, 5), "one group"),
        (nn.Sequential(nn.Conv2d(1, 4, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)), (1, 5, 5), "MaxPool2d"),
    ],
)
def test_what_cannot_be_walked_back_is_named(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(NoChain, match=reason):
        check(trace(model, shape))
