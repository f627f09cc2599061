"""QSGD: whole levels from -s to s in units of each bucket's Euclidean norm / s, rounded by chance, unbiased.

    qsgd:7            s = 7: 4 bits for each element
    bucket=512        elements of a bucket, within one tensor

Public side: the units. The gradient lies within one unit of what was sent.

Reference: Alistarh et al. 2017, QSGD, arXiv 1610.02132, sections 3.1 and 4 (buckets). Its levels are then Elias-coded;
here they have a fixed width, so that a message's length tells nothing of the gradient.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from harness.defenses.base import Coder, Moment, Sizes, State
from harness.defenses.blocks import SQUARES, borders, by_segment
from harness.defenses.levels import round_levels
from harness.wire.coded import Coded
from harness.wire.levels import Levels

WIDTHS = {1: 2, 7: 4, 127: 8}
"""Largest level -> bits of an element."""


@dataclasses.dataclass(frozen=True, slots=True)
class Qsgd(Coder):
    """QSGD with so many levels on each side of 0."""

    most: int
    bucket: int = 512

    def __post_init__(self) -> None:
        if self.most not in WIDTHS:
            raise ValueError(f"wanted {', '.join(map(str, WIDTHS))} levels, what 2, 4 and 8 bits hold, got {self.most}")
        if type(self.bucket) is not int or self.bucket < 1:
            raise ValueError(f"bucket: wanted a whole number of 1 or more, got {self.bucket}")

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        values, cut = gradient.numpy(), borders(sizes, self.bucket)
        squares = by_segment(SQUARES, cut, values.__getitem__)
        units = (np.sqrt(squares) / self.most).astype(np.float32)
        levels = round_levels(values, cut, units, self.most, moment.draws())
        return Levels(levels, WIDTHS[self.most], "stochastic", cut, units), state
