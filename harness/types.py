"""The words that rooms share: what a batch is, and what a gradient is. Distinct types stop a wrong order."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One rank's examples at one step."""

    inputs: Tensor
    """float32, shape (batch, *input_shape), in model input units."""
    labels: Tensor
    """int64, shape (batch,)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExampleGradients:
    """The gradient of each example's own loss, for what takes part before their mean."""

    loss: float
    """Mean loss over the rank's batch."""
    correct: float
    """Share of the rank's batch whose largest output is its label, 0 to 1."""
    examples: Tensor
    """float32, shape (batch, parameters), in `model.parameters()` order."""

    def mean(self) -> Gradients:
        """The gradient of the mean loss."""
        return Gradients(loss=self.loss, correct=self.correct, flat=self.examples.mean(0))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """The gradient of a rank's own mean loss."""

    loss: float
    """Mean loss over the rank's batch."""
    correct: float
    """Share of the rank's batch whose largest output is its label, 0 to 1."""
    flat: Tensor
    """float32, shape (parameters,), in `model.parameters()` order."""
