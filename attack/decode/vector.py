"""Chunks -> one flat float32 vector with a mask. Where two chunks contradict each other, neither is believed.

Keeps what was seen, as it was seen, until it is asked for the vector: so a header that lies about the vector's length
costs nothing. Knows places and values; nothing of ranks, steps or who may say what.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from attack.capture.streams import Flow
from attack.decode.averages import Float32, same
from attack.decode.frames import Holes
from harness.wire.coded import Decoded

Mask: TypeAlias = npt.NDArray[np.bool_]


class Place(NamedTuple):
    """Elements `at` to `stop` of a vector, `stop` not included."""

    at: int
    stop: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.stop - self.at

    @property
    def where(self) -> slice:
        """To index a vector with."""
        return slice(self.at, self.stop)

    def __str__(self) -> str:
        return f"elements {self.at} to {self.stop}"


class Origin(NamedTuple):
    """Where a message lies in its stream."""

    flow: Flow
    begin: int
    payload: int
    """Offset of the payload's first byte; before it is the header."""
    end: int


class Piece:
    """What was seen of one place, from one message or from several that agree."""

    def __init__(
        self, place: Place, said: Decoded, holes: Holes, tag: Hashable, origin: Origin, *, codec: str = "dense"
    ) -> None:
        """`tag` is what two messages about the same place must agree on beside the values."""
        self.place, self.tag, self.origins = place, tag, [origin]
        self.values: Float32 = said.values
        self.said = said
        self.codec = codec
        self.known: Mask | None = None
        """None where every element is known."""
        for start, stop in holes:
            self.forget(start, stop)

    def forget(self, start: int, stop: int) -> None:
        """Bytes of the payload that are not known. Of a code that is all of it: one byte may place all others."""
        if self.known is None:
            self.known = np.ones(self.place.size, np.bool_)
        self.known[slice(start // 4, -(-stop // 4)) if self.codec == "dense" else slice(None)] = False

    def agrees(self, other: Piece) -> bool:
        """Whether the other says nothing else of the elements that both know."""
        equal = same(self.values, other.values)
        for known in (self.known, other.known):
            if known is not None:
                equal = equal | ~known
        return (self.tag, self.codec) == (other.tag, other.codec) and bool(equal.all())

    def learn(self, other: Piece) -> None:
        """Takes over the elements that only the other knows."""
        self.origins += other.origins
        if self.known is None:
            return
        if other.known is None:
            self.values, self.said, self.known = other.values, other.said, None
        else:
            new = other.known & ~self.known
            self.values[new] = other.values[new]
            self.known |= other.known


class Vector:
    """A flat vector, piece by piece, in any order."""

    def __init__(self) -> None:
        self._pieces: dict[Place, Piece | None] = {}  # None: contradicted, and never believed again
        self._order: list[Place] = []
        self.bytes = 0
        """Size of what it holds."""

    def __iter__(self) -> Iterator[Piece]:
        """The pieces that nothing contradicts, in order."""
        return (piece for place in self._order if (piece := self._pieces[place]) is not None)

    def get(self, place: Place) -> Piece | None:
        """The piece at exactly this place, where there is one that nothing contradicts."""
        return self._pieces.get(place)

    def add(self, piece: Piece) -> str | None:
        """Takes a piece in. Returns what it contradicts, if it does: then both are struck out."""
        if piece.place in self._pieces:
            present = self._pieces[piece.place]
            if present is None:
                return "a place that was contradicted before"
            if present.agrees(piece):
                present.learn(piece)
                return None
            self._strike(piece.place)
            return "an earlier chunk of the same place that says otherwise"
        # A sender cuts a vector one way only: of two chunks that overlap in part, one is not where it says.
        overlapping = list(self._overlapping(piece.place))
        bisect.insort(self._order, piece.place)
        if overlapping:
            self._pieces[piece.place] = None
            for place in overlapping:
                self._strike(place)
            return f"an earlier chunk of {overlapping[0]}"
        self._pieces[piece.place] = piece
        self.bytes += piece.values.nbytes
        return None

    def doubt(self, flow: Flow, start: int, stop: int) -> bool:
        """Bytes of a stream turned out not to be trusted: forgets what was built from them. Returns whether it did."""
        doubted = False
        for piece in list(self):
            for origin in piece.origins:
                if origin.flow == flow and start < origin.end and stop > origin.begin:
                    doubted = True
                    if start < origin.payload:
                        self._strike(piece.place)
                    piece.forget(max(start - origin.payload, 0), min(stop, origin.end) - origin.payload)
        return doubted

    def overlaps(self, place: Place) -> bool:
        """Whether anything was ever said of a part of this place."""
        return any(True for _ in self._overlapping(place))

    def _overlapping(self, place: Place) -> Iterator[Place]:
        for other in reversed(self._order[: bisect.bisect_left(self._order, Place(place.stop, 0))]):
            if other.stop > place.at:
                yield other
            elif self._pieces[other] is not None:
                return  # a piece that stands overlaps no other, struck out or not: what lies before it ends before it

    def _strike(self, place: Place) -> None:
        if (piece := self._pieces[place]) is not None:
            self.bytes -= piece.values.nbytes
        self._pieces[place] = None
