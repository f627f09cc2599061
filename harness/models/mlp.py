"""A plain multi-layer perceptron with ReLU."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers of widths prod(input), *hidden, classes, with ReLU between them; torch's initialization.

    Args:
        input: shape of one example.
        classes: number of classes.
        hidden: widths of the hidden layers; on a command line 200x100.
    """

    def __init__(
        self, input: tuple[int, ...] = (3, 32, 32), classes: int = 100, hidden: int | tuple[int, ...] = (200, 100)
    ) -> None:
        super().__init__()
        self.input_shape, self.num_classes = tuple(input), classes
        widths = [math.prod(input), *((hidden,) if isinstance(hidden, int) else hidden)]
        layers: list[nn.Module] = [nn.Flatten()]
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, classes)."""
        return self.head(self.body(x))
