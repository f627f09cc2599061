"""One bit for each element, its sign, and each tensor's mean magnitude; what that loses is added to the next gradient.

    p = gradient + residual,   sent = mean |p| * sign(p),   residual = p - sent

Public side: the sign of p, and its mean magnitude in each tensor. Over steps, sent + residual = sum of the gradients.

References: Seide et al. 2014, 1-bit stochastic gradient descent (Interspeech); Karimireddy et al. 2019, Error Feedback
Fixes SignSGD, arXiv 1901.09847, algorithm 1, which scales so.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from harness.defenses.base import Coder, Moment, Sizes, State
from harness.defenses.levels import as_finite, borders, by_segment
from harness.wire.coded import Coded
from harness.wire.levels import Levels


@dataclasses.dataclass(frozen=True, slots=True)
class Sign(Coder):
    """Signs with error feedback."""

    def begin(self, sizes: Sizes) -> State:
        return {"residual": torch.zeros(sum(sizes))}

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        values, cut = as_finite(gradient + state["residual"], "sign"), borders(sizes)
        sums = by_segment(np.add, np.abs(values), cut)
        units = (sums / np.diff(cut)).astype(np.float32)
        levels = np.where(values >= 0, np.int8(1), np.int8(-1))
        sent = Levels(levels, 1, "sign", cut, units)
        return sent, {"residual": torch.from_numpy(values - sent.values())}
