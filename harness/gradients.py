"""A batch -> the gradient of its mean loss, or of each example's, flat. Knows nothing of peers, defenses or wires."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from harness.errors import ConfigError
from harness.models import Loss
from harness.types import Batch, ExampleGradients, Gradients


def mean_gradient(model: nn.Module, loss: Loss, batch: Batch) -> Gradients:
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
    return Gradients(loss=value.item(), correct=loss.correct(outputs, batch.labels), flat=flat)


def example_gradients(model: nn.Module, loss: Loss, batch: Batch) -> ExampleGradients:
    """The gradient of `loss` of each example by itself; their mean is `mean_gradient`'s to rounding, but for losses of
    tokens, where examples with few labels count as much here as those with many.

    Raises: ConfigError for a model whose examples depend on each other, or that torch cannot map over examples.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"a defense of each example: layer {name} normalizes by the batch, so no gradient is one example's; "
                "take a model without batch norm"
            )
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def one(parameters: dict[str, Tensor], inputs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        outputs = functional_call(model, parameters, (inputs[None],))
        return loss(outputs, label[None]), outputs[0]

    try:
        # What draws at random, such as dropout, draws for each example by itself.
        mapped = vmap(grad_and_value(one, has_aux=True), in_dims=(None, 0, 0), randomness="different")
        gradients, (losses, outputs) = mapped(parameters, batch.inputs, batch.labels)
    except RuntimeError as error:
        raise ConfigError(
            f"a defense of each example: this model's gradient cannot be had for each: {error}"
        ) from error
    size = len(batch.labels)
    return ExampleGradients(
        loss=losses.mean().item(),
        correct=loss.correct(outputs, batch.labels),
        examples=torch.cat([gradients[name].reshape(size, -1) for name in parameters], dim=1),
    )
