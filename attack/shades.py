"""Which values of a model's inputs are black and white, by channel: what pictures and their scores are in units of.

Known where the job's normalization is, or where it has none. Where it is not known, a picture is shown from its own
least to its own greatest value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.models import load_normalize

UNKNOWN = "unknown"
"""In place of a normalization: there may be one."""
ANY_RANGE = (-3.0, 3.0)
"""Holds pictures from 0 to 1 under all usual normalizations: by the mean and deviation of ImageNet, CIFAR, MNIST, or
to -1 to 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shades:
    """Black and white: each one number, or of shape (channels, 1, 1)."""

    black: Tensor
    white: Tensor

    @classmethod
    def of(cls, knowledge: Mapping[str, Any]) -> Shades | None:
        """Those of `Knowledge.summary()`; None where they are not known."""
        normalize = knowledge.get("normalize")
        if normalize == UNKNOWN:
            return None
        if normalize is None:
            return cls.between(*knowledge["input_range"])
        by = load_normalize(normalize)
        return cls(torch.tensor(by.black).view(-1, 1, 1), torch.tensor(by.white).view(-1, 1, 1))

    @classmethod
    def between(cls, low: float, high: float) -> Shades:
        """The same for all channels."""
        return cls(torch.tensor(low), torch.tensor(high))

    @classmethod
    def own(cls, example: Tensor) -> Shades:
        """From an example's least to its greatest value."""
        finite = example[example.isfinite()]
        if not finite.numel() or finite.min() == finite.max():
            return cls.between(0.0, 1.0)
        return cls(finite.min().float(), finite.max().float())

    def unit(self, example: Tensor) -> Tensor:
        """Black to 0, white to 1."""
        black, white = self.black.to(example), self.white.to(example)
        return (example - black) / (white - black)


def input_range_of(normalize: str) -> tuple[float, float]:
    """Lowest and highest value of an input, of all channels together. Raises: ValueError, one line."""
    if normalize == UNKNOWN:
        return ANY_RANGE
    by = load_normalize(normalize)
    return min(by.black), max(by.white)
