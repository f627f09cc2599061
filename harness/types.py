"""The words that rooms share: what a batch is, and what a gradient is. Distinct types stop a wrong order."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One rank's examples at one step."""

    inputs: Tensor
    """float32, shape (batch, *input_shape), in model input units; or tokens, int64, shape (batch, length), padded."""
    labels: Tensor
    """int64, shape (batch,); or, where the loss asks for tokens, shape (batch, length), in their places, and
    `harness.models.IGNORED` elsewhere."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExampleGradients:
    """The gradient of each example's own loss, for what takes part before their mean."""

    loss: float
    """Mean loss over the rank's batch."""
    correct: float
    """Share of the labels of the rank's batch that the largest output names, 0 to 1."""
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
    """Share of the labels of the rank's batch that the largest output names, 0 to 1."""
    flat: Tensor
    """float32, shape (parameters,), in `model.parameters()` order."""
