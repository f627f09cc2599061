"""A batch -> the gradient of its mean loss, as one flat vector. Knows nothing of peers, defenses or wires."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.types import Batch, Gradients


def mean_gradient(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> Gradients:
    """The gradient of `loss`, mean over the batch, with respect to all parameters of `model`.

    Parameters that the loss does not reach get zeros, as a stock optimizer would leave them.
    """
    outputs = model(batch.inputs)
    value = loss(outputs, batch.labels)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    flat = torch.cat(
        [
            torch.zeros(parameter.numel(), device=parameter.device) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
    )
    correct = (outputs.detach().argmax(1) == batch.labels).float().mean().item()
    return Gradients(loss=value.item(), correct=correct, flat=flat)
