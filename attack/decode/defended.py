"""What the code of a defended gradient says of the gradient itself, beyond the payload: the defense's public side.

    prune      no element that was not sent is larger than the smallest that was, in its tensor
    topk, dgc  what was sent is this step's gradient where nothing of it had been kept: at a job's first step, and where
               it had been sent at the step before as well; elsewhere it holds what several steps left
    sign       the level is the mean magnitude of gradient and residual; nothing is limited

Knows the names of defenses, masks and tensors; nothing of messages or of attacks. Where something of a vector was not
seen, or two ranks' words differ, nothing is concluded.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from attack.decode.assembly import RankGradient
from attack.decode.vector import Mask
from attack.defense import PublicDefense
from attack.observation import Known, Shapes


class PublicSide:
    """Of all ranks of one job, step by step."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[int, Mask]] = {}
        """By rank: the last step that was seen whole, and which elements were sent then."""

    def limit(self, rank: int, step: int, gradient: RankGradient, shapes: Shapes | None) -> RankGradient:
        """The gradient with the bounds that its defense implies. Ask for every step, in order."""
        if gradient.defense is None or gradient.sent is None:
            return gradient
        if gradient.bound is None:  # no code was seen whole
            self._sent.pop(rank, None)
            return gradient
        defense = PublicDefense.read(gradient.defense)
        whole = bool((gradient.known != Known.UNKNOWN).all())
        if defense.keeps:
            before = self._sent.pop(rank, None)
            if whole:
                self._sent[rank] = step, gradient.sent
            if step == 0:
                return gradient
            fresh = before[1] if before is not None and before[0] == step - 1 else np.zeros_like(gradient.sent)
            return _forget_sums(gradient, fresh)
        if defense.prunes and shapes is not None and whole:
            return _limit_pruned(gradient, shapes)
        return gradient


def _forget_sums(gradient: RankGradient, fresh: Mask) -> RankGradient:
    """Only what was sent the step before as well is this step's own."""
    assert gradient.bound is not None and gradient.sent is not None
    sums = gradient.sent & ~fresh
    known, bound = gradient.known.copy(), gradient.bound.copy()
    bound[sums] = np.inf
    known[sums & (known != Known.UNKNOWN)] = Known.CODED
    return dataclasses.replace(gradient, known=known, bound=bound)


def _limit_pruned(gradient: RankGradient, shapes: Shapes) -> RankGradient:
    assert gradient.bound is not None and gradient.sent is not None
    bound, at = gradient.bound.copy(), 0
    for shape in shapes:
        part = slice(at, at + math.prod(shape))
        at = part.stop
        sent = gradient.sent[part]
        if sent.any():
            bound[part][~sent] = np.abs(gradient.values[part][sent]).min()
    return dataclasses.replace(gradient, bound=bound)
