"""Whole numbers from -127 to 127 in units of each tensor's largest magnitude / 127.

    rounding=nearest      deterministic
    rounding=stochastic   down or up by chance, unbiased

Public side: the units and the rounding. The gradient lies within half a unit of what was sent, or within one.

Reference: Zhu, Liu, Han 2019, Deep Leakage from Gradients, arXiv 1906.08935, section 5.1, which defends with int8 and
does not say how it rounds; the scheme is that of Jacob et al. 2018, arXiv 1712.05877, symmetric.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from harness.defenses.base import Coder, Moment, Sizes, State
from harness.defenses.blocks import LARGEST, borders, by_segment
from harness.defenses.levels import round_levels
from harness.wire.coded import Coded
from harness.wire.levels import Levels

MOST = 127


@dataclasses.dataclass(frozen=True, slots=True)
class Int8(Coder):
    """A byte for each element, a unit for each tensor."""

    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding: wanted nearest or stochastic, got {self.rounding}")

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        values, cut = gradient.numpy(), borders(sizes)
        units = (by_segment(LARGEST, cut, values.__getitem__) / MOST).astype(np.float32)
        draws = moment.draws() if self.rounding == "stochastic" else None
        return Levels(round_levels(values, cut, units, MOST, draws), 8, self.rounding, cut, units), state
