"""Floats of two bytes: IEEE binary16, or the upper half of a float32 (bfloat16), rounded to nearest, ties to even.

Public side: the spacing of the numbers. The gradient lies within half a unit in the last place of what was sent.

Reference: Zhu, Liu, Han 2019, Deep Leakage from Gradients, arXiv 1906.08935, section 5.1.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from harness.defenses.base import Coder, Moment, Sizes, State
from harness.wire.coded import Coded
from harness.wire.dense import Half

FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True)
class Short(Coder):
    """A rounded float for each element. What is beyond fp16's 65504 is sent as infinite."""

    codec: str
    """`fp16` or `bf16`."""

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        bits = np.empty(gradient.numel(), np.uint16)
        torch.from_numpy(bits.view(np.int16)).view(FORMATS[self.codec]).copy_(gradient)
        return Half(self.codec, bits), state
