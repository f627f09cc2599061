"""A plain multi-layer perceptron."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class MLP(nn.Module):
    """Fully connected layers of widths prod(input), *hidden, classes, with an activation between them.

    Weights are drawn as torch draws them.

    Args:
        input: shape of one example.
        classes: number of classes.
        hidden: widths of the hidden layers; on a command line 200x100.
        activation: relu, tanh or sigmoid.
    """

    def __init__(
        self,
        input: tuple[int, ...] = (3, 32, 32),
        classes: int = 100,
        hidden: int | tuple[int, ...] = (200, 100),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not known; there are: {', '.join(ACTIVATIONS)}")
        self.input_shape, self.num_classes = tuple(input), classes
        widths = [math.prod(input), *((hidden,) if isinstance(hidden, int) else hidden)]
        layers: list[nn.Module] = [nn.Flatten()]
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), ACTIVATIONS[activation]()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, classes)."""
        return self.head(self.body(x))
