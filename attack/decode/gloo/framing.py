"""One direction of a connection between two Gloo pairs: bytes and holes in, messages out.

A hole inside a payload is passed on as part of the message. One that covers a head loses the framing: it is resumed at
the first head whose message ends exactly where another head begins. A head has 38 bytes that are the same in all of
them, so no gradient looks like two. Knows nothing of ranks, and of collectives only their slots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

from attack.capture.streams import Bytes, Flow
from attack.decode.gloo.head import HEAD_BYTES, HELLO_BYTES, MAX_WORLD, Head, Opcode, Slot, parse_head
from attack.errors import DecodeError

Holes: TypeAlias = tuple[tuple[int, int], ...]
"""First byte of each, and the one behind its last, within a payload."""

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


class Lost(NamedTuple):
    """Where the framing was lost: the last boundary that is certain."""

    offset: int


class Resumed(NamedTuple):
    """Framing is known again, from `offset` on; whole messages may have been lost in `skipped` bytes before."""

    offset: int
    skipped: int


Event: TypeAlias = Hello | Message | Lost | Resumed


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
        self._trial: Message | None = None  # found in a search; proven if a head follows
        self._trial_opcode = Opcode.SEND_UNBOUND_BUFFER
        self._trial_head = 0  # its offset

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
                view = self._search(view)
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
        if not head.payload:
            yield from self._finish_message()

    def _start(self, head: Head) -> None:
        self._head, self._payload, self._holes = head, bytearray(), []

    def _finish_message(self) -> Iterator[Event]:
        assert self._head is not None
        head, self._head = self._head, None
        message = Message(head.slot, self._payload, tuple(self._holes), self.offset - len(self._payload))
        self._payload = bytearray()
        if self._lost:
            self._trial, self._trial_opcode = message, head.opcode
            return
        self._boundary = self.offset
        if head.opcode is Opcode.SEND_UNBOUND_BUFFER:
            yield message

    def _search(self, view: memoryview) -> memoryview:
        """Looks for a head in `rest`; what comes behind one is handed back to be read as its payload."""
        at = _find_head(self._rest)
        if at is not None and (head := parse_head(self._rest, at)) is not None:
            behind = bytes(self._rest[at + HEAD_BYTES :])
            self.offset -= len(behind)
            self._trial_head = self.offset - HEAD_BYTES
            self._rest.clear()
            self._start(head)
            if not head.payload:
                list(self._finish_message())  # becomes the trial
            return memoryview(behind + bytes(view)) if behind else view
        del self._rest[: max(0, len(self._rest) - HEAD_BYTES + 1)]
        return view

    def _judge(self, head: Head | None, start: int) -> Iterator[Event]:
        """Whether a message found in a search was one: a head must begin where it ended."""
        trial, self._trial = self._trial, None
        assert trial is not None
        if head is None:
            return  # the search goes on in `rest`
        self._lost = False
        yield Resumed(self._trial_head, self._trial_head - self._boundary)
        if self._trial_opcode is Opcode.SEND_UNBOUND_BUFFER:
            yield trial


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
