"""The messages of one all-reduce -> each rank's own vector, with how each element is known, and the whole sum.

Takes the links of the ring and the total that is proven; refuses to guess a message's place. Knows nothing of what the
vector means to the job.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from attack.decode.gloo.formats import Float, numbers
from attack.decode.gloo.framing import Message
from attack.decode.gloo.head import Kind
from attack.decode.gloo.inversion import Mask, Rule, own_part
from attack.decode.gloo.network import Link
from attack.decode.gloo.placement import Step, place
from attack.decode.gloo.ring import Part, Ring, totals
from attack.decode.notes import Notes
from attack.observation import Known


@dataclasses.dataclass(kw_only=True, slots=True)
class Vector:
    """One rank's part of a sum."""

    values: Float
    known: Mask
    bound: Float

    @classmethod
    def unknown(cls, size: int, dtype: npt.DTypeLike) -> Vector:
        """Nothing is known of it."""
        return cls(values=np.zeros(size, dtype), known=np.zeros(size, np.uint8), bound=np.zeros(size, dtype))


@dataclasses.dataclass(kw_only=True, slots=True)
class Gradients:
    """What a step's all-reduces give away."""

    ranks: list[Vector]
    total: Float
    """The sum, as every rank got it."""
    total_known: npt.NDArray[np.bool_]

    @classmethod
    def unknown(cls, size: int, *, world: int, dtype: npt.DTypeLike) -> Gradients:
        """Nothing is known yet."""
        ranks = [Vector.unknown(size, dtype) for _ in range(world)]
        return cls(ranks=ranks, total=np.zeros(size, dtype), total_known=np.zeros(size, np.bool_))

    def arrays(self) -> Iterator[npt.NDArray[Any]]:
        """All that it holds of each element."""
        for vector in self.ranks:
            yield from (vector.values, vector.known, vector.bound)
        yield from (self.total, self.total_known)


_Sum: TypeAlias = tuple[Float, npt.NDArray[np.bool_] | None]
"""A partial sum, and where it is known; None: everywhere."""


