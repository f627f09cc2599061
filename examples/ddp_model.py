"""The public architecture of `ddp_train.py`: a small convolutional network, and nothing of the training."""

from torch import nn


def build() -> nn.Module:
    """Logits of 100 classes for pictures of shape (batch, 3, 32, 32)."""
    return nn.Sequential(
        nn.Conv2d(3, 12, kernel_size=5, padding=2, stride=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, kernel_size=5, padding=2, stride=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, kernel_size=5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(12 * 8 * 8, 100),
    )
