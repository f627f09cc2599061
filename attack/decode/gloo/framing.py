"""One direction of a connection between two Gloo pairs: bytes and holes in, messages out.

A hole inside a payload is passed on as part of the message. One that covers a head loses the framing: it is resumed at
the next head. A head has 38 bytes that are the same in all of them, and says its length twice, so no gradient looks
like one. In a stream that has shown none yet, or none with a tag near its own, its message must besides end exactly
where another head begins. Knows nothing of ranks, and of collectives only their slots.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from typing import Final, NamedTuple, TypeAlias

from attack.capture.streams import Bytes, Flow
from attack.decode.gloo.head import HEAD_BYTES, HELLO_BYTES, MAX_WORLD, Head, Kind, Opcode, Slot, parse_head
from attack.errors import DecodeError

Holes: TypeAlias = tuple[tuple[int, int], ...]
"""First byte of each, and the one behind its last, within a payload."""

Fragments: TypeAlias = tuple[tuple[int, bytearray], ...]
"""Offset in the stream, and bytes."""
MAX_TAIL_BYTES: Final = 1 << 20
"""Longest message of a ring."""

_HEAD: Final = re.compile(rb"(?s)(?=.{6}\0\0[\x01-\x03]\0{7}(?:.{7}[\x01-\x08]|.{4}\0{4})\0{8}.{6}\0\0\0{8})")
_UNTIL_DATA: Final = 1 << 16
"""Bytes searched at a time: what lies behind a head that was found is not looked at twice."""


class Hello(NamedTuple):
    """The side that connected says who it is."""

    rank: int


class Message(NamedTuple):
    """A payload. The buffer is the receiver's to keep."""

    slot: Slot
    payload: bytearray
    holes: Holes
    offset: int
    """Of the payload's first byte, in the stream."""


class Announcement(NamedTuple):
    """A message will be sent, or can be received. Each message has one of either kind, both before it."""

    slot: Slot
    length: int
    """Bytes of its payload."""
    from_sender: bool


class Lost(NamedTuple):
    """Where the framing was lost: the last boundary that is certain."""

    offset: int


class Resumed(NamedTuple):
    """Framing is known again, from `offset` on; whole messages may have been lost in `skipped` bytes before."""

    offset: int
    skipped: int
    before: Fragments = ()
    """What was seen of these bytes, as far as the last message before `offset` may reach."""


Event: TypeAlias = Hello | Message | Announcement | Lost | Resumed

_NEAR: Final = 1 << 12
"""Collectives between two heads of which the second is believed by itself."""


