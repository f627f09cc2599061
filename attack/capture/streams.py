"""What a capture is turned into: for each direction of each TCP connection, ordered bytes with explicit holes.

The events of one stream tile it: each `Data` or `Gap` begins at the offset at which the one before ended, so the bytes
and the holes together are all that was sent between the first and the last event.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """One direction of one TCP connection."""

    source: str
    """Address and port, `127.0.0.1:5555` or `[::1]:5555`."""
    destination: str
    incarnation: int = 0
    """Counts connections that used the same two ports one after the other."""

    @property
    def reverse(self) -> Flow:
        """The other direction of the same connection."""
        return Flow(source=self.destination, destination=self.source, incarnation=self.incarnation)

    def __str__(self) -> str:
        again = f" (connection {self.incarnation + 1})" if self.incarnation else ""
        return f"{self.source} -> {self.destination}{again}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """The first that was seen of a stream."""

    flow: Flow
    time: float
    """Seconds since the epoch."""
    from_start: bool
    """True where the connection's SYN was seen: offset 0 is then the first byte that was ever sent."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Bytes of a stream, in order. `payload` may be a view of the capture: copy what is kept."""

    flow: Flow
    time: float
    offset: int
    payload: Bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """A hole in a stream: bytes that were sent and are not in the capture.

    Its length is what TCP's sequence numbers say, which start again after 4 GiB: a hole longer than that looks shorter.
    """

    flow: Flow
    time: float
    offset: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Closed:
    """No more events of this stream will come."""

    flow: Flow
    time: float
    how: str
    """`fin`, `reset` or `capture ended`; `replaced` where a new connection took the two ports before this one was seen
    to end; `forgotten` where too many other connections came to keep this one's state."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conflict:
    """Bytes that were captured twice, and differed: a damaged copy, or a forged one.

    `Data` has the copy that came first, before this event or after it. Neither copy is proven, since the receiver kept
    only one and checksums are not verified: trust nothing that is built from these bytes. A conflict is no part of the
    tiling.
    """

    flow: Flow
    time: float
    offset: int
    """Of the first byte that differs."""
    length: int
    """Up to the last byte that differs."""


StreamEvent: TypeAlias = Opened | Data | Gap | Closed | Conflict
