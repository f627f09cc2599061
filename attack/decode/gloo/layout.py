"""Which parameters DDP sums together in the first step, and in which number format: found by the sizes of its sums.

Takes the network and the plan, returns buckets; an empty list where the messages fit none, or not yet. Knows no values,
but for the number format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from itertools import pairwise
from typing import NamedTuple

from attack.decode.gloo.allreduce import agrees, partial_sums, solve_total
from attack.decode.gloo.formats import FLOAT16, FLOAT32, WIDTHS, Format, tell_format
from attack.decode.gloo.head import Kind
from attack.decode.gloo.network import Network
from attack.decode.gloo.parameters import joined, parse_layout
from attack.decode.gloo.ring import Ring
from attack.decode.gloo.setup import Plan

MAX_FORMATS = 4
"""Of one model's parameters."""
FLAT_BUCKET_BYTES = 25 << 20
"""Of the project's own all-reduce."""


class Bucket(NamedTuple):
    """What is summed together."""

    parts: tuple[slice, ...]
    """Of the flat gradient, in the bucket's own order."""
    format: Format

    @property
    def elements(self) -> int:
        """Of all parts."""
        return sum(part.stop - part.start for part in self.parts)

    def ring(self, world: int) -> Ring:
        """How it is summed."""
        return Ring(self.format.bytes * self.elements, world, self.format.bytes)


def is_layout(sizes: Set[int], plan: Plan) -> bool:
    """Whether a broadcast of messages of these sizes is the first part of a layout: no buffers have that size."""
    buffers = {len(state.buffers) for state in plan.states}
    return sizes == {4 * (plan.count + 1)} and not buffers & sizes


