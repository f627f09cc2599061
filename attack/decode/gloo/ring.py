"""Gloo's ring all-reduce as geometry: which bytes of the vector each message of each link carries, and as which sum.

Rank r sends to r-1 and receives from r+1. The vector is cut into segments, as many for each rank; those of one rank are
a chunk. While reducing, chunk c is sent by c-1 as its own values, then by c-2 as the sum of two, and so on; while
gathering, the whole sum by c, then by c-1, and so on. Knows lengths and places, no values.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence, Set
from itertools import accumulate
from typing import Final, NamedTuple

from attack.decode.gloo.head import HEAD_BYTES

MAX_SEGMENT_BYTES: Final = 1 << 20
"""gloo/allreduce.h"""


class Part(NamedTuple):
    """What one message carries."""

    segment: int
    hop: int
    """How many ranks had added to the sum before its sender did; world - 1: the sum is whole."""


class Ring(NamedTuple):
    """An all-reduce of `total` bytes over `world` ranks, elements of `element` bytes."""

    total: int
    world: int
    element: int

    @property
    def num_segments(self) -> int:
        """At least two for each rank, so that one is on its way while another is added to."""
        largest = MAX_SEGMENT_BYTES // self.element * self.element
        return _round_up(max(-(-self.total // largest), 2 * self.world), self.world)

    @property
    def segments_per_rank(self) -> int:
        return self.num_segments // self.world

    @property
    def segment_bytes(self) -> int:
        """Of all but the last that is not empty."""
        return _round_up(-(-self.total // self.num_segments), self.element)

    def place(self, segment: int) -> tuple[int, int]:
        """First byte of a segment and the one behind its last; both the same where it is empty."""
        size = self.segment_bytes
        return min(segment * size, self.total), min((segment + 1) * size, self.total)

    def fits(self, lengths: Set[int]) -> bool:
        """Whether some of its messages, the longest among them, have these lengths."""
        ends = (self.place(segment) for segment in range(self.num_segments))
        return self.segment_bytes in lengths and lengths <= {stop - start for start, stop in ends}

    def author(self, segment: int, hop: int) -> int:
        """The rank whose own values were added last in a sum."""
        return (segment // self.segments_per_rank - 1 - hop) % self.world

    def sent_by(self, rank: int) -> tuple[tuple[Part, ...], tuple[int, ...]]:
        """What a rank sends, in order, and the bytes of each: empty segments are not sent."""
        return _sent_by(self, rank)


@functools.lru_cache(maxsize=256)
def _sent_by(ring: Ring, rank: int) -> tuple[tuple[Part, ...], tuple[int, ...]]:
    per, count = ring.segments_per_rank, ring.num_segments
    steps = range(count - per)
    parts = [Part(((rank + 1) * per + step) % count, step // per) for step in steps]
    parts += [Part((rank * per + step) % count, ring.world - 1) for step in steps]
    lengths = [ring.place(part.segment)[1] - ring.place(part.segment)[0] for part in parts]
    sent = [(part, length) for part, length in zip(parts, lengths, strict=True) if length]
    return tuple(part for part, _ in sent), tuple(length for _, length in sent)


@functools.lru_cache(maxsize=256)
def totals(lengths: tuple[int, ...], *, world: int, rank: int, element: int) -> frozenset[int]:
    """Every total for which this rank sends exactly messages of these lengths.

    Each segment is sent at least once by each rank, and all are equally long but the last: so the total is a multiple
    of the longest length, plus one of the lengths.
    """
    if not lengths:
        return frozenset()
    size, count = max(lengths), len(lengths)
    found = set()
    for whole in range(max(0, count // 2 - 1), count + 1):
        for last in set(lengths):
            ring = Ring(whole * size + last, world, element)
            if last % element == 0 and ring.segment_bytes == size and _sent_by(ring, rank)[1] == lengths:
                found.add(ring.total)
    return frozenset(found)


def align(
    groups: Sequence[Sequence[int]],
    capacities: Sequence[tuple[float, float]],
    expected: Sequence[int],
    *,
    ended: bool,
) -> list[int | None]:
    """Which messages of a known sequence were seen, where some may be missing between the groups that were.

    Args:
        groups: lengths of messages seen one after the other, with nothing missing within a group.
        capacities: before each group, of these messages' bytes, how many were missed at least and at most.
        expected: lengths of all messages, in order; each takes `HEAD_BYTES` more.
        ended: whether nothing more can come behind the last group.

    Returns:
        For each group the index of its first message, or None where the lengths and capacities leave a choice.
    """
    count, cost = len(expected), costs(tuple(expected))
    reach: list[set[int]] = []  # of each group, where it may begin, by what comes before it
    ends = {0}
    for group, (least, most) in zip(groups, capacities, strict=True):
        size = len(group)
        starts = {
            start
            for end in ends
            for start in range(
                bisect.bisect_left(cost, cost[end] + least, lo=end),
                bisect.bisect_right(cost, cost[end] + most, hi=max(count - size + 1, 0)),
            )
            if tuple(expected[start : start + size]) == tuple(group)
        }
        reach.append(starts)
        ends = {start + size for start in starts}
    allowed = {count} if ended else set(range(count + 1))
    answer: list[int | None] = []
    for index in range(len(groups) - 1, -1, -1):  # and by what comes behind it
        starts = {start for start in reach[index] if start + len(groups[index]) in allowed}
        answer.append(next(iter(starts)) if len(starts) == 1 else None)
        least, most = capacities[index]
        allowed = {
            end
            for end in range(count + 1)
            for start in starts
            if end <= start and least <= cost[start] - cost[end] <= most
        }
    return answer[::-1]


@functools.lru_cache(maxsize=256)
def costs(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes of a stream that so many first messages of a sequence take."""
    return tuple(accumulate((length + HEAD_BYTES for length in lengths), initial=0))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
