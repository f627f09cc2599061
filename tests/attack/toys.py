"""Models and observations small enough to reason about, and gradients as an honest rank would send them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.engine.context import Context
from attack.observation import Knowledge, Known, Observation
from harness.defenses import load_defense
from harness.exchange.base import as_coded
from harness.models import load_model
from harness.wire.codec import decode


def linear() -> nn.Module:
    return nn.Linear(12, 5)


def sigmoid() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 5))


def tanh() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))


def shortcut() -> nn.Module:
    return Shortcut()


def several_rows() -> nn.Module:
    """Its first layer is applied to three rows of each example, as to tokens."""
    return nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Linear(4, 8), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5))


class Shortcut(nn.Module):
    """Not a chain: its input goes around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.sigmoid(self.inner(x)))


class Turned(nn.Module):
    """A chain as many are written: it views its input as a row by itself, activates by a function and in place, and
    lists its parameters in another order than it uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first, self.last = nn.Linear(24, 16), nn.Linear(256, 24), nn.Linear(16, 10)
        self.bend = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.relu(self.inner(self.bend(self.first(x.flatten(1))))))


def turned() -> nn.Module:
    return Turned()


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip


class ByFunction(nn.Module):
    """Activations and pools that are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.last = nn.Linear(1024, 20)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = functional.max_pool2d(functional.relu(layer(x)), 2)
        return self.last(torch.flatten(x, 1))


def by_function() -> nn.Module:
    return ByFunction()


def spec(name: str) -> str:
    """How a `Knowledge` names a toy."""
    return f"{__name__}:{name}"


def example(name: str, *, seed: int = 0, batch: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, and inputs in [0, 1) and labels for it."""
    torch.manual_seed(seed)
    model = load_model(spec(name))
    shape = (2, 8, 8) if name == "convolution" else (12,)
    return model, torch.rand(batch, *shape), torch.randperm(5)[:batch]


def observe(model: nn.Module, inputs: Tensor, labels: Tensor, **changes: Any) -> Observation:
    """What a perfect tap sees of a rank that sends the float32 gradient of its mean loss."""
    loss = nn.functional.cross_entropy(model(inputs), labels)
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
    return observe_gradient(model, gradient, **changes)


def observe_gradient(model: nn.Module, gradient: Tensor, **changes: Any) -> Observation:
    """What a perfect tap sees of a rank that sends this gradient, float32, shape (parameters,)."""
    parameters = list(model.parameters())
    fields = {
        "rank": 0,
        "step": 0,
        "world_size": 1,
        "exchange": "zeromq",
        "gradient": gradient,
        "known": torch.full(gradient.shape, Known.RAW, dtype=torch.uint8),
        "weights": torch.cat([parameter.detach().flatten() for parameter in parameters]),
        "shapes": tuple(tuple(parameter.shape) for parameter in parameters),
    }
    return Observation(**fields | changes)


def defended(
    spec: str,
    steps: int = 1,
    *,
    name: str = "convolution",
    seed: int = 0,
    batch: int = 1,
    left_out: Sequence[int] = (),
) -> tuple[Observation, Tensor]:
    """One gradient at so many steps, as a receiver makes it of what a defense sends, and the gradient itself; of the
    last layer's weights, these columns are sent as 0."""
    plain = observe(*example(name, seed=seed, batch=batch))
    gradient = plain.gradient.double()
    rows, columns = plain.shapes[-2]
    plain.gradient[-rows * (columns + 1) : -rows].view(rows, columns)[:, list(left_out)] = 0
    sizes = tuple(math.prod(shape) for shape in plain.shapes)
    chain, seen = load_defense(spec), []
    state = chain.begin(sizes)
    for step in range(steps):
        sent, state = chain(plain.gradient.clone(), sizes, state, seed=seed, rank=0, step=step)
        coded = as_coded(sent)
        codec, params, payload = coded.part(0, coded.size)
        said = decode(codec, coded.size, params, payload)
        bound = None if said.error is None else torch.from_numpy(said.error)
        known = torch.full_like(plain.known, int(Known.RAW if bound is None else Known.CODED))
        values = torch.from_numpy(said.values.copy())
        seen.append(dataclasses.replace(plain, step=step, gradient=values, known=known, bound=bound, defense=spec))
    return dataclasses.replace(seen[0], again=tuple(seen[1:])), gradient


def unhurried(*, seed: int = 0) -> Context:
    """What an attack may use, without a deadline."""
    return Context(generator=torch.Generator().manual_seed(seed), deadline=math.inf)


def told(name: str, inputs: Tensor, **more: Any) -> Knowledge:
    """What the eavesdropper is told of a toy."""
    return Knowledge(model=spec(name), input_shape=tuple(inputs.shape[1:]), **{"batch_size": len(inputs)} | more)
