"""Reads classic pcap files: times in micro- or nanoseconds, either byte order.

In comes a file's bytes, out go its packets, as views. Refuses to know what the packets carry. The layout:

    file     magic 4 B, version 2 + 2 B, - 8 B, snaplen 4 B, link type 4 B (its upper half are flags)
    packet   seconds 4 B, micro- or nanoseconds 4 B, captured length 4 B, original length 4 B, data
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from attack.capture.packets import Packet
from attack.capture.statistics import Progress
from attack.errors import CaptureError

# As the file's first bytes stand: byte order, and parts of a second.
MAGICS: Final = {
    bytes.fromhex("d4c3b2a1"): ("<", 1_000_000),
    bytes.fromhex("a1b2c3d4"): (">", 1_000_000),
    bytes.fromhex("4d3cb2a1"): ("<", 1_000_000_000),
    bytes.fromhex("a1b23c4d"): (">", 1_000_000_000),
}
FILE_HEADER_BYTES: Final = 24
LARGEST_PACKET: Final = 16 << 20
"""A record that claims more is damage, not a file cut short: libpcap's own limit is 256 KiB, BIG TCP's 512 KiB."""


def read_pcap(capture: memoryview, progress: Progress) -> Iterator[Packet]:
    """The packets, in order. Ends at a packet that is cut off, and says so in `progress`.

    Raises: CaptureError at the first packet that contradicts the format.
    """
    order, parts = MAGICS[bytes(capture[:4])]
    if len(capture) < FILE_HEADER_BYTES:
        progress.cut_at = 0
        return
    (link_type,) = struct.unpack_from(order + "I", capture, 20)
    link_type &= 0xFFFF
    header = struct.Struct(order + "IIII").unpack_from
    at, size = FILE_HEADER_BYTES, len(capture)
    while at < size:
        progress.position = at
        if size - at < 16:
            progress.cut_at = at
            return
        seconds, fraction, captured, original = header(capture, at)
        if captured > LARGEST_PACKET:
            raise CaptureError(
                f"byte {at}: wanted a packet of at most {LARGEST_PACKET} bytes, got {captured};"
                " the capture is damaged there: what stands before can be read, no more"
            )
        start = at + 16
        at = start + captured
        if at > size:
            progress.cut_at = start - 16
            return
        yield Packet(seconds + fraction / parts, link_type, capture[start:at], original, 0)
    progress.position = at
