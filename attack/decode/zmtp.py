"""Bytes of one direction of a ZMTP 3.x connection -> greeting, commands and frames, with every hole marked.

Owns no socket and no clock, takes any chunking, and lets one error class out: `DecodeError`, naming flow and offset.
It knows the public specification alone (RFC 23 and 37 for framing, 24 for PLAIN, 26 for CURVE), and nothing of what
the frames mean: where framing is lost, an `Anchor` from outside says at which byte it can be proven to begin again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from attack.capture.streams import Bytes
from attack.decode.frames import Command, Event, Frame, Greeting, Holes, Lost, Resumed, Sealed, is_text
from attack.errors import DecodeError

GREETING_BYTES = 64
MORE, LONG, COMMAND = 0x01, 0x02, 0x04
MAX_FRAME_BYTES = (4 << 20) + 4096
"""The largest payload of the project's own format, and room for what CURVE adds to a message (33 bytes)."""

_HANDSHAKE = {
    "NULL": {"READY": True, "ERROR": True},
    "PLAIN": {"HELLO": False, "WELCOME": False, "INITIATE": True, "READY": True, "ERROR": True},
    "CURVE": {"HELLO": False, "WELCOME": False, "INITIATE": True, "READY": True, "ERROR": True},
}
"""Commands that a handshake may hold, and whether each is the last one of its direction."""


class Search(NamedTuple):
    """What an `Anchor` says of a window: everything before `at` can be forgotten."""

    at: int
    found: bool
    """Whether a frame begins at `at`; where False, ask again when the window has `wanted` bytes."""
    wanted: int = 0
    """Counted from `at`; always more than the window has from there."""


class Anchor(Protocol):
    """Finds a place where a frame provably begins."""

    span: int
    """It never wants more bytes than this from a candidate on."""

    def find(self, window: bytearray, holes: Holes) -> Search:
        """The first proven boundary in `window`, whose holes read as zero."""