class _Pieces:
    """Where the elements of a bucket belong."""

    def __init__(self, bucket: Sequence[slice]) -> None:
        self._bucket = bucket
        self._ends = list(accumulate(part.stop - part.start for part in bucket))

    def of(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """For elements of the bucket, part by part: which of them, and where they belong."""
        at = start
        for index in range(bisect.bisect_right(self._ends, start), len(self._bucket)):
            if at == stop:
                return
            end = min(stop, self._ends[index])
            target = self._bucket[index].stop - self._ends[index]
            yield slice(at - start, end - start), slice(at + target, end + target)
            at = end


class _Sums:
    """The partial sums of one vector, from all messages that carried them."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._copies: dict[Part, list[_Sum]] = defaultdict(list)
        self.disputed = 0

    def add(self, part: Part, message: Message) -> None:
        values = numbers(memoryview(message.payload), self.rule.format)
        known = None
        if message.holes:
            known = np.ones(len(values), np.bool_)
            size = self.rule.format.bytes
            for start, stop in message.holes:
                known[start // size : -(-stop // size)] = False
        self._copies[part].append((values, known))

    def get(self, part: Part) -> _Sum | None:
        """A sum and where it is known (None: everywhere); copies that differ are not believed."""
        if not (copies := self._copies.get(part)):
            return None
        (first, known), *others = copies
        for values, more in others:
            bits = f"u{first.itemsize}"
            same = first.view(bits) == values.view(bits)
            if known is None and more is None and same.all():
                continue
            known = np.ones(len(first), np.bool_) if known is None else known
            more = np.ones(len(first), np.bool_) if more is None else more
            disputed = known & more & ~same
            self.disputed += int(disputed.sum())
            first, known = np.where(known, first, values), (known | more) & ~disputed
        return first, known


def take_apart(
    ring: Ring,
    links: dict[int, Link],
    *,
    tag: int,
    step: Step,
    rule: Rule,
    bucket: Sequence[slice],
    into: Gradients,
    notes: Notes,
) -> None:
    """Inverts one all-reduce.

    Args:
        ring: its geometry; the total is proven.
        links: by sender.
        tag: its own.
        step: what was under way beside it.
        rule: what the ranks did before adding.
        bucket: where its elements belong, part by part.
        into: gets what is known.
        notes: gets what was not believed.
    """
    sums = _Sums(rule)
    for rank, link in links.items():
        placed, link.rest = place(step, tag, rank, link, notes)
        for part, message in placed:
            sums.add(part, message)
    pieces = _Pieces(bucket)
    for segment in range(ring.num_segments):
        start, stop = (at // ring.element for at in ring.place(segment))
        if start == stop:
            continue
        before = None
        for hop in range(ring.world):
            after = sums.get(Part(segment, hop))
            if after is not None and (hop == 0 or before is not None):
                vector = into.ranks[ring.author(segment, hop)]
                for inside, where in pieces.of(start, stop):
                    _add_own(vector, where, _cut(after, inside), _cut(before, inside), rule)
            before = after
        if before is not None:
            for inside, where in pieces.of(start, stop):
                values, known = before[0][inside], before[1]
                into.total[where], into.total_known[where] = values, True if known is None else known[inside]
    if sums.disputed:
        notes.add(f"collective {tag}: {sums.disputed} elements differ between two links: left unknown")


def partial_sums(ring: Ring, links: dict[int, Link], *, tag: int, last: int) -> Iterator[tuple[memoryview, memoryview]]:
    """Of the same elements the payloads before a rank added its own, and after.

    Args:
        ring: the geometry of the all-reduce; its total is proven.
        links: by sender.
        tag: its own.
        last: of the last collective that may be under way beside it.
    """
    seen: dict[Part, bytearray] = {}
    for rank, link in links.items():
        for part, message in place(Step({tag: ring}, last, float("inf")), tag, rank, link, Notes())[0]:
            if not message.holes:
                seen.setdefault(part, message.payload)
    for part, after in seen.items():
        if (before := seen.get(Part(part.segment, part.hop - 1))) is not None:
            yield memoryview(before), memoryview(after)


def solve_total(links: dict[int, Link], tag: int, *, world: int, element: int) -> int | None:
    """The total of an all-reduce, where every link without a loss proves the same one; None where they do not."""
    answer: set[int] | None = None
    for rank, link in links.items():
        if link.floor == len(link.losses) and (seen := link.slots.get((Kind.ALLREDUCE, tag))):
            lengths = tuple(len(one.message.payload) for one in seen)
            found = set(totals(lengths, world=world, rank=rank, element=element))
            answer = found if answer is None else answer & found
    return answer.pop() if answer and len(answer) == 1 else None


def is_whole(ring: Ring, links: dict[int, Link], tag: int) -> bool:
    """Whether as many messages of an all-reduce were seen as there are, on all links."""
    return len(links) == ring.world and all(
        len(link.slots.get((Kind.ALLREDUCE, tag), ())) == len(ring.sent_by(rank)[1]) for rank, link in links.items()
    )


def agrees(ring: Ring, links: dict[int, Link], tag: int) -> bool:
    """Whether no link has shown a message that this all-reduce has not; in order, where the link lost nothing."""
    for rank, link in links.items():
        lengths = tuple(len(seen.message.payload) for seen in link.slots.get((Kind.ALLREDUCE, tag), ()))
        expected = ring.sent_by(rank)[1]
        if not set(lengths) <= set(expected):
            return False
        if link.floor == len(link.losses) and lengths != expected[: len(lengths)]:
            return False
    return True


def _cut(seen: _Sum | None, inside: slice) -> _Sum | None:
    return None if seen is None else (seen[0][inside], None if seen[1] is None else seen[1][inside])


def _add_own(vector: Vector, where: slice, after: _Sum | None, before: _Sum | None, rule: Rule) -> None:
    assert after is not None
    value, known, bound = vector.values[where], vector.known[where], vector.bound[where]
    own_part(after[0], None if before is None else before[0], rule, value, known, bound)
    for seen in (after[1], None if before is None else before[1]):
        if seen is not None:
            value[~seen], known[~seen], bound[~seen] = 0, Known.UNKNOWN, 0
