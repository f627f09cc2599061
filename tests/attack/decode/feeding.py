"""Every way to hand a stream to a decoder; each must give the same events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attack.decode.anchor import MessageAnchor
from attack.decode.frames import Event
from attack.decode.zmtp import ZmtpDecoder
from attack.errors import DecodeError

Part = bytes | int
"""Bytes, or the length of a hole."""


def decoder(*, from_start: bool = True, runs: set[bytes] | None = None, **options: int) -> ZmtpDecoder:
    """One direction, with the anchor of the project's messages."""
    return ZmtpDecoder(
        "a -> b", from_start=from_start, anchor=MessageAnchor(set() if runs is None else runs), **options
    )


def feed(zmtp: ZmtpDecoder, parts: Iterable[Part]) -> list[Event]:
    """All events of these parts, to the end. Raises: DecodeError."""
    events: list[Event] = []
    for part in parts:
        events += zmtp.gap(part) if isinstance(part, int) else zmtp.receive(part)
    return [*events, *zmtp.finish()]


def outcome(zmtp: ZmtpDecoder, parts: Iterable[Part]) -> tuple[list[Event], str]:
    """Events up to an error, and the error's text; nothing but a DecodeError is let through."""
    events: list[Event] = []
    try:
        for part in parts:
            for event in zmtp.gap(part) if isinstance(part, int) else zmtp.receive(part):
                events.append(event)
        for event in zmtp.finish():
            events.append(event)
    except DecodeError as error:
        return events, str(error)
    return events, ""


def in_pieces(parts: Iterable[Part], size: int) -> Iterator[Part]:
    """The same stream in pieces of at most `size` bytes, holes too."""
    for part in parts:
        if isinstance(part, int):
            yield from [min(size, part - at) for at in range(0, part, size)]
        else:
            yield from [part[at : at + size] for at in range(0, len(part), size)]
