"""A data-parallel job on paper: what a perfect tap sees of its ranks, and the weights that they had."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from attack.observation import Known, Observation
from harness.models import load_optimizer

Step = Callable[[], object]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def network(classes: int, *, convolutional: bool) -> nn.Module:
    if not convolutional:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, classes))
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, classes))


def train(
    rule: str | Callable[[list[nn.Parameter]], Step],
    *,
    classes: int = 20,
    batch: int = 1,
    ranks: int = 2,
    steps: int = 5,
    seed: int = 0,
    convolutional: bool = False,
    smoothing: float = 0.0,
) -> tuple[list[Observation], list[Tensor]]:
    """The observations, with the first step's weights alone, and the weights before every step."""
    torch.manual_seed(seed)
    model = network(classes, convolutional=convolutional)
    parameters = list(model.parameters())
    step_once = load_optimizer(rule, parameters).step if isinstance(rule, str) else rule(parameters)
    seen: list[Observation] = []
    truth: list[Tensor] = []
    for step in range(steps):
        truth.append(flat(parameters))
        gradients = []
        for _ in range(ranks):
            inputs, labels = torch.rand(batch, 3, 8, 8), torch.randint(0, classes, (batch,))
            loss = nn.functional.cross_entropy(model(inputs), labels, label_smoothing=smoothing)
            gradients.append(flat(torch.autograd.grad(loss, parameters)))
        average = sum((gradient / ranks for gradient in gradients[1:]), gradients[0] / ranks)
        seen += [
            Observation(
                rank=rank,
                step=step,
                world_size=ranks,
                exchange="gloo",
                gradient=gradient,
                known=torch.full(gradient.shape, Known.RAW, dtype=torch.uint8),
                average=average,
                weights=None if step else truth[0],
                shapes=tuple(tuple(parameter.shape) for parameter in parameters),
            )
            for rank, gradient in enumerate(gradients)
        ]
        at = 0
        for parameter in parameters:
            parameter.grad = average[at : at + parameter.numel()].view_as(parameter).clone()
            at += parameter.numel()
        step_once()
    return seen, truth
