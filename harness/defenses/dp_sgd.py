"""DP-SGD: the gradient of each example is clipped, their sum gets normal noise, and is divided by the batch's size.

    dp-sgd:noise=S,clip=C        sent = (sum of g * min(1, C / ||g||) + N(0, (S C)^2)) / batch size
    delta=D                      for which epsilon is told; changes nothing that is sent

S is the noise multiplier: the noise's standard deviation in units of what one example can change of the sum. Each rank
adds its own noise, to its own sum: what only one rank adds leaves the others' bare on the wire. The mean over W ranks
has so more noise than one rank's: sqrt(W) times, in the same units. `harness.privacy` tells what that is worth.

Public side: S, C and the law.

Reference: Abadi et al. 2016, Deep Learning with Differential Privacy, arXiv 1607.00133, algorithm 1. Differs: batches
are of one size, from a shuffled set, where the paper draws each example anew at each step. The noise is of floats,
which a careful observer can tell from real numbers (Mironov 2012, doi 10.1145/2382196.2382264).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from harness.defenses.base import ExampleStep, Moment
from harness.defenses.clip import check_norm, shrink
from harness.defenses.noise import add_noise, check_std, gaussian


@dataclasses.dataclass(frozen=True, slots=True)
class DPSGD(ExampleStep):
    """Clipping of each example, and noise."""

    noise: float
    """Noise multiplier."""
    clip: float
    delta: float = 1e-5

    def __post_init__(self) -> None:
        check_std(self.noise)
        check_norm(self.clip)
        if not 0 < self.delta < 1:
            raise ValueError(f"delta: wanted more than 0 and below 1, e.g. 1e-5, got {self.delta}")

    def __call__(self, examples: Tensor, moment: Moment) -> Tensor:
        norms = torch.linalg.vector_norm(examples, dim=1)
        total = shrink(norms, self.clip) @ examples
        return add_noise(total, gaussian, self.noise * self.clip, moment) / len(examples)
