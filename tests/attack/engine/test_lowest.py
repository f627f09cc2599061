"""The two lowest layers' equations: written out as differentiated, and zero at the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attack.engine.chain import NoChain, trace
from attack.engine.lowest import Lowest
from attack.engine.target import prepare
from attack.engine.walk import FullBelief
from attack.observation import Knowledge
from tests.attack.toys import observe


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


def connected() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 6, bias=False), nn.Tanh(), nn.Linear(6, 7), nn.Linear(7, 5))


def lowest(name: str, upto: int) -> tuple[Lowest, Tensor]:
    """The equations as they are where the second layer's output and the error there are known, and the truth."""
    torch.manual_seed(0)
    model = deep() if name == "deep" else connected()
    inputs, label = torch.rand(1, 2, 8, 8), torch.tensor([3])
    seen = observe(model, inputs, label)
    knowledge = Knowledge(model=f"{__name__}:{name}", input_shape=(2, 8, 8), batch_size=1)
    target = prepare(seen, knowledge, device=torch.device("cpu"))
    layers = list(target.model)
    value = inputs.double()
    for layer in layers[:upto]:
        value = layer(value)
    logits = value
    for layer in layers[upto:]:
        logits = layer(logits)
    error = torch.autograd.grad(nn.functional.cross_entropy(logits, label), value)[0].flatten()
    mean = value.detach().flatten()
    precision = 1e12 * torch.eye(len(mean), dtype=torch.float64)
    belief = FullBelief(
        mean=mean,
        precision=precision,
        weighted=precision @ mean,
        samples=mean[None],
        error=error,
        error_samples=error[None],
    )
    links = trace(target.model, target.input_shape)
    return Lowest(target, links[:upto], belief, floor=1e-4), inputs.double()


@pytest.mark.parametrize(("name", "upto"), [("deep", 3), ("connected", 4)])
def test_gram_is_that_of_the_jacobian(name: str, upto: int) -> None:
    equations, truth = lowest(name, upto)
    place = truth + 0.1
    jacobian = torch.autograd.functional.jacobian(equations.rows, place).flatten(1)
    gram = jacobian.T @ jacobian
    assert torch.allclose(equations.gram(place), gram, rtol=1e-9, atol=1e-12 * float(gram.abs().max()))


@pytest.mark.parametrize(("name", "upto"), [("deep", 3), ("connected", 4)])
def test_truth_solves_the_equations(name: str, upto: int) -> None:
    equations, truth = lowest(name, upto)
    # In units of 1e-4; the gradient is float32's.
    assert equations.rows(truth).abs().max() < 0.1
    assert equations.rows(truth + 0.1).square().mean().sqrt() > 10


def test_three_layers_are_not_two() -> None:
    with pytest.raises(NoChain, match="two layers"):
        lowest("deep", 6)
