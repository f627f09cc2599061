"""TCP segments of a whole capture -> the events of every stream in it.

In come segments in the order of the capture; out go events, in the order in which they become certain. Refuses to know
files and what the bytes mean. What happens within one direction of one connection is `direction.py`; here it is decided
which connection a segment belongs to, and how much memory all of them may have.

Any order, repetition and loss of segments gives events, never an error. The same packet twice, as in a capture of
several interfaces, is a retransmission.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

from attack.capture.direction import Direction, ReassemblyCounts
from attack.capture.packets import ACK, FIN, RST, SYN, Segment
from attack.capture.reader import CaptureReader
from attack.capture.streams import Flow, StreamEvent
from attack.errors import CaptureError

_MASK: Final = (1 << 32) - 1
_MORE_THAN_ACK: Final = ACK | SYN | FIN | RST


class Reassembler:
    """Puts streams together.

    Payloads are passed on and held as they come, uncopied, so they must stay as they are: a view of a mapped file does,
    a view of a buffer that is filled again does not.
    """

    def __init__(
        self,
        *,
        max_held_bytes: int = 64 << 20,
        max_held_bytes_per_stream: int = 16 << 20,
        max_connections: int = 8192,
    ) -> None:
        """Makes one without streams.

        Args:
            max_held_bytes: memory for data behind holes. Beyond it holes are given up, beginning with the streams that
                hold most.
            max_held_bytes_per_stream: the same for one stream. Linux's default limit of a receive window is 6 MiB: more
                than that is never behind a hole that the sender could still fill.
            max_connections: how many are remembered. Of twice as many half are forgotten: those that have ended, then
                those that were idle longest.
        """
        self.counts = ReassemblyCounts()
        """What was seen and led to no data, so far."""
        self._max_held = max_held_bytes
        self._max_held_per_stream = max_held_bytes_per_stream
        self._max_connections = max_connections
        self._directions: dict[tuple[str, str], Direction] = {}
        self._held = 0
        self._next_incarnation = 0  # for connections never seen; above those of all that were forgotten

    def feed(self, segment: Segment) -> Sequence[StreamEvent]:
        """Takes the capture's next segment and returns what has become certain by it."""
        source, destination, seq, ack, flags, payload, length, time = segment
        direction = self._directions.get((source, destination))
        if direction is None:
            return self._feed_carefully(segment, self._connect(source, destination, self._next_incarnation))
        # Nearly all segments of a bulk transfer are one of two kinds: the next data, or an acknowledgment alone.
        peer = direction.peer
        if flags & _MORE_THAN_ACK == ACK and direction.ready and not peer.pending:
            if not length or (seq == direction.next & _MASK and len(payload) == length):
                direction.time = time
                if ack != peer.ack_seq:
                    peer.acknowledge(ack)
                return (direction.deliver(payload, time),) if length else ()
        return self._feed_carefully(segment, direction)

    def finish(self) -> list[StreamEvent]:
        """The capture has ended: what is left of every stream."""
        events: list[StreamEvent] = []
        for direction in self._directions.values():
            direction.end("capture ended", direction.time, events)
        self._directions.clear()
        self._held = 0
        return events

    def _feed_carefully(self, segment: Segment, direction: Direction) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        time = segment.time
        if not direction.belongs(segment):
            direction = self._replace(direction, time, events)
        peer = direction.peer
        direction.time = time
        held = direction.held_cost + peer.held_cost
        if segment.flags & ACK:
            peer.acknowledge(segment.ack)
        if segment.flags & RST:
            if direction.reset(segment, events):
                peer.end("reset", time, events)
        else:
            direction.receive(segment, events)
        for waiting in (direction, peer):
            if waiting.pending:
                waiting.wait(time, events)
            waiting.relieve(self._max_held_per_stream, time, events)
        self._held += direction.held_cost + peer.held_cost - held
        if self._held > self._max_held:
            self._relieve(time, events)
        if len(self._directions) > 4 * self._max_connections:
            self._forget(events)
        return events

    def _connect(self, source: str, destination: str, incarnation: int) -> Direction:
        flow = Flow(source=source, destination=destination, incarnation=incarnation)
        direction = Direction(flow, self.counts)
        self._directions[source, destination] = direction
        if source != destination:  # a socket can be connected to itself
            peer = Direction(flow.reverse, self.counts)
            self._directions[destination, source] = peer
            direction.peer, peer.peer = peer, direction
        self.counts.connections += 1
        return direction

    def _replace(self, direction: Direction, time: float, events: list[StreamEvent]) -> Direction:
        """A new connection between the same two ports."""
        self._end(direction, "replaced", time, events)
        flow = direction.flow
        return self._connect(flow.source, flow.destination, flow.incarnation + 1)

    def _end(self, direction: Direction, how: str, time: float, events: list[StreamEvent]) -> None:
        for one in {direction, direction.peer}:
            self._held -= one.held_cost
            one.end(how, time, events)

    def _relieve(self, time: float, events: list[StreamEvent]) -> None:
        """Gives up holes until half of the memory is free, so that this is not needed again soon."""
        directions = sorted(self._directions.values(), key=lambda direction: direction.held_cost, reverse=True)
        self._held = sum(direction.held_cost for direction in directions)
        for direction in directions:
            if self._held <= self._max_held // 2:
                return
            self._held -= direction.held_cost
            direction.relieve(0, time, events)

    def _forget(self, events: list[StreamEvent]) -> None:
        def in_use(direction: Direction) -> tuple[bool, float]:
            return not (direction.over and direction.peer.over), max(direction.time, direction.peer.time)

        directions = sorted(self._directions.values(), key=in_use)
        for direction in directions[: len(directions) // 2]:
            self._end(direction, "forgotten", direction.time, events)
            self._directions.pop((direction.flow.source, direction.flow.destination), None)
            self._directions.pop((direction.flow.destination, direction.flow.source), None)
            self._next_incarnation = max(self._next_incarnation, direction.flow.incarnation + 1)


def read_streams(capture: CaptureReader | str | os.PathLike[str]) -> Iterator[StreamEvent]:
    """The events of all streams in a capture file, or in a reader's, whose statistics can then be asked for.

    Raises: CaptureError where the file is no capture, or damaged; all streams have been closed by then.
    """
    reader = capture if isinstance(capture, CaptureReader) else CaptureReader(capture)
    reassembler = Reassembler()
    try:
        for segment in reader.segments():
            yield from reassembler.feed(segment)
    except CaptureError:
        yield from reassembler.finish()
        raise
    yield from reassembler.finish()
