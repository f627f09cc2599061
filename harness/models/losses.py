"""Public losses: the mean over the batch of a loss per example."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Labels: int64, shape (batch,), or probabilities, float, shape (batch, classes).
    "cross_entropy": functional.cross_entropy,
}
