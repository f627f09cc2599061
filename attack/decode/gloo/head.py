"""The 48 bytes in front of every message between two Gloo pairs. A leaf: knows no streams, and no collectives."""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from attack.capture.streams import Bytes

HEAD_BYTES: Final = 48
HELLO_BYTES: Final = 8
"""What the side that connects says first: an i64, its own rank."""
MAX_WORLD: Final = 1 << 16
"""More ranks than this are not believed."""
MAX_PAYLOAD_BYTES: Final = 1 << 32
"""Broadcasts are one message, and torch cuts a module's state at 250 MiB; a user's own tensor may be larger."""

_LAYOUT: Final = struct.Struct("<6Q")


class Opcode(enum.IntEnum):
    """What a message is (gloo/transport/tcp/pair.h)."""

    SEND_BUFFER = 0
    """The old algorithms' payload, which torch does not use."""
    SEND_UNBOUND_BUFFER = 1
    """Payload."""
    NOTIFY_SEND_READY = 2
    NOTIFY_RECV_READY = 3


class Kind(enum.IntEnum):
    """Which collective a slot belongs to: the prefix of its number (gloo/types.h)."""

    POINT_TO_POINT = 0
    """No collective, and no prefix: send and receive of two ranks (ProcessGroupGloo::send), and monitored_barrier."""
    GATHER = 1
    ALLGATHER = 2
    REDUCE = 3
    ALLREDUCE = 4
    SCATTER = 5
    BROADCAST = 6
    BARRIER = 7
    ALLTOALL = 8


class Slot(NamedTuple):
    """(kind << 56) | (tag << 24) | delta; between two ranks the caller's tag alone, below 2**32.

    Messages of one slot keep their order on a link; others overtake them.
    """

    kind: Kind
    tag: int
    """Counts the collectives of a process group, alike on all of its ranks; between two ranks, the caller's own."""
    delta: int


class Head(NamedTuple):
    """One head, checked."""

    opcode: Opcode
    slot: Slot
    payload: int
    """Bytes that follow it. Announcements are followed by none, whatever they announce."""
    length: int
    """Bytes of the payload, sent or announced."""


def parse_head(data: Bytes, at: int = 0) -> Head | None:
    """The head at a place, or None where these bytes are not one.

    Six u64, little endian: bytes of head and payload | opcode | slot | offset | payload, sent or announced | roffset.
    Both offsets are zero in what torch sends.
    """
    size, opcode, slot, offset, length, roffset = _LAYOUT.unpack_from(data, at)
    if not 1 <= opcode <= 3 or offset or roffset or slot >> 56 > max(Kind) or 0 < slot >> 32 < 1 << 24:
        return None
    payload = length if opcode == Opcode.SEND_UNBOUND_BUFFER else 0
    if size != HEAD_BYTES + payload or length > MAX_PAYLOAD_BYTES:
        return None
    kind = Kind(slot >> 56)
    between_two = kind is Kind.POINT_TO_POINT
    parts = (slot, 0) if between_two else (slot >> 24 & 0xFFFF_FFFF, slot & 0xFF_FFFF)
    return Head(Opcode(opcode), Slot(kind, *parts), payload, length)


def pack_head(opcode: Opcode, slot: Slot, length: int) -> bytes:
    """The inverse; `length` is of the payload, sent or announced."""
    payload = length if opcode is Opcode.SEND_UNBOUND_BUFFER else 0
    number = slot.tag if slot.kind is Kind.POINT_TO_POINT else slot.kind << 56 | slot.tag << 24 | slot.delta
    return _LAYOUT.pack(HEAD_BYTES + payload, opcode, number, 0, length, 0)
