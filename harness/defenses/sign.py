"""One bit for each element, its sign, and each tensor's mean magnitude; what that loses is added to the next gradient.

    p = gradient + residual,   sent = mean |p| * sign(p),   residual = p - sent

Public side: the sign of p, and its mean magnitude in each tensor. Over steps, sent + residual = sum of the gradients.

References: Seide et al. 2014, 1-bit stochastic gradient descent (Interspeech); Karimireddy et al. 2019, Error Feedback
Fixes SignSGD, arXiv 1901.09847, algorithm 1, which scales so.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from harness.defenses.base import Coder, Moment, Sizes, State, nothing_yet
from harness.defenses.blocks import BLOCK, TOTAL, blocks, borders, by_segment, spread, with_sign
from harness.wire.coded import Coded, Float32
from harness.wire.levels import Levels


@dataclasses.dataclass(frozen=True, slots=True)
class Sign(Coder):
    """Signs with error feedback."""

    def begin(self, sizes: Sizes) -> State:
        return {"residual": nothing_yet(sizes)}

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        given, kept, cut = gradient.numpy(), state["residual"].numpy(), borders(sizes)

        def add(elements: slice) -> Float32:
            kept[elements] += given[elements]
            return kept[elements]

        units = (by_segment(TOTAL, cut, add) / np.diff(cut)).astype(np.float32)
        levels, scratch = np.empty(kept.size, np.int8), np.empty(BLOCK, np.float32)
        for block in blocks(cut):
            values, unit = kept[block.elements], units[block.segments]
            signs = levels[block.elements]
            np.greater_equal(values.view(np.int32), 0, out=signs.view(np.bool_))
            signs += signs
            signs -= np.int8(1)
            values -= with_sign(spread(unit, block), values, out=scratch[: values.size])
        return Levels(levels, 1, "sign", cut, units), state
