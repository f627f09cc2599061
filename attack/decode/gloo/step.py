"""What is known of one step of a job: the word between whoever reads it off the collectives and whoever tells of it."""

from __future__ import annotations

import dataclasses

from attack.decode.gloo.allreduce import Gradients
from attack.decode.gloo.formats import Float
from attack.observation import Factor


@dataclasses.dataclass(kw_only=True, slots=True)
class Step:
    """What is known of one step."""

    step: int
    seen: Gradients
    buffers: Float | None
    """Floating-point buffers that the step began with; None where there are none, or not seen whole."""
    first_tag: int = 0
    small: bool = False
    """Its first bucket is as small as what a script sums: only those behind it show that it was one."""
    factors: list[tuple[Factor, ...]] | None = None
    """By rank, what was sent in place of gradients."""
    defenses: list[str | None] | None = None
    """By rank, the chain of defenses, where gradients were gathered in its code; the total is then their mean."""
    masked: bool = False
    """Of no rank anything is known: the one vector is that of all ranks' mean."""
