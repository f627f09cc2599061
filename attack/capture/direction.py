"""One direction of one TCP connection: segments in the order of the capture -> bytes in order, with explicit holes.

In come segments and what the other direction acknowledges; out go events. Refuses to know other connections, and when
this one has become another (`reassembly.py`).

- A position is a sequence number that does not wrap: equal to it modulo 2**32. Offsets count from the first byte.
- Data that is next is delivered; data that is further on is held. The first copy of a byte counts, others are compared.
- A hole is given up, as a `Gap`, once the receiver has acknowledged past it (so nobody will send it again) and
  PATIENCE more segments have come (so it is not just late in the capture); or when too much is held; or at the end.
- Without a SYN, a stream begins at the lowest byte of the first SETTLING segments.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import sys
from typing import Final

from attack.capture.packets import FIN, SYN, Segment
from attack.capture.streams import Closed, Conflict, Data, Flow, Gap, Opened, StreamEvent

_WRAP: Final = 1 << 32
_MASK: Final = _WRAP - 1

LARGEST_WINDOW: Final = 1 << 30
"""RFC 7323: an acknowledgment or a reset that is further ahead than this belongs to something else."""
FURTHEST_BEHIND: Final = 1 << 28
"""How far behind a sequence number may be to count as sent again. More is ahead: much was missed. TCP would allow a
window of 1 GiB, hosts allow some MiB; the smaller this is, the larger the loss that still shows as a hole."""
PATIENCE: Final = 64
"""Segments. More than the reordering of a capture, far less than a loopback's receive window."""
SETTLING: Final = 4
"""Segments that carry something."""
REMEMBERED: Final = 64
"""Delivered pieces that later copies are compared with: views, so it costs no copies."""
SYN_REORDERING: Final = 1 << 20
"""Bytes that may come before their SYN does."""
PIECE_COST: Final = 256
"""Bytes of memory that a held piece takes besides its content."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ReassemblyCounts:
    """What was seen and led to no `Data`, over all streams so far."""

    connections: int = 0
    duplicate_bytes: int = 0
    """Sent or captured again. Those still remembered were compared."""
    late_bytes: int = 0
    """Came after their place had been given up as a hole."""
    refused_bytes: int = 0
    """After the end of their stream, or before its SYN."""
    conflicts: int = 0
    """Copies that differ from the first."""


class Direction:
    """One direction. Its `peer`, the other one, is set by whoever makes the two."""

    def __init__(self, flow: Flow, counts: ReassemblyCounts) -> None:
        self.flow = flow
        self.peer = self
        self.time = 0.0  # of the newest segment
        self.ready = False  # what comes next in order can be delivered without further ado
        self.pending = False  # a hole is waited for
        self.next = 0  # position of the first byte not yet delivered; before the stream is open, of anything seen of it
        self.ack_seq = -1  # how the other direction acknowledged last, as it stood in its header
        self.held_cost = 0  # bytes of memory
        self.is_open = False
        self.closed = False
        self._counts = counts
        self._known = False  # `next` means something
        self._origin = 0  # position of offset 0
        self._first: int | None = None  # lowest position of a segment that carries something
        self._syn: int | None = None  # its sequence number
        self._fin: int | None = None  # position behind the last byte
        self._sent = 0  # position behind the furthest byte that a segment had, be it captured or cut off
        self._acked = 0
        self._starts: list[int] = []  # positions of the pieces held, ascending; no two pieces overlap
        self._pieces: list[memoryview] = []
        self._delivered: collections.deque[Data | Gap] = collections.deque(maxlen=REMEMBERED)
        self._conflicts: list[tuple[int, int]] = []  # position and length, not yet told
        self._settling = SETTLING
        self._patience = 0
        self._ripe = 0  # holes that end here, or before, are given up when the patience is at its end

    @property
    def over(self) -> bool:
        """True where no events are to come, as things stand."""
        return self.closed or not self.is_open

    def belongs(self, segment: Segment) -> bool:
        """False where a segment is of a later connection between the same two ports."""
        if segment.flags & SYN:
            if self._syn is not None:
                return segment.seq == self._syn
            begin = self._origin if self.is_open else self.next
            return not self._known or (begin - segment.seq - 1) & _MASK < SYN_REORDERING
        # The later connection's SYN may be missing. Most of the time its numbers alone are far enough off.
        return not (self.closed and segment.length and self._position(segment.seq) - self.next > LARGEST_WINDOW)

    def acknowledge(self, ack: int) -> None:
        """The other direction says that it has all bytes before this sequence number."""
        self.ack_seq = ack
        position = self._position(ack)
        if position - max(self.next, self._sent) <= LARGEST_WINDOW:
            self._acked = max(self._acked, position)

    def deliver(self, payload: memoryview, time: float) -> Data:
        """Hands out the bytes that are next."""
        data = Data(flow=self.flow, time=time, offset=self.next - self._origin, payload=payload)
        self.next += len(payload)
        self._delivered.append(data)
        return data

    def receive(self, segment: Segment, events: list[StreamEvent]) -> None:
        """Takes any segment but a reset, and appends what follows from it."""
        if self.closed:
            self._counts.refused_bytes += segment.length
            return
        start = self._position(segment.seq)
        if segment.flags & SYN:
            start += 1
            self._begin(start, segment, events)
        end = start + segment.length
        if segment.flags & FIN:
            self._end_at(end)
        elif not segment.length:
            return
        elif segment.length == 1 and end == max(self._sent, self.next):
            return  # a keepalive probe: the last byte again, which may have any value (RFC 1122, 4.2.3.6)
        self._first = start if self._first is None else min(self._first, start)
        self._sent = max(self._sent, end)
        self._hold(start, segment.payload)
        self._settling -= 1
        if self.is_open or not self._settling:
            self._open(segment.time, events)
            self._release(segment.time, events)

    def reset(self, segment: Segment, events: list[StreamEvent]) -> bool:
        """Takes a reset; False where its number is not one of this stream's, so that nobody heeded it."""
        if self.is_open and not self.closed:
            position = self._position(segment.seq)
            if position - self.next > LARGEST_WINDOW:
                return False
            self._sent = max(self._sent, position)
        self.end("reset", segment.time, events)
        return True

    def wait(self, time: float, events: list[StreamEvent]) -> None:
        """One more segment of the connection came while a hole was open."""
        if self._patience:
            self._patience -= 1
            if not self._patience:
                self._give_up(self._ripe, time, events)
        elif self._acked > self.next:
            self._patience, self._ripe = PATIENCE, self._acked

    def relieve(self, limit: int, time: float, events: list[StreamEvent]) -> None:
        """Gives holes up until no more than `limit` is held."""
        while self.held_cost > limit:
            self._open(time, events)
            self._give_up(self._starts[0], time, events)

    def end(self, how: str, time: float, events: list[StreamEvent]) -> None:
        """Nothing more will come: what is missing now is missing for good."""
        if self.closed or (not self.is_open and self._first is None):
            return
        self._open(time, events)
        self._release(time, events)
        # What was acknowledged had been sent. If no FIN was seen, the last byte of that may have been one.
        end = max(self._sent, self._acked) if self._fin is None else self._fin
        self._give_up(end, time, events)
        if not self.closed:
            self._skip_to(end, time, events)
            self._close(how, time, events)

    def _position(self, seq: int) -> int:
        if not self._known:
            self._known = True
            self.next = _WRAP + seq
        ahead = (seq - self.next) & _MASK
        return self.next + (ahead if ahead < _WRAP - FURTHEST_BEHIND else ahead - _WRAP)

    def _begin(self, start: int, syn: Segment, events: list[StreamEvent]) -> None:
        """The SYN was seen: the stream is known from its first byte, unless it was opened without."""
        self._syn = syn.seq
        if self.is_open:
            return
        self.is_open = True
        self._origin = self.next = start
        self._keep(start, sys.maxsize)
        if self._fin is not None and self._fin < start:
            self._fin = None
        events.append(Opened(flow=self.flow, time=syn.time, from_start=True))
        self._release(syn.time, events)

    def _open(self, time: float, events: list[StreamEvent]) -> None:
        """Makes the lowest byte seen the stream's first, unless its SYN did so before."""
        if not self.is_open and self._first is not None:
            self.is_open = True
            self._origin = self.next = self._first
            events.append(Opened(flow=self.flow, time=time, from_start=False))

    def _end_at(self, end: int) -> None:
        if self._fin is None and not (self.is_open and end < self.next):
            self._fin = end
            self._keep(0, end)

    def _keep(self, start: int, end: int) -> None:
        """Refuses what is held outside of a range."""
        held = list(zip(self._starts, self._pieces, strict=True))
        self._starts, self._pieces, self.held_cost = [], [], 0
        for at, piece in held:
            kept = piece[max(start - at, 0) : max(end - at, 0)]
            self._counts.refused_bytes += len(piece) - len(kept)
            if kept:
                self._insert(len(self._starts), max(start, at), kept)

    def _hold(self, start: int, payload: memoryview) -> None:
        """Keeps what is new of a piece, and compares the rest with the copy that came first."""
        if self._fin is not None and start + len(payload) > self._fin:
            inside = max(self._fin - start, 0)
            self._counts.refused_bytes += len(payload) - inside
            payload = payload[:inside]
        if self.is_open and start < self.next:
            known = min(self.next - start, len(payload))
            self._compare_delivered(start, payload[:known])
            start, payload = start + known, payload[known:]
        index = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while payload:
            if index == len(self._starts) or start < self._starts[index]:
                room = self._starts[index] - start if index < len(self._starts) else len(payload)
                done = min(room, len(payload))
                self._insert(index, start, payload[:done])
            else:
                first = self._pieces[index][start - self._starts[index] :]
                done = min(len(first), len(payload))
                self._counts.duplicate_bytes += done
                self._compare(start, first[:done], payload[:done])
            start, payload = start + done, payload[done:]
            index += 1

    def _insert(self, index: int, start: int, piece: memoryview) -> None:
        self._starts.insert(index, start)
        self._pieces.insert(index, piece)
        self.held_cost += len(piece) + PIECE_COST

    def _compare_delivered(self, start: int, payload: memoryview) -> None:
        """Compares with what is remembered; what is not, or was given up as a hole, is only counted."""
        before = min(max(self._origin - start, 0), len(payload))
        self._counts.refused_bytes += before
        self._counts.duplicate_bytes += len(payload) - before
        offset = start - self._origin
        end = offset + len(payload)
        for piece in reversed(self._delivered):
            low = max(offset, piece.offset)
            if isinstance(piece, Gap):
                late = min(end, piece.offset + piece.length) - low
                if late > 0:
                    self._counts.duplicate_bytes -= late
                    self._counts.late_bytes += late
            elif low < min(end, piece.offset + len(piece.payload)):
                first = memoryview(piece.payload)[low - piece.offset : end - piece.offset]
                self._compare(self._origin + low, first, payload[low - offset :][: len(first)])
            if piece.offset <= offset:
                break

    def _compare(self, start: int, first: memoryview, again: memoryview) -> None:
        # As bytes: memoryviews are compared item by item.
        one, other = bytes(first), bytes(again)
        if one == other:
            return
        # As numbers, so that a search for the first and the last difference takes no loop.
        differing = int.from_bytes(one) ^ int.from_bytes(other)
        low = len(one) - (differing.bit_length() + 7) // 8
        high = len(one) - ((differing & -differing).bit_length() - 1) // 8
        self._counts.conflicts += 1
        self._conflicts.append((start + low, high - low))

    def _release(self, time: float, events: list[StreamEvent]) -> None:
        """Delivers what has become next, and ends the stream behind its last byte."""
        for start, length in self._conflicts:
            events.append(Conflict(flow=self.flow, time=time, offset=start - self._origin, length=length))
        self._conflicts.clear()
        count = 0
        for start, piece in zip(self._starts, self._pieces, strict=True):
            if start != self.next:
                break
            events.append(self.deliver(piece, time))
            self.held_cost -= len(piece) + PIECE_COST
            count += 1
        del self._starts[:count], self._pieces[:count]
        if self.next == self._fin:
            self._close("fin", time, events)
            return
        self.pending = bool(self._starts) or self._fin is not None
        self.ready = not self.pending

    def _give_up(self, up_to: int, time: float, events: list[StreamEvent]) -> None:
        """Gives up the holes that end there or before."""
        while not self.closed:
            end = self._starts[0] if self._starts else self._fin
            if end is None or end > up_to:
                return
            self._skip_to(end, time, events)
            self._release(time, events)

    def _skip_to(self, end: int, time: float, events: list[StreamEvent]) -> None:
        if end > self.next:
            gap = Gap(flow=self.flow, time=time, offset=self.next - self._origin, length=end - self.next)
            self.next = end
            self._delivered.append(gap)
            events.append(gap)

    def _close(self, how: str, time: float, events: list[StreamEvent]) -> None:
        self.closed = True
        self.ready = self.pending = False
        self._delivered.clear()
        events.append(Closed(flow=self.flow, time=time, how=how))
