"""A chain is a chain only if nothing happens between its links."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.engine.chain import NoChain, trace
from harness.models import load_model
from tests.attack.toys import Shortcut, turned

LAYERS = {
    "relu": functional.relu,
    "relu in place": lambda y: functional.relu(y, inplace=True),
    "relu_": Tensor.relu_,
    "ReLU in place": nn.ReLU(inplace=True),
    "leaky_relu": lambda y: functional.leaky_relu(y, 0.3),
    "sigmoid": torch.sigmoid,
    "sigmoid of its own": Tensor.sigmoid,
    "tanh": functional.tanh,
    "gelu": lambda y: functional.gelu(y, approximate="tanh"),
    "softplus": lambda y: functional.softplus(y, 2.0),
    "elu": lambda y: functional.elu(y, alpha=0.5),
    "silu": functional.silu,
}
ARITHMETIC = {
    "part of a pool": lambda y: functional.max_pool2d(y, 2, stride=1, padding=1)[..., :3, :3],
    "transpose": lambda y: y.transpose(2, 3),
    "a factor": lambda y: 2 * y,
    "into another": lambda y: torch.sigmoid(y, out=torch.empty_like(y)),
    "something in place": lambda y: y.mul_(2),
}


class View(nn.Module):
    """The released code's way: a view between two layers, and no Flatten."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between = (LAYERS | ARITHMETIC).get(between)  # a module is one of its own
        self.first, self.last = nn.Conv2d(1, 2, 3), nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.between is not None:
            y = self.between(y)
        return self.last(y.reshape(len(y), -1))


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Rows(nn.Module):
    """Hands on each row as an example of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])


def test_lenet_is_a_chain_in_order() -> None:
    names = [type(link.module).__name__ for link in trace(load_model("lenet"), (3, 32, 32))]
    assert names == ["Conv2d", "Sigmoid"] * 3 + ["Flatten", "Linear"]


def test_a_view_between_layers_is_no_break() -> None:
    links = trace(View(""), (1, 5, 5))
    assert [link.output_shape for link in links] == [(2, 3, 3), (4,)]


def test_links_run_one_after_the_other_are_the_model() -> None:
    for model, shape in ((View(""), (1, 5, 5)), (turned(), (1, 16, 16))):
        inputs = torch.rand(3, *shape)
        value = inputs
        for link in trace(model, shape):
            value = link(value)
        assert value.equal(model(inputs))


def test_parts_that_are_taken_for_examples_are_no_chain() -> None:
    rows = nn.Sequential(Rows(), nn.Linear(4, 2))
    with pytest.raises(NoChain, match=r"layer 1 \(Linear\) takes parts"):
        trace(rows, (3, 4))


@pytest.mark.parametrize("between", LAYERS)
def test_a_function_is_a_link_too(between: str) -> None:
    model, inputs = View(between), torch.randn(2, 1, 5, 5)
    first, function, last = trace(model, (1, 5, 5))
    value = first(inputs)
    before = value.clone()
    assert last(function(value)).allclose(model(inputs))
    assert value.equal(before)


def test_pools_are_links_too() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.avg_pool2d(functional.max_pool2d(x, 3, 2, 0, 1, True), kernel_size=2)
            return self.last(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))

    model, inputs = Pools(), torch.randn(2, 3, 8, 8)
    value = inputs
    links = trace(model, (3, 8, 8))
    for link in links:
        value = link(value)
    assert value.allclose(model(inputs))
    assert [type(link.module) for link in links[:3]] == [nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d]


@pytest.mark.parametrize("between", ARITHMETIC)
def test_arithmetic_between_layers_breaks_it(between: str) -> None:
    with pytest.raises(NoChain, match=r"before layer last \(Linear\)"):
        trace(View(between), (1, 5, 5))


@pytest.mark.parametrize("model", [Shortcut(), Twice().double()])
def test_what_only_looks_like_a_chain(model: nn.Module) -> None:
    shape = (12,) if isinstance(model, Shortcut) else (4,)
    with pytest.raises(NoChain):
        trace(model, shape)


def test_the_model_is_left_without_hooks() -> None:
    model = Shortcut()
    with pytest.raises(NoChain):
        trace(model, (12,))
    assert not any(module._forward_hooks for module in model.modules())
    assert model(torch.zeros(1, 12)).shape == (1, 5)
