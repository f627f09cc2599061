"""A linear layer with a bias in flat vectors of a model's parameters, as one matrix [b, W]."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from attack.observation import Observation, Shapes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Where a weight and the bias behind it stand."""

    start: int
    classes: int
    features: int

    @property
    def stop(self) -> int:
        """Behind the bias."""
        return self.start + self.classes * (self.features + 1)

    def cut(self, seen: Observation) -> Observation:
        """What was seen of this layer: its gradient, and what every rank stepped with; no weights."""
        own = slice(self.start, self.stop)
        return dataclasses.replace(
            seen,
            gradient=seen.gradient[own],
            known=seen.known[own],
            bound=None if seen.bound is None else seen.bound[own],
            average=None if seen.average is None else seen.average[own],
            weights=None,
            buffers=None,
            shapes=((self.classes, self.features), (self.classes,)),
        )

    def matrix(self, flat: Tensor) -> Tensor:
        """[b, W], shape (classes, 1 + features): of a flat vector of all parameters, or of the layer's alone."""
        own = flat[self.start : self.stop] if flat.numel() > self.stop - self.start else flat
        weight, bias = own.split([self.classes * self.features, self.classes])
        return torch.cat([bias[:, None], weight.view(self.classes, self.features)], 1)


def linear_layers(shapes: Shapes) -> Iterator[Layer]:
    """All that may be one, the last first: a matrix, and a vector of as many rows behind it."""
    ends = list(accumulate(map(math.prod, shapes)))
    for index in range(len(shapes) - 1, 0, -1):
        weight, bias = shapes[index - 1], shapes[index]
        if len(weight) == 2 and bias == weight[:1] and weight[0] > 1:
            start = ends[index - 1] - math.prod(weight)
            yield Layer(start=start, classes=weight[0], features=weight[1])
