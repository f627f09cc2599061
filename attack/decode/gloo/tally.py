"""What a group of ranks said to each other, counted: how often each collective, in how many messages and bytes.

What torch calls by other names is on Gloo's wire one of these, and is counted as that: all_gather_into_tensor and
all_gather_object are all-gathers, all_to_all_single is an all-to-all; reduce_scatter sums whole tensors in all-reduces,
of which each rank then keeps its share; all_reduce of a sparse tensor is three all-gathers of one tag;
monitored_barrier is messages between two ranks, with tags of which no collective has any message; and one of no
elements is none at all (ProcessGroupGloo.cpp of torch 2.13, and its traffic). Knows no values, no ranks and no steps.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Final

from attack.decode.gloo.head import Kind, Slot

_REMEMBERED: Final = 1 << 16
"""Collectives that are told apart: messages of one that lie further apart count it twice."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Count:
    """Of one kind."""

    count: int = 0
    """Collectives; between two ranks, messages."""
    messages: int = 0
    bytes: int = 0
    """Of payload, as often as it was sent."""


class Tally:
    """Counts payloads as they come."""

    def __init__(self) -> None:
        self.counts: dict[Kind, Count] = defaultdict(Count)
        self._seen: set[tuple[Kind, int]] = set()

    def add(self, slot: Slot, size: int) -> None:
        """A message with so many bytes of payload."""
        entry = self.counts[slot.kind]
        entry.messages += 1
        entry.bytes += size
        if slot.kind is Kind.POINT_TO_POINT:
            entry.count += 1
        elif (slot.kind, slot.tag) not in self._seen:
            entry.count += 1
            self._seen.add((slot.kind, slot.tag))
            if len(self._seen) > 2 * _REMEMBERED:
                self._seen = {one for one in self._seen if one[1] > slot.tag - _REMEMBERED}
