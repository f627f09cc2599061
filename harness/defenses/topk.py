"""Top-k and deep gradient compression: of each tensor only the largest elements are sent, the others kept for later.

    u = momentum * u + clip(gradient),   v = v + u,   sent = the largest of v;   where sent, v = u = 0

    topk:0.99                  99 % are not sent at each step; plain error feedback
    topk-dgc:0.99              the same with momentum correction, 0.9 unless said otherwise
    momentum=M clip=N warmup=S the factor; a largest norm of the gradient; steps until the share is reached

Momentum stands here in place of the optimizer's, which must have none. In the warm-up the share of what is sent falls
exponentially from one quarter, as in the paper, by steps instead of epochs.

Public side: what was sent, of which the eavesdropper knows the places. An element that was sent at the step before as
well is exactly this step's gradient (but for clipping): nothing of it had been kept. Others hold what several steps
left. So at the first step all that is sent is the gradient's.

References: Lin et al. 2018, Deep Gradient Compression, arXiv 1712.01887, sections 3.1 to 3.3; Aji and Heafield 2017,
Sparse communication, arXiv 1704.05021. Differs: the largest are sent exactly, where the paper sends what is above a
sampled threshold, so that a message's length tells nothing of the gradient (`largest` samples, too, and then looks);
and the clipping threshold is as given, not divided by the square root of the number of ranks.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from harness.defenses.base import Coder, Moment, Sizes, State, nothing_yet
from harness.defenses.clip import check_norm, shrink
from harness.defenses.largest import Numbers, largest
from harness.defenses.prune import check_share
from harness.wire.coded import Coded
from harness.wire.sparse import Sparse

FIRST_SENT = 0.25
"""Share of the elements sent at the first step of a warm-up."""


@dataclasses.dataclass(frozen=True, slots=True)
class TopK(Coder):
    """The largest elements, with all that they were not sent for."""

    share: float
    """Not sent."""
    momentum: float = 0.0
    clip: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: wanted 0 or more and below 1, got {self.momentum}")
        if self.clip is not None:
            check_norm(self.clip)
        if type(self.warmup) is not int or self.warmup < 0:
            raise ValueError(f"warmup: wanted a whole number of steps, got {self.warmup}")

    def begin(self, sizes: Sizes) -> State:
        names = ("residual", "velocity") if self.momentum else ("residual",)
        return {name: nothing_yet(sizes) for name in names}

    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        if self.clip is not None:
            gradient = gradient * shrink(torch.linalg.vector_norm(gradient), self.clip)
        kept = state["residual"].numpy()
        velocity = state["velocity"].numpy() if self.momentum else None
        numbers = Numbers(kept, gradient.numpy(), velocity, self.momentum)
        share = 1 - self.share_at(moment.step)
        counts = [min(size, math.ceil(size * share - 1e-9)) for size in sizes]
        sent = []
        for places, found in largest(numbers, sizes, counts):
            sent.append((places, found))
            # At once, while the tensor is in the cache.
            for remembered in state.values():
                remembered.numpy()[places] = 0
        return Sparse.of(kept.size, sent), state

    def share_at(self, step: int) -> float:
        """Not sent at this step."""
        if step >= self.warmup or 1 - self.share >= FIRST_SENT:
            return self.share
        return 1 - FIRST_SENT * ((1 - self.share) / FIRST_SENT) ** (step / self.warmup)
