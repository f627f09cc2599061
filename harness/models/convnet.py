"""A small unmodified convolutional network: ReLU, max pooling, torch's initialization."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two 3x3 convolutions (32 and 64 channels) with ReLU and 2x2 max pooling, and one linear layer.

    Args:
        input: (channels, height, width) of one picture.
        classes: number of classes.
    """

    def __init__(self, input: tuple[int, int, int] = (3, 32, 32), classes: int = 100) -> None:
        super().__init__()
        self.input_shape, self.num_classes = tuple(input), classes
        self.body = nn.Sequential(
            nn.Conv2d(input[0], 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        with torch.no_grad():
            features = self.body(torch.zeros(1, *input)).shape[1]
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, classes)."""
        return self.head(self.body(x))
