"""The LeNet of the released code of Deep Leakage from Gradients (Zhu, Liu, Han; NeurIPS 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LeNet(nn.Module):
    """Three 5x5 convolutions with padding 2 and strides 2, 2, 1, a sigmoid after each, and one linear layer.

    Weights and biases are drawn from U(-0.5, 0.5), as the released code does; the paper's text speaks of removed
    strides, but its code keeps them, and so does this.

    Args:
        input: (channels, height, width) of one picture.
        classes: number of classes.
        channels: of every convolution; 12 in the released code.
    """

    def __init__(self, input: tuple[int, int, int] = (3, 32, 32), classes: int = 100, channels: int = 12) -> None:
        super().__init__()
        self.input_shape, self.num_classes = tuple(input), classes
        self.body = nn.Sequential(
            nn.Conv2d(input[0], channels, kernel_size=5, padding=2, stride=2),
            nn.Sigmoid(),
            nn.Conv2d(channels, channels, kernel_size=5, padding=2, stride=2),
            nn.Sigmoid(),
            nn.Conv2d(channels, channels, kernel_size=5, padding=2, stride=1),
            nn.Sigmoid(),
            nn.Flatten(),
        )
        with torch.no_grad():
            features = self.body(torch.zeros(1, *input)).shape[1]
        self.head = nn.Linear(features, classes)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, classes), of pictures of shape (batch, *input)."""
        return self.head(self.body(x))
