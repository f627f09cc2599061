"""The pcapng file format, and its writer. What Wireshark and dumpcap write is read by `pcapng_reader.py`.

In go packets, out comes a file; what the packets carry is not looked at. The specification is draft-ietf-opsawg-pcapng.
Every block is

    type 4 B, length 4 B, body, padding to 4 B, the same length again 4 B

in the byte order of its section, and the length counts all of that. Options, at the end of most bodies, are

    code 2 B, length 2 B, value, padding to 4 B
"""

from __future__ import annotations

import io
import os
import struct
import time
from collections.abc import Iterable, Sequence
from typing import BinaryIO, Final, Self

BLOCK_SECTION: Final = 0x0A0D0D0A  # reads the same in either byte order
BLOCK_INTERFACE: Final = 1
BLOCK_OBSOLETE_PACKET: Final = 2
BLOCK_SIMPLE_PACKET: Final = 3
BLOCK_STATISTICS: Final = 5
BLOCK_PACKET: Final = 6

BYTE_ORDER_MAGIC: Final = 0x1A2B3C4D

OPTION_END: Final = 0
OPTION_COMMENT: Final = 1
OPTION_SECTION_APPLICATION: Final = 4
OPTION_INTERFACE_NAME: Final = 2
OPTION_INTERFACE_RESOLUTION: Final = 9
OPTION_INTERFACE_OFFSET: Final = 14
OPTION_STATISTICS_RECEIVED: Final = 4
OPTION_STATISTICS_DROPPED: Final = 5
OPTION_STATISTICS_DROPPED_BY_SYSTEM: Final = 7
OPTION_PACKET_DROPS: Final = 4

_MOST_PIECES: Final = 1023
"""Buffers in one system call: three for each packet, within the 1024 that Linux and macOS allow (IOV_MAX)."""


class PcapngWriter:
    """Writes packets, with times in nanoseconds.

    Packets go from the caller's memory to the file uncopied, some hundred of them in one system call, if the file is
    one of the operating system's. When a call returns, its packets are with the system: their memory may be used again.

    Any call may raise OSError, as when the disk is full. The blocks written until then stay readable; the last one may
    be incomplete, so cut it off or write no more.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        interfaces: Sequence[tuple[str, int]],
        snaplen: int = 262144,
        application: str = "gradtap",
        comment: str = "",
    ) -> None:
        """Writes the file's head.

        Args:
            file: open for writing, at its beginning; buffered or not.
            interfaces: name and link type of each; a packet names its own by the place in this list.
            snaplen: the most bytes kept of a packet; `write` cuts what is longer.
            comment: what a person should know of this recording; Wireshark shows it.
        """
        self._file = file
        self._descriptor = _descriptor(file)
        self._snaplen = snaplen
        about = _option(OPTION_SECTION_APPLICATION, application.encode())
        if comment:
            about += _option(OPTION_COMMENT, comment.encode())
        # The section's length, -1, is unknown.
        head = _block(BLOCK_SECTION, struct.pack("<IHHq", BYTE_ORDER_MAGIC, 1, 0, -1) + about + _NO_MORE_OPTIONS)
        for name, link_type in interfaces:
            options = _option(OPTION_INTERFACE_NAME, name.encode()) + _option(OPTION_INTERFACE_RESOLUTION, b"\x09")
            head += _block(BLOCK_INTERFACE, struct.pack("<HHI", link_type, 0, snaplen) + options + _NO_MORE_OPTIONS)
        self._put([head])

    def write(self, packets: Iterable[tuple[int, int, memoryview, int]]) -> int:
        """Writes packets and returns how many bytes that took.

        Args:
            packets: of each the interface, nanoseconds since the epoch, the bytes captured, and its length on the wire.
        """
        written = 0
        pieces: list[bytes | memoryview] = []
        for interface, time_ns, data, original_length in packets:
            captured = len(data)
            if captured > self._snaplen:
                captured = self._snaplen
                data = data[:captured]
            padding = -captured % 4
            length = 32 + captured + padding
            high, low = time_ns >> 32, time_ns & 0xFFFFFFFF
            pieces.append(_PACKET_HEAD.pack(BLOCK_PACKET, length, interface, high, low, captured, original_length))
            pieces.append(data)
            pieces.append(_PACKET_TAIL[padding].pack(length))
            if len(pieces) == _MOST_PIECES:
                written += self._put(pieces)
                pieces = []
        return written + self._put(pieces)

    def statistics(self, interface: int, *, received: int, dropped: int) -> int:
        """Writes how many packets reached an interface and how many of them were lost; returns the bytes written."""
        time_ns = time.time_ns()
        body = struct.pack("<III", interface, time_ns >> 32, time_ns & 0xFFFFFFFF)
        body += _option(OPTION_STATISTICS_RECEIVED, struct.pack("<Q", received))
        body += _option(OPTION_STATISTICS_DROPPED, struct.pack("<Q", dropped))
        return self._put([_block(BLOCK_STATISTICS, body + _NO_MORE_OPTIONS)])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, pieces: list[bytes | memoryview]) -> int:
        """Writes all of the pieces, however little of them the system takes at a time."""
        total = left = sum(map(len, pieces))
        while left:
            if self._descriptor is None:
                taken = self._file.write(b"".join(pieces))
            else:
                taken = os.writev(self._descriptor, pieces)
            left -= taken
            if left:
                pieces = _after(pieces, taken)
        return total


_PACKET_HEAD: Final = struct.Struct("<IIIIIII")
_PACKET_TAIL: Final = tuple(struct.Struct(f"<{padding}xI") for padding in range(4))
_NO_MORE_OPTIONS: Final = bytes(4)


def _descriptor(file: BinaryIO) -> int | None:
    """The system's own file behind a file object. None where there is none, or gzip stands between."""
    raw = getattr(file, "raw", file)
    if not isinstance(raw, io.FileIO):
        return None
    file.flush()
    return raw.fileno()


def _block(kind: int, body: bytes) -> bytes:
    length = 12 + len(body)
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _after(pieces: list[bytes | memoryview], taken: int) -> list[bytes | memoryview]:
    """What is left of the pieces when their first bytes have been taken."""
    for index, piece in enumerate(pieces):
        if taken < len(piece):
            return [memoryview(piece)[taken:], *pieces[index + 1 :]]
        taken -= len(piece)
    return []