class Finder:
    """Looks for the first step of one job."""

    def __init__(self, network: Network, plan: Plan, closed: Callable[[int], bool]) -> None:
        """`closed` says whether all of a collective was seen that is to come."""
        self._network, self._plan, self._closed = network, plan, closed
        self._whole = tuple(slice(*pair) for pair in pairwise(plan.offsets))
        self._world = network.world or 0

    def model(self, tag: int, *, next_one: bool) -> list[Bucket]:
        """DDP's, if its first bucket is at `tag`: all parameters in order; else from the last parameter to the first.

        Only in the first case the final layout is broadcast behind the first step, and directly behind it where the
        script says nothing between: then it is not necessary that the first step was seen whole.
        """
        if next_one and is_layout(self._network.sizes(Kind.BROADCAST, tag + 1), self._plan):
            ring = self._single(tag)
            fmt = self._format(ring, tag) if ring is not None else None
            return [Bucket(self._whole, fmt)] if fmt is not None else []
        return next((found for width in WIDTHS if (found := self._backwards(tag, width))), [])

    def mixed(self, tag: int) -> list[Bucket]:
        """DDP's, of a model with parameters of several formats: a bucket of each, that of the first parameter last.

        Which parameter has which format, only the next step tells: in the layout that is broadcast behind the first
        one, no bucket has two.
        """
        for formats in range(2, MAX_FORMATS + 1):
            behind = tag + formats
            if not is_layout(self._network.sizes(Kind.BROADCAST, behind), self._plan):
                continue
            indices, sizes = (joined(self._network.copies(Kind.BROADCAST, at)) for at in (behind, behind + 1))
            layout = parse_layout(indices, sizes, self._plan.count) if indices is not None else None
            at = behind + 2
            while self._network.kinds(at) == {Kind.BROADCAST}:
                at += 1
            of_format: dict[Format, list[slice]] = {}
            for index, fmt in sorted(self._formats(layout or (), at).items()):
                of_format.setdefault(fmt, []).append(self._whole[index])
            found = [Bucket(tuple(parts), fmt) for fmt, parts in reversed(of_format.items())]
            totals = [self._total(tag + at, bucket.format.bytes) for at, bucket in enumerate(found)]
            if len(found) == formats and totals == [bucket.ring(self._world).total for bucket in found]:
                return found
        return []

    def flat(self, tag: int) -> list[Bucket]:
        """The project's own: buckets of 25 MiB and a smaller one, of float32 or of a float of two bytes.

        The next step must begin as this one did; where there is none, all of the state must be parameters. The partial
        sums must not contradict the format; one of two bytes they must show.
        """
        ways = [way for width in (FLOAT32.bytes, FLOAT16.bytes) if (way := self._flat(tag, width))]
        return ways[0] if len(ways) == 1 else []

    def _flat(self, tag: int, width: int) -> list[Bucket]:
        network, state, start = self._network, self._plan.weights, 0
        first = tag
        parts: list[slice] = []
        totals: list[int] = []
        while not totals or totals[-1] == FLAT_BUCKET_BYTES:
            total = self._total(tag, width)
            if totals and state is not None and start == state.size:
                break
            if total is None or total > FLAT_BUCKET_BYTES or not self._closed(tag):
                return []
            totals.append(total)
            parts.append(slice(start, start + total // width))
            start, tag = start + total // width, tag + 1
        following = self._total(tag, width)
        if state is None or start > state.size:
            return []
        only_step = following is None and network.newest < tag and start == state.size
        if following != totals[0] and not only_step:
            return []
        fmt = self._format(Ring(totals[0], self._world, width), first)
        return [] if fmt is None else [Bucket((part,), fmt) for part in parts]

    def _single(self, tag: int) -> Ring | None:
        """The ring of one sum over all parameters; where nothing was seen of it, as wide as the state certainly is."""
        links, sizes = self._network.ring(), self._network.sizes(Kind.ALLREDUCE, tag)
        rings = [Ring(width * self._plan.offsets[-1], self._world, width) for width in WIDTHS]
        if sizes:
            fitting = [ring for ring in rings if ring.fits(sizes) and agrees(ring, links, tag)]
        else:
            certain = [state.width for state in self._plan.states if state.confirmed]
            fitting = [ring for ring in rings if ring.element in certain[:1]]
        return fitting[0] if len(fitting) == 1 else None

    def _backwards(self, tag: int, width: int) -> list[Bucket]:
        offsets, links = self._plan.offsets, self._network.ring()
        starts, stop, layout = set(offsets[:-1]), offsets[-1], []
        while stop:
            total = self._total(tag, width)
            if total is None or (start := stop - total // width) not in starts or not self._closed(tag):
                return []
            ring = Ring(total, self._world, width)
            if not agrees(ring, links, tag) or (fmt := self._format(ring, tag)) is None:
                return []
            layout.append(Bucket(tuple(part for part in self._whole if start <= part.start < stop), fmt))
            stop, tag = start, tag + 1
        return layout

    def _formats(self, layout: Sequence[Sequence[int]], tag: int) -> dict[int, Format]:
        """Of each parameter, by the sums of a step that begins at `tag`; empty where one is not certain."""
        found: dict[int, Format] = {}
        for at, indices in enumerate(layout, tag):
            elements = sum(self._whole[index].stop - self._whole[index].start for index in indices)
            rings = [Ring(width * elements, self._world, width) for width in WIDTHS]
            rings = [ring for ring in rings if self._closed(at) and self._total(at, ring.element) == ring.total]
            fmt = self._format(rings[0], at) if len(rings) == 1 else None
            if fmt is None:
                return {}
            found |= dict.fromkeys(indices, fmt)
        return found

    def _total(self, tag: int, width: int) -> int | None:
        return solve_total(self._network.ring(), tag, world=self._world, element=width)

    def _format(self, ring: Ring, tag: int) -> Format | None:
        """Of one all-reduce; sums of the same size that come later are asked too."""
        links, last = self._network.ring(), self._network.newest

        def alike() -> Iterator[tuple[memoryview, memoryview]]:
            for other in range(tag, last + 1):
                if other == tag or self._total(other, ring.element) == ring.total:
                    yield from partial_sums(ring, links, tag=other, last=other + self._plan.count)

        return tell_format(ring.element, alike())
