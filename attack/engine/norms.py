"""What the batch norms of a graph do, forwards and backwards, by running statistics or by the batch's.

In training mode they normalize by the batch's own mean and variance, as far as these were seen (`Target.statistics`),
and the error that one passes on has lost its mean and what goes along with its input. Knows no walk and no truth.

Reference: Ioffe and Szegedy 2015, arXiv 1502.03167, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attack.engine.graph import Graph
from attack.engine.target import Target


class Norms:
    """What the batch norms of a graph do, forwards and backwards."""

    def __init__(self, target: Target, graph: Graph) -> None:
        self._nodes = graph.nodes
        self._places = target.places
        self._gradients = target.tensors(target.gradient)
        self._seen = target.statistics

    def by_batch(self, place: int) -> bool:
        """Whether a norm normalizes by the batch."""
        return bool(self._nodes[place].layer.training)

    def forward(self, place: int, z: Tensor) -> Tensor:
        """The output, of an input of shape (1, channels, height, width)."""
        norm = self._module(place)
        mean, variance = (s.to(z).view(1, -1, 1, 1) for s in self.statistics(place, z))
        normal = (z - mean) / (variance + norm.eps).sqrt()
        return normal * _column(norm.weight, z) + _column(norm.bias, z, 0.0)

    def statistics(self, place: int, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance by which each channel is normalized: as they were seen, or those of its input."""
        norm = self._module(place)
        if not norm.training:
            assert norm.running_mean is not None and norm.running_var is not None
            return norm.running_mean, norm.running_var
        seen = self._seen.get(self._nodes[place].name)
        if seen is not None:
            values = math.prod(self._nodes[place].shape[1:])  # torch keeps the unbiased variance
            return seen[0], seen[1] * (values - 1) / values
        if z is None:
            assert norm.running_mean is not None and norm.running_var is not None
            return norm.running_mean, norm.running_var  # to begin with
        variance, mean = torch.var_mean(z, dim=(0, 2, 3), correction=0)
        return mean, variance

    def normal(self, place: int, z: Tensor) -> Tensor:
        """An input, shape (1, channels, height, width), as a norm by the batch makes it of mean 0 and variance 1: shape
        (channels, height, width).

        By its own mean, not by that which was seen: what this passes on must sum to zero before z is settled, too.
        """
        variance, mean = torch.var_mean(z[0], dim=(1, 2), correction=0, keepdim=True)
        normal: Tensor = (z[0] - mean) / (variance + self._module(place).eps).sqrt()
        return normal

    def undo(self, place: int, output: Tensor) -> Tensor:
        """What was normalized, from the output, both of shape (channels, height, width)."""
        norm = self._module(place)
        return (output - _column(norm.bias, output, 0.0)[0]) / _column(norm.weight, output)[0]

    def pull_back(self, place: int, error: Tensor, normal: Tensor | None) -> Tensor:
        """The error at the input, from that at the output, shape (channels, height, width).

        Args:
            normal: the input as it is normalized; only a norm by the batch needs it.
        """
        norm = self._module(place)
        _, variance = self.statistics(place, None)
        if norm.training:
            assert normal is not None
            error = error - error.mean((1, 2), keepdim=True) - normal * self._slope(norm, error, normal)
        return error * _column(norm.weight, error)[0] / (variance.to(error).view(-1, 1, 1) + norm.eps).sqrt()

    def push_up(self, place: int, error: Tensor, z: Tensor) -> Tensor:
        """The inverse: the error at the output, from that at the input. In training mode, both `error` and z may be
        off by a factor and its inverse."""
        norm = self._module(place)
        gain = _column(norm.weight, error)[0]
        if not norm.training:
            _, variance = self.statistics(place, None)
            return error * (variance.to(error).view(-1, 1, 1) + norm.eps).sqrt() / gain
        variance, mean = torch.var_mean(z[0], dim=(1, 2), correction=0, keepdim=True)
        normal = (z[0] - mean) / variance.sqrt()
        positions = error[0].numel()
        shift, slope = (self._gradients[self._places[id(p)]].view(-1, 1, 1) for p in (norm.bias, norm.weight))
        return error * variance.sqrt() / gain + (shift + normal * slope) / positions

    def shift(self, place: int) -> Tensor | None:
        """The gradient of a norm's bias: the sum of the errors at each channel of its output."""
        at = self._places.get(id(self._module(place).bias))
        return None if at is None else self._gradients[at]

    def _slope(self, norm: nn.BatchNorm2d, error: Tensor, normal: Tensor) -> Tensor:
        """Mean of error times normal, by channel: the gradient of the norm's weight says it."""
        at = self._places.get(id(norm.weight))
        if at is None:
            return (error * normal).mean((1, 2), keepdim=True)
        return self._gradients[at].view(-1, 1, 1) / error[0].numel()

    def _module(self, place: int) -> nn.BatchNorm2d:
        module = self._nodes[place].module
        assert isinstance(module, nn.BatchNorm2d)
        return module


def _column(values: Tensor | None, like: Tensor, default: float = 1.0) -> Tensor:
    return like.new_full((1, 1, 1, 1), default) if values is None else values.detach().to(like).view(1, -1, 1, 1)
