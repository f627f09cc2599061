"""The gradients of many batches at once, to be matched with the observed one.

In: a target, and a precision to compute in. Out: a function from S batches to the S gradients that the model has there,
which can be differentiated again. The S share the weights, and run as one with `torch.func.vmap` where that pays and
the model allows it, else one after the other.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from attack.engine.target import Target


class Match:
    """Gradients of batches at the target's weights, over its known elements.

    Args:
        dtype: of the arithmetic. A float32 gradient carries an error of some 1e-6 of its size: enough to search with,
            not to end with.
    """

    def __init__(self, target: Target, dtype: torch.dtype = torch.float64) -> None:
        self._loss = target.loss
        self.model = target.model if dtype == torch.float64 else copy.deepcopy(target.model).to(dtype)
        """The target's, in this precision."""
        self._parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        self.observed = target.gradient.to(dtype)
        """Shape (parameters,); 0 where unknown."""
        self.known = target.known.to(dtype)
        """Shape (parameters,): 1 where known, else 0."""
        # Measured on one core: float32 on a LeNet 1.5 ms each instead of 3.6, float64 and wider nets no gain or a loss.
        self._together = (dtype == torch.float32 and target.device.type != "cpu") or target.known.numel() < 100_000

    def mismatch(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """`gradients` less the observed one."""
        return self.gradients(inputs, labels) - self.observed

    def gradients(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Shape (searches, parameters); 0 where unknown.

        Args:
            inputs: shape (searches, batch, *input_shape).
            labels: int64, shape (searches, batch), or probabilities, shape (searches, batch, classes).
        """
        if self._together and len(inputs) > 1:
            try:
                return vmap(self._functional)(inputs, labels) * self.known
            except RuntimeError:  # a model whose path depends on its values
                self._together = False
        return torch.stack([self._one(*both) for both in zip(inputs, labels, strict=True)]) * self.known

    def _functional(self, inputs: Tensor, labels: Tensor) -> Tensor:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return self._loss(functional_call(self.model, parameters, (inputs,)), labels)

        gradients = grad(loss)(self._parameters)
        return torch.cat([gradients[name].flatten() for name in self._parameters])

    def _one(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss = self._loss(self.model(inputs), labels)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()), create_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])


class Matches:
    """A target's matches by precision, each made when it is asked for."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._made: dict[torch.dtype, Match] = {}

    def __getitem__(self, dtype: torch.dtype) -> Match:
        if dtype not in self._made:
            self._made[dtype] = Match(self._target, dtype)
        return self._made[dtype]