class GlooDecoder:
    """Takes one direction in any pieces."""

    def __init__(self, flow: Flow | str, *, from_start: bool) -> None:
        self.flow = flow
        self.offset = 0
        """Bytes and holes taken in so far."""
        self._boundary = 0  # the last place that is certainly between two messages
        self._rest = bytearray()  # the beginning of a head; in a search, what is not yet searched
        self._head: Head | None = None  # of the message under way
        self._payload = bytearray()
        self._holes: list[tuple[int, int]] = []
        self._greeted = not from_start
        self._lost = not from_start
        self._tag: int | None = 0 if from_start else None  # of a head that is certain; None: there was none
        self._seen: list[tuple[int, bytearray]] = []  # in a search, without heads
        self._trial: Message | None = None  # found in a search; proven if a head follows
        self._trial_head = Head(Opcode.SEND_UNBOUND_BUFFER, Slot(Kind.BARRIER, 0, 0), 0, 0)
        self._trial_at = 0  # its head's offset

    def receive(self, data: Bytes) -> Iterator[Event]:
        """Takes the next bytes. Raises: DecodeError, where they are no message and nothing was missed before."""
        view = memoryview(data)
        while len(view) or (self._lost and self._head is None and len(self._rest) >= HEAD_BYTES):
            if self._head is not None:
                taken = min(self._head.payload - len(self._payload), len(view))
                self._payload += view[:taken]
                self.offset += taken
                view = view[taken:]
                if not len(view) and len(self._payload) < self._head.payload:
                    return
                yield from self._finish_message()
            elif self._lost and self._trial is None:
                taken = min(len(view), _UNTIL_DATA)
                self._rest += view[:taken]
                self.offset += taken
                view = view[taken:]
                view = yield from self._search(view)
            else:
                greeting = HELLO_BYTES if not self._greeted and len(self._rest) >= HEAD_BYTES else 0
                want = greeting + HEAD_BYTES
                taken = min(want - len(self._rest), len(view))
                self._rest += view[:taken]
                self.offset += taken
                view = view[taken:]
                if len(self._rest) >= HEAD_BYTES:
                    yield from self._begin()

    def gap(self, length: int) -> Iterator[Event]:
        """Takes a hole."""
        if self._head is not None:
            taken = min(self._head.payload - len(self._payload), length)
            self._holes.append((len(self._payload), len(self._payload) + taken))
            self._payload += bytes(taken)
            self.offset += taken
            length -= taken
            if len(self._payload) == self._head.payload:
                yield from self._finish_message()
        if not length:
            return
        if not self._lost:
            self._lost = self._greeted = True
            yield Lost(self._boundary)
        elif self._trial is None:
            self._keep(len(self._rest))
        self._trial = None  # the head that would have proven it was missed
        self._rest.clear()
        self.offset += length

    def finish(self) -> Iterator[Event]:
        """The stream ended. What was begun is given out as far as it came."""
        if self._head is not None and not self._lost:
            self._holes.append((len(self._payload), self._head.payload))
            short = self._head.payload - len(self._payload)
            if short <= len(self._payload) + HEAD_BYTES:  # a head alone must not make us allocate what it claims
                self._payload += bytes(short)
                yield from self._finish_message()
            self._head = None

    def _begin(self) -> Iterator[Event]:
        """What is in `rest` is a head, or the greeting and a head."""
        start = self.offset - len(self._rest)
        head = parse_head(self._rest)
        if head is None and not self._greeted:
            if len(self._rest) < HELLO_BYTES + HEAD_BYTES:
                return
            rank = int.from_bytes(self._rest[:HELLO_BYTES], "little")
            head = parse_head(self._rest, HELLO_BYTES)
            if rank >= MAX_WORLD or head is None:
                raise DecodeError(f"flow {self.flow}, byte {start}: wanted a rank and a Gloo head, got other bytes")
            yield Hello(rank)
        self._greeted = True
        if self._trial is not None:
            yield from self._judge(head, start)
            if head is None:
                return
        if head is None:
            raise DecodeError(f"flow {self.flow}, byte {start}: wanted a Gloo head, got other bytes")
        self._boundary = self.offset - HEAD_BYTES
        self._rest.clear()
        self._start(head)
        self._remember(head.slot)
        if not head.payload:
            yield from self._finish_message()

    def _is_near(self, slot: Slot) -> bool:
        """Whether one head suffices. What two ranks send to each other has no tag that counts."""
        return slot.kind is not Kind.POINT_TO_POINT and self._tag is not None and abs(slot.tag - self._tag) < _NEAR

    def _remember(self, slot: Slot) -> None:
        if slot.kind is not Kind.POINT_TO_POINT:
            self._tag = slot.tag

    def _start(self, head: Head) -> None:
        self._head, self._payload, self._holes = head, bytearray(), []

    def _finish_message(self) -> Iterator[Event]:
        assert self._head is not None
        head, self._head = self._head, None
        message = Message(head.slot, self._payload, tuple(self._holes), self.offset - len(self._payload))
        self._payload = bytearray()
        if self._lost:
            self._trial, self._trial_head = message, head
            return
        self._boundary = self.offset
        yield _told(head, message)

    def _search(self, view: memoryview) -> Generator[Event, None, memoryview]:
        """Looks for a head in `rest`; what comes behind one is handed back to be read as its payload."""
        at = _find_head(self._rest)
        if at is not None and (head := parse_head(self._rest, at)) is not None:
            self._keep(at)
            behind = bytes(self._rest[at + HEAD_BYTES :])
            self.offset -= len(behind)
            self._trial_at = self.offset - HEAD_BYTES
            self._rest.clear()
            self._start(head)
            if self._is_near(head.slot):
                yield self._resume(head)
            if not head.payload:
                yield from self._finish_message()  # becomes the trial, where nothing is certain yet
            return memoryview(behind + bytes(view)) if behind else view
        searched = max(0, len(self._rest) - HEAD_BYTES + 1)
        self._keep(searched)
        del self._rest[:searched]
        return view

    def _keep(self, count: int) -> None:
        """The first bytes of `rest` hold no head: they may be the end of a message whose head was missed."""
        start = self.offset - len(self._rest)
        if not count or self._tag is None:
            return
        if self._seen and self._seen[-1][0] + len(self._seen[-1][1]) == start:
            self._seen[-1][1].extend(self._rest[:count])
        else:
            self._seen.append((start, self._rest[:count]))
        while (first := self._seen[0])[0] + len(first[1]) <= start + count - MAX_TAIL_BYTES:
            del self._seen[0]

    def _judge(self, head: Head | None, start: int) -> Iterator[Event]:
        """Whether a message found in a search was one: a head must begin where it ended."""
        trial, self._trial = self._trial, None
        assert trial is not None
        if head is None:
            return  # the search goes on in `rest`
        yield self._resume(head)
        yield _told(self._trial_head, trial)

    def _resume(self, head: Head) -> Resumed:
        self._lost = False
        self._remember(head.slot)
        seen, self._seen = tuple(self._seen), []
        return Resumed(self._trial_at, self._trial_at - self._boundary, seen)


def _told(head: Head, message: Message) -> Message | Announcement:
    if head.opcode is Opcode.SEND_UNBOUND_BUFFER:
        return message
    return Announcement(head.slot, head.length, head.opcode is Opcode.NOTIFY_SEND_READY)


def _find_head(data: bytearray) -> int | None:
    """Where the first head in these bytes begins."""
    at = -1
    while (match := _HEAD.search(data, at + 1)) is not None:
        at = match.start()
        if at + HEAD_BYTES > len(data):
            return None
        if parse_head(data, at) is not None:
            return at
    return None
