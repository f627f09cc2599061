"""-1, 0 or 1 in units of each tensor's largest magnitude, by chance, unbiased: two bits for each element.

With `clip=C`, a tensor's elements are first limited to C of its standard deviations (2.5 in the paper): smaller units,
and some bias.

Public side: the units. The gradient lies within one unit of what was sent; where it is 0, it may be anything up to one.

Reference: Wen et al. 2017, TernGrad, arXiv 1705.07878, sections 3.1 and 3.3. There the workers share one scale, the
largest of all; here each rank has its own.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from torch import Tensor

from harness.defenses.base import Coder, Moment, Sizes, State
from harness.defenses.blocks import LARGEST, borders, by_segment
from harness.defenses.levels import round_levels
from harness.wire.coded import Coded
from harness.wire.levels import Levels


@dataclasses.dataclass(frozen=True, slots=True)
class Ternary(Coder):
    """TernGrad."""

    clip: float | None = None
    """In standard deviations; None: no clipping."""

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: wanted more than 0 standard deviations, e.g. 2.5, got {self.clip}")

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        values, cut = gradient.numpy(), borders(sizes)
        units = by_segment(LARGEST, cut, values.__getitem__).astype(np.float32)
        if self.clip is not None:
            deviations = [values[begin:end].std() for begin, end in itertools.pairwise(cut)]
            units = np.minimum(units, np.float32(self.clip) * np.array(deviations, np.float32))
        levels = round_levels(values, cut, units, 1, moment.draws())
        rounding = "stochastic" if self.clip is None else "clipped"
        return Levels(levels, 2, rounding, cut, units), state
