"""Pruning by magnitude: of each tensor, a share of the elements, the smallest, is not sent, and forgotten.

Of n elements the n - round(n * share) largest are sent; of two of one magnitude, which is not said.

Public side: which elements were sent, exactly as they are; and that no other of the same tensor is larger in magnitude
than the smallest of those.

Reference: Zhu, Liu, Han 2019, Deep Leakage from Gradients, arXiv 1906.08935, section 5.2, gradient compression. What it
cites keeps what was not sent for later: that is `topk`.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from harness.defenses.base import Coder, Moment, Sizes, State
from harness.defenses.largest import Numbers, largest
from harness.wire.coded import Coded
from harness.wire.sparse import Sparse


@dataclasses.dataclass(frozen=True, slots=True)
class Prune(Coder):
    """Drops a share of each tensor."""

    share: float

    def __post_init__(self) -> None:
        check_share(self.share)

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        values = gradient.numpy()
        counts = [size - round(size * self.share) for size in sizes]
        return Sparse.of(values.size, largest(Numbers(values), sizes, counts)), state


def check_share(share: float) -> None:
    """Raises: ValueError."""
    if not 0 <= share < 1:
        raise ValueError(f"wanted a share of 0 or more and below 1, e.g. 0.9, got {share}")
