"""ZMTP frames of one direction -> messages of the project's own format, whole or with holes in their payload.

Knows a message's two frames and that they must agree; nothing of ranks, steps or which messages follow which. A message
that cannot be one is named in a `Refused` and never guessed at. A payload carries no mark of its own, so a message is
told only when what follows shows that it ended where it said: the next message, a command, a hole or the stream's end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

from attack.decode.frames import Command, Event, Frame, Holes, Lost
from harness.wire import Header, WireError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A header that was seen whole, and its payload."""

    offset: int
    """Of the message's first byte in its stream."""
    payload_at: int
    """Offset of the payload's first byte."""
    header: Header
    payload: bytearray
    """Of exactly `header.size` bytes; the parts in `holes` read as zero and mean nothing."""
    holes: Holes = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Frames that are not a message of this format, or of which too much is missing to say."""

    offset: int
    why: str
    foreign: bool
    """True where they do not look like this format at all, so that another application may be talking."""


Item: TypeAlias = Message | Refused


class MessageDecoder:
    """Pairs the frames of one direction. Feed it every event of that direction, in order."""

    def __init__(self, runs: set[bytes]) -> None:
        """`runs` grows by the run ids of messages seen whole; an anchor believes these."""
        self._runs = runs
        self._first: Frame | None = None  # a frame that waits for the next one of its message
        self._count = 0  # frames of the message so far
        self._held: Message | None = None  # whole, and waiting for what follows it
        self._doubts: list[tuple[int, int]] = []

    def doubt(self, start: int, stop: int) -> None:
        """Says that these bytes of the stream, if they are still to come, are not to be trusted."""
        self._doubts.append((start, stop))

    def feed(self, event: Event) -> Iterator[Item]:
        """The messages that this event completes."""
        if isinstance(event, Command):
            yield from self._release()
        elif isinstance(event, Lost):
            yield from self._release() if event.by_hole else self.refuse("the stream ended inside what follows it")
            if self._first is not None:
                yield Refused(offset=self._first.offset, why="framing was lost inside a message", foreign=False)
            self._first, self._count = None, 0
        elif isinstance(event, Frame):
            yield from self._add(event)

    def finish(self) -> Iterator[Item]:
        """The stream has ended, and not inside a frame."""
        yield from self._release()

    def refuse(self, why: str) -> Iterator[Item]:
        """What follows the last message is not what must follow it."""
        if self._held is not None:
            yield Refused(offset=self._held.offset, why=why, foreign=False)
        self._held = None

    def _release(self) -> Iterator[Item]:
        if self._held is not None:
            yield self._held
        self._held = None

    def _add(self, frame: Frame) -> Iterator[Item]:
        self._count += 1
        first = self._first or frame
        if frame.more:
            self._first = first
            return
        count, self._first, self._count = self._count, None, 0
        item = self._pair(first, frame, count)
        if isinstance(item, Refused) and item.foreign:
            yield from self.refuse("what follows it is not a message")
        yield from self._release()
        if isinstance(item, Message):
            self._held = item
        else:
            yield item

    def _pair(self, first: Frame, last: Frame, count: int) -> Item:
        at = first.offset
        if first.holes:
            return Refused(offset=at, why="a hole in the header", foreign=False)
        try:
            header = Header.unpack(memoryview(first.body))
        except WireError as error:
            return Refused(offset=at, why=str(error), foreign=True)
        if count != 2:
            return Refused(offset=at, why=f"wanted a header and a payload, got {count} frames", foreign=False)
        if header.size != len(last.body):
            why = f"{header.kind}: wanted {header.size} bytes of payload, got {len(last.body)}"
            return Refused(offset=at, why=why, foreign=False)
        begin, end = last.body_at, last.body_at + header.size
        self._doubts = [doubt for doubt in self._doubts if doubt[1] > at]
        if any(start < begin for start, _ in self._doubts):
            return Refused(offset=at, why="two different copies of its header", foreign=False)
        doubts = [(max(start, begin) - begin, min(stop, end) - begin) for start, stop in self._doubts if start < end]
        self._runs.add(header.run)
        holes = tuple(sorted([*last.holes, *doubts]))
        return Message(offset=at, payload_at=begin, header=header, payload=last.body, holes=holes)
