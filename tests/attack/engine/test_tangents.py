"""The Jacobian that is followed forward is that of automatic differentiation, layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.engine.chain import NoChain, trace
from attack.engine.tangents import Tangents, check_order

LABEL = torch.tensor([2])


def nets() -> list[nn.Module]:
    strided = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(3, 4, (2, 3), bias=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(24, 7), nn.LeakyReLU(0.1), nn.Linear(7, 5),
    )  # fmt: skip
    return [strided, nn.Sequential(nn.Flatten(), nn.Linear(98, 6), nn.Sigmoid(), nn.Linear(6, 5))]


@pytest.mark.parametrize("which", [0, 1])
def test_it_is_the_jacobian_of_outputs_and_gradients(which: int) -> None:
    torch.manual_seed(which)
    model = nets()[which].double()
    links, x = trace(model, (2, 7, 7)), torch.rand(1, 2, 7, 7, dtype=torch.float64)
    parameters = list(model.parameters())

    def equations(x: Tensor) -> Tensor:
        outputs = model[: 3 if which == 0 else 2](x)
        loss = functional.cross_entropy(model(x), LABEL)
        gradients = torch.autograd.grad(loss, parameters[:-2], create_graph=True)
        return torch.cat([outputs.flatten(), *(gradient.flatten() for gradient in gradients)])

    wanted = torch.autograd.functional.jacobian(equations, x).flatten(1)
    tangents = Tangents(links, 3 if which == 0 else 2, functional.cross_entropy, LABEL)
    found = tangents.transposed(x)
    assert torch.allclose(found.T, wanted, rtol=1e-10, atol=1e-12)
    scales = torch.rand(len(wanted), dtype=torch.float64).round(decimals=1).clamp(0, 0.5)
    scaled = scales[:, None] * wanted
    assert torch.allclose(tangents.gram(x, scales), scaled.T @ scaled, rtol=1e-10, atol=1e-12)


def test_parameters_in_another_order_are_refused() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    model = Swapped()
    with pytest.raises(NoChain, match="not in the order"):
        check_order(trace(model, (6,)), model)