class ZmtpDecoder:
    """Decodes one direction of one connection.

    `receive`, `gap` and `finish` are generators: run each to its end before the next call. After a DecodeError the
    direction cannot be read further, and no more calls are allowed.
    """

    def __init__(
        self,
        flow: object,
        *,
        from_start: bool = True,
        anchor: Anchor | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        """
        Args:
            flow: its text is what errors name.
            from_start: whether the first byte received is the first of the connection; if not, framing begins lost.
            anchor: proves where frames begin again; without one, what is lost stays lost.
            max_frame_bytes: a frame that says it is larger is refused before anything is allocated for it.
        """
        self._flow = flow
        self._anchor = anchor
        self._max_frame_bytes = max_frame_bytes
        self._offset = 0  # of the next byte of the stream
        self._sealed = False
        self._shaking = False  # while the handshake of a connection seen from its start goes on
        self._handshake: dict[str, bool] | None = None
        self._step: str  # which part the next bytes belong to: greeting, head, body or lost
        self._part: bytearray  # that part; its first _got bytes are there
        self._got = 0
        self._holes: list[tuple[int, int]] = []
        self._flags = 0
        self._frame_at = self._body_at = 0
        self._window = bytearray()  # while framing is lost: bytes that the anchor has not ruled out yet
        self._wanted = 1
        self._lost_at = 0
        self._why_lost = "" if from_start else "the capture began in mid-stream"
        self._begin("greeting" if from_start else "lost", GREETING_BYTES if from_start else 0)

    def receive(self, data: Bytes) -> Iterator[Event]:
        """The events that the next bytes complete. `data` is copied once and not kept. Raises: DecodeError."""
        view = memoryview(data)
        while len(view):
            if self._step == "lost":
                self._window += view
                yield from self._search()
                return
            taken = min(len(view), len(self._part) - self._got)
            self._part[self._got : self._got + taken] = view[:taken]
            self._got += taken
            self._offset += taken
            view = view[taken:]
            if self._got == len(self._part):
                yield from self._complete()

    def gap(self, length: int) -> Iterator[Event]:
        """The events that a hole of `length` bytes completes. Raises: DecodeError."""
        if self._step == "body" and length:
            taken = min(length, len(self._part) - self._got)
            self._mark(self._got, taken)
            self._got += taken
            self._offset += taken
            length -= taken
            if self._got == len(self._part):
                yield from self._complete()
        if not length:
            return
        if self._step != "lost":
            yield from self._lose("a hole covers the beginning of a frame")
        # Whoever searches sees a short hole as zeros that it is told of; a candidate cannot reach across a longer one.
        if self._anchor is not None and length <= self._anchor.span:
            self._mark(len(self._window), length)
            self._window += bytes(length)
        else:
            self._offset += len(self._window) + length
            self._window.clear()
            self._holes.clear()
            self._wanted = 1
        yield from self._search()

    def finish(self) -> Iterator[Event]:
        """Ends the direction; a frame that it ended in is not told, as nothing behind it shows that it is one."""
        if self._why_lost:
            yield from self._announce_loss()
        if self._step == "body" or (self._step != "lost" and self._got):
            yield Lost(offset=self._frame_at, why="the stream ended inside a frame", by_hole=False)

    def _begin(self, step: str, size: int) -> None:
        self._step = step
        self._part = bytearray(size)
        self._got = 0
        self._holes = []

    def _mark(self, start: int, length: int) -> None:
        """Notes a hole; two that touch are one, so that it does not matter in how many pieces a hole was told."""
        touching = bool(self._holes) and self._holes[-1][1] == start
        self._holes.append((self._holes.pop()[0] if touching else start, start + length))

    def _complete(self) -> Iterator[Event]:
        """A part is whole: says what it was, and begins the next."""
        if self._step == "greeting":
            greeting = self._read_greeting()
            self._sealed = greeting.mechanism not in ("NULL", "PLAIN")
            self._handshake = _HANDSHAKE.get(greeting.mechanism)
            self._shaking = True
            self._begin("head", 2)
            yield greeting
        elif self._step == "head":
            self._read_head()
            if self._step == "body" and not self._part:
                yield from self._complete()
        else:
            event = self._read_body()
            self._begin("head", 2)
            if event is not None:
                yield event

    def _read_greeting(self) -> Greeting:
        """signature FF, 8 bytes, 7F | version major, minor | mechanism, 20 bytes | as-server | filler, 31 bytes."""
        part = self._part
        if part[0] != 0xFF or part[9] != 0x7F:
            raise self._error(f"wanted a greeting's signature FF .. 7F, got {part[:10].hex(' ')}", at=0)
        if part[10] < 3:
            raise self._error(f"wanted ZMTP 3, got major version {part[10]}", at=10)
        mechanism = bytes(part[12:32]).rstrip(b"\0")
        if not mechanism or not is_text(mechanism):
            raise self._error(f"wanted the name of a mechanism, got {bytes(part[12:32])!r}", at=12)
        if part[32] > 1:
            raise self._error(f"wanted 0 or 1 for as-server, got {part[32]}", at=32)
        return Greeting(offset=0, version=(part[10], part[11]), mechanism=mechanism.decode(), as_server=bool(part[32]))

    def _read_head(self) -> None:
        """flags, 1 byte: MORE, LONG, COMMAND, five zero bits | body size: 1 byte, or 8, big endian, where LONG."""
        flags = self._part[0]
        if len(self._part) == 2:
            self._flags, self._frame_at = flags, self._offset - 2
            if flags & ~(MORE | LONG | COMMAND) or (flags & COMMAND and flags & MORE):
                raise self._error(f"wanted the flags of a frame, got {flags:#04x}", at=self._frame_at)
            if flags & LONG:
                self._part += bytes(7)
                return
        size = int.from_bytes(self._part[1:], "big")
        if size > self._max_frame_bytes:
            raise self._error(f"a frame of {size} bytes, at most {self._max_frame_bytes}", at=self._frame_at)
        if self._shaking and not flags & COMMAND:
            raise self._error("wanted a command of the handshake, got a message", at=self._frame_at)
        self._body_at = self._offset
        self._begin("body", size)

    def _read_body(self) -> Event | None:
        if not self._flags & COMMAND:
            if self._sealed:
                return Sealed(offset=self._frame_at, size=len(self._part))
            return Frame(
                offset=self._frame_at,
                body_at=self._body_at,
                more=bool(self._flags & MORE),
                body=self._part,
                holes=tuple(self._holes),
            )
        if self._holes:
            self._shaking = False  # it may have been the handshake's last
            return None
        return self._read_command()

    def _read_command(self) -> Command:
        """name length, 1 byte | name | data."""
        size = self._part[0] if self._part else 0
        name = bytes(self._part[1 : 1 + size])
        if not size or len(name) < size or not is_text(name):
            raise self._error(f"wanted a command, got {bytes(self._part[:16])!r}", at=self._frame_at)
        command = Command(offset=self._frame_at, name=name.decode(), data=bytes(self._part[1 + size :]))
        if self._shaking and self._handshake is not None:
            if command.name not in self._handshake:
                wanted = ", ".join(self._handshake)
                raise self._error(f"wanted one of {wanted}, got command {command.name}", at=self._frame_at)
            self._shaking = not self._handshake[command.name]
        elif self._shaking:
            self._shaking = command.name not in ("READY", "INITIATE")  # a mechanism that we know by name only
        return command

    def _lose(self, why: str) -> Iterator[Event]:
        self._why_lost, self._lost_at = why, self._offset - self._got
        self._shaking = False
        self._begin("lost", 0)
        yield from self._announce_loss()

    def _announce_loss(self) -> Iterator[Event]:
        why, self._why_lost = self._why_lost, ""
        yield Lost(offset=self._lost_at, why=why)

    def _search(self) -> Iterator[Event]:
        """Asks the anchor, as often as the window has what it wants; goes on framing where a boundary is proven."""
        if self._why_lost:
            yield from self._announce_loss()
        if self._anchor is None or self._sealed:
            self._offset += len(self._window)
            self._window.clear()
            self._holes.clear()
            return
        while len(self._window) >= self._wanted:
            search = self._anchor.find(self._window, tuple(self._holes))
            self._offset += search.at
            del self._window[: search.at]
            self._holes = [(max(a - search.at, 0), b - search.at) for a, b in self._holes if b > search.at]
            self._wanted = search.wanted
            if search.found:
                yield from self._resume()
                return

    def _resume(self) -> Iterator[Event]:
        """Frames again, from the window's first byte on."""
        window, holes = memoryview(self._window), self._holes
        self._window, self._wanted = bytearray(), 1
        self._begin("head", 2)
        yield Resumed(offset=self._offset, skipped=self._offset - self._lost_at)
        at = 0
        for start, stop in holes:
            yield from self.receive(window[at:start])
            yield from self.gap(stop - start)
            at = stop
        yield from self.receive(window[at:])

    def _error(self, what: str, at: int | None = None) -> DecodeError:
        return DecodeError(f"flow {self._flow}, byte {self._offset if at is None else at}: ZMTP: {what}")
