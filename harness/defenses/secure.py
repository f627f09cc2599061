"""Secure aggregation: what leaves the rank is masked, and only the sum over the ranks can be read.

    g -> round(g / unit) + masks  modulo 2**32,   unit = 2**k, the smallest for which no sum over the ranks overflows

The chain decides that it is to be so, and within which range; the masks need the other ranks' keys, and are put on by
the exchange (`harness.exchange.secure`). An element beyond the range is refused: cut off, the sum would be wrong
without saying so.

Public side: the unit, and the mean of all ranks' gradients within half of it.

Reference: Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from harness.defenses.base import Coder, Moment, Sizes, State
from harness.errors import DefenseError
from harness.wire.coded import Coded, Defended, Float32, Part

LARGEST_SUM = (1 << 31) - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Private:
    """A vector that may be shown to nobody but as a part of a sum. It cannot be sent as it is."""

    numbers: Float32
    range: float

    @property
    def codec(self) -> str:
        return "private"

    @property
    def size(self) -> int:
        return self.numbers.size

    def values(self) -> Float32:
        """For the rank itself."""
        return self.numbers

    def part(self, at: int, count: int) -> Part:
        raise DefenseError(
            "secure-aggregation needs an exchange that masks: zeromq with one server of its own, allreduce, or ddp"
        )

    def unit(self, world_size: int) -> float:
        """A power of two: the value of 1 in fixed point, for sums over so many ranks."""
        return float(2.0 ** np.ceil(np.log2(self.range * world_size / (LARGEST_SUM - world_size))))


@dataclasses.dataclass(frozen=True, slots=True)
class SecureAggregation(Coder):
    """Masked words of 32 bits."""

    range: float = 64.0

    def __post_init__(self) -> None:
        if not 0 < self.range < float("inf"):
            raise ValueError(f"range: wanted more than 0, e.g. 64, got {self.range}")

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        """Raises: DefenseError where an element is beyond the range, or no number."""
        numbers = gradient.contiguous().numpy()
        low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)
        if not -self.range <= low <= high <= self.range:  # false where one is NaN, too
            raise DefenseError(
                f"rank {moment.rank}, step {moment.step}: secure-aggregation: an element of {max(-low, high):g} is "
                f"beyond its range of {self.range:g}; name a larger one (secure-aggregation:range=...), or clip before"
            )
        return Private(numbers, self.range), state


def private_of(coded: object) -> Private | None:
    """The vector behind a chain that ends in secure aggregation; None for any other."""
    inner = coded.coded if isinstance(coded, Defended) else coded
    return inner if isinstance(inner, Private) else None
