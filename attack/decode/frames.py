"""What one direction of a ZMTP connection says: the events that `zmtp.py` makes of its bytes. Values only."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

Holes: TypeAlias = tuple[tuple[int, int], ...]
"""Parts of a body that the capture does not hold, as (start, stop) in ascending order; their bytes read as zero."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Greeting:
    """The first 64 bytes of a direction."""

    offset: int
    version: tuple[int, int]
    mechanism: str
    """`NULL`, `PLAIN`, `CURVE` or another name."""
    as_server: bool
    """Whether the sender says that it is the security mechanism's server. libzmq 4.3.5 never does, so believe who sends
    WELCOME instead."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command frame: handshake, PING, PONG, SUBSCRIBE, CANCEL, ERROR or one that a later version defines."""

    offset: int
    name: str
    data: bytes

    @property
    def metadata(self) -> dict[str, bytes]:
        """Properties of a READY or INITIATE that is in clear, as `{"Socket-Type": b"DEALER"}`; else nothing.

        Each is: name length (1 byte), name, value length (4 bytes, big endian), value.
        """
        found: dict[str, bytes] = {}
        at = 0
        while self.name in ("READY", "INITIATE") and at < len(self.data):
            value_at = at + 1 + self.data[at] + 4
            stop = value_at + int.from_bytes(self.data[value_at - 4 : value_at], "big")
            name = self.data[at + 1 : value_at - 4]
            if value_at > len(self.data) or stop > len(self.data) or not is_text(name):
                return {}  # a box of CURVE, not metadata
            found[name.decode()] = self.data[value_at:stop]
            at = stop
        return found


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One frame of a message in clear."""

    offset: int
    """Of the frame's first byte, which is its flags, in the stream."""
    body_at: int
    """Offset of the body's first byte."""
    more: bool
    """Whether another frame of the same message follows."""
    body: bytearray
    """The caller's to keep: the decoder does not touch it again."""
    holes: Holes = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """One encrypted frame: only its size can be read."""

    offset: int
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """From here on it is not known where frames begin."""

    offset: int
    why: str
    by_hole: bool = True
    """False where nothing is missing: the stream just ended inside a frame."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """A frame provably begins here."""

    offset: int
    skipped: int
    """Bytes, captured or not, since framing was lost."""


Event: TypeAlias = Greeting | Command | Frame | Sealed | Lost | Resumed


def is_text(name: bytes) -> bool:
    """Names of mechanisms, commands and properties are letters, digits and `- _ . +`."""
    return name.isascii() and name.translate(None, b"-_.+").isalnum()
