"""Reads pcapng: several sections in either byte order, all three kinds of packet block, unknown blocks skipped.

In comes a file's bytes, out go its packets, as views. Refuses to know what the packets carry.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from attack.capture import pcapng
from attack.capture.packets import Packet
from attack.capture.statistics import Progress
from attack.errors import CaptureError

LARGEST_BLOCK: Final = 64 << 20
"""A block that claims more is damage, not a file cut short: no packet has 1 MiB, and Wireshark stops at 16 MiB."""
MOST_INTERFACES: Final = 1 << 16
"""In one section, so that a file of nothing but interfaces does not fill the memory."""


def read_pcapng(capture: memoryview, progress: Progress) -> Iterator[Packet]:
    """The packets, in order. Ends at a block that is cut off, and says so in `progress`.

    Raises: CaptureError at the first block that contradicts the format.
    """
    section = _Section(_LITTLE, first_interface=0, progress=progress)  # the first block names its own
    at, size = 0, len(capture)
    while at < size:
        progress.position = at
        if size - at < 12:
            progress.cut_at = at
            return
        kind, length = section.layout.pair(capture, at)
        if kind == pcapng.BLOCK_SECTION:
            layout = _byte_order(capture, at)
            section = _Section(layout, first_interface=section.next_interface, progress=progress)
            kind, length = layout.pair(capture, at)
        if length < 12 or length % 4 or length > LARGEST_BLOCK:
            raise _damaged(at, f"wanted a block length of 12 to {LARGEST_BLOCK} in steps of 4, got {length}")
        end = at + length
        if end > size:
            progress.cut_at = at
            return
        (again,) = section.layout.number(capture, end - 4)
        if again != length:
            raise _damaged(at, f"wanted the block's length, {length}, again at its end, got {again}")
        body = capture[at + 8 : end - 4]
        try:
            if kind == pcapng.BLOCK_PACKET:
                yield section.packet(body)
            elif kind == pcapng.BLOCK_SIMPLE_PACKET:
                yield section.simple_packet(body)
            elif kind == pcapng.BLOCK_OBSOLETE_PACKET:
                yield section.obsolete_packet(body)
            elif kind == pcapng.BLOCK_INTERFACE:
                section.add_interface(body)
            elif kind == pcapng.BLOCK_STATISTICS:
                section.count(body)
            elif kind == pcapng.BLOCK_SECTION:
                section.check_version(body)
        except struct.error:
            raise _damaged(at, f"wanted all the fields of a block of type {kind}, got {length} bytes") from None
        except _BlockError as error:
            raise _damaged(at, str(error)) from None
        at = end
    progress.position = at


class _BlockError(Exception):
    """What is wrong with a block, by somebody who does not know where it stands."""


class _Layout:
    """Numbers in one byte order."""

    def __init__(self, order: str) -> None:
        self.number = struct.Struct(order + "I").unpack_from
        self.pair = struct.Struct(order + "II").unpack_from
        self.wide = struct.Struct(order + "Q").unpack_from
        self.signed = struct.Struct(order + "q").unpack_from
        self.option = struct.Struct(order + "HH").unpack_from
        self.version = struct.Struct(order + "4xHH").unpack_from
        self.interface = struct.Struct(order + "H2xI").unpack_from
        self.packet = struct.Struct(order + "IIIII").unpack_from
        self.obsolete_packet = struct.Struct(order + "HHIIII").unpack_from


_DROPPED: Final = (pcapng.OPTION_STATISTICS_DROPPED, pcapng.OPTION_STATISTICS_DROPPED_BY_SYSTEM)
_LITTLE: Final = _Layout("<")
_BIG: Final = _Layout(">")


class _Interface:
    """What an interface's packets have in common, and how many of them are not in the file."""

    __slots__ = ("dropped", "link_type", "number", "offset_s", "snaplen", "ticks_per_second", "told")

    def __init__(self, number: int, link_type: int, snaplen: int) -> None:
        self.number, self.link_type, self.snaplen = number, link_type, snaplen
        self.ticks_per_second = 1_000_000
        self.offset_s = 0
        self.told = 0  # drops, according to the packets
        self.dropped = 0  # the larger of that and what the statistics blocks say, which count from the start


class _Section:
    """A section's byte order and interfaces: all that is needed to understand its other blocks."""

    def __init__(self, layout: _Layout, *, first_interface: int, progress: Progress) -> None:
        self.layout = layout
        self.interfaces: list[_Interface] = []
        self.next_interface = first_interface
        self._progress = progress

    def check_version(self, body: memoryview) -> None:
        major, minor = self.layout.version(body)
        if major != 1:
            raise _BlockError(f"wanted version 1 of the format, got {major}.{minor}")

    def add_interface(self, body: memoryview) -> None:
        """Link type 2 B, -, snaplen 4 B, options."""
        if len(self.interfaces) == MOST_INTERFACES:
            raise _BlockError(f"wanted at most {MOST_INTERFACES} interfaces in a section, got one more")
        interface = _Interface(self.next_interface, *self.layout.interface(body))
        for code, value in self._options(body, 8):
            if code == pcapng.OPTION_INTERFACE_RESOLUTION and len(value) == 1:
                # The top bit says whether the rest is a power of 2 or of 10.
                interface.ticks_per_second = 2 ** (value[0] & 0x7F) if value[0] & 0x80 else 10 ** value[0]
            elif code == pcapng.OPTION_INTERFACE_OFFSET and len(value) == 8:
                (interface.offset_s,) = self.layout.signed(value)
        self.interfaces.append(interface)
        self.next_interface += 1

    def packet(self, body: memoryview) -> Packet:
        """Interface 4 B, ticks 4 + 4 B (upper half first, in either byte order), captured and original length 4 B each,
        data, options."""
        number, high, low, captured, original = self.layout.packet(body)
        interface = self._interface(number)
        end = 20 + captured
        if len(body) - end >= 12:  # room for an option that counts
            for code, value in self._options(body, end + -end % 4):
                if code == pcapng.OPTION_PACKET_DROPS and len(value) == 8:
                    self._tell(interface, self.layout.wide(value)[0])
        time = (high << 32 | low) / interface.ticks_per_second + interface.offset_s
        return Packet(time, interface.link_type, _data(body, 20, end), original, interface.number)

    def obsolete_packet(self, body: memoryview) -> Packet:
        """As above, with 2 B of interface and 2 B of packets dropped since the one before (all ones: not known)."""
        number, drops, high, low, captured, original = self.layout.obsolete_packet(body)
        interface = self._interface(number)
        if drops != 0xFFFF:
            self._tell(interface, drops)
        time = (high << 32 | low) / interface.ticks_per_second + interface.offset_s
        return Packet(time, interface.link_type, _data(body, 20, 20 + captured), original, interface.number)

    def simple_packet(self, body: memoryview) -> Packet:
        """Original length 4 B, data, as much as the first interface's snaplen allows. There is no time."""
        (original,) = self.layout.number(body)
        interface = self._interface(0)
        captured = min(original, interface.snaplen or original)
        return Packet(0.0, interface.link_type, _data(body, 4, 4 + captured), original, interface.number)

    def count(self, body: memoryview) -> None:
        """Interface 4 B, ticks 8 B, options."""
        interface = self._interface(self.layout.number(body)[0])
        drops = [
            self.layout.wide(value)[0]
            for code, value in self._options(body, 12)
            if code in _DROPPED and len(value) == 8
        ]
        if drops:
            self._note_drops(interface, sum(drops))

    def _interface(self, number: int) -> _Interface:
        try:
            return self.interfaces[number]
        except IndexError:
            raise _BlockError(f"wanted one of the section's {len(self.interfaces)} interfaces, got {number}") from None

    def _tell(self, interface: _Interface, drops: int) -> None:
        interface.told += drops
        self._note_drops(interface, interface.told)

    def _note_drops(self, interface: _Interface, total: int) -> None:
        more = max(total - interface.dropped, 0)
        interface.dropped += more
        self._progress.dropped = (self._progress.dropped or 0) + more

    def _options(self, body: memoryview, at: int) -> Iterator[tuple[int, memoryview]]:
        """One that does not fit is the end of them: nothing that matters is lost by that."""
        while len(body) - at >= 4:
            code, length = self.layout.option(body, at)
            at += 4
            if code == pcapng.OPTION_END or length > len(body) - at:
                return
            yield code, body[at : at + length]
            at += length + -length % 4


def _data(body: memoryview, start: int, end: int) -> memoryview:
    if end > len(body):
        raise _BlockError(f"wanted {end - start} bytes of a packet, got a block with room for {len(body) - start}")
    return body[start:end]


def _byte_order(capture: memoryview, at: int) -> _Layout:
    for layout in (_LITTLE, _BIG):
        if layout.number(capture, at + 8)[0] == pcapng.BYTE_ORDER_MAGIC:
            return layout
    raise _damaged(at, f"wanted the byte order mark 1a2b3c4d of a section, got {capture[at + 8 : at + 12].hex()}")


def _damaged(at: int, what: str) -> CaptureError:
    return CaptureError(f"byte {at}: {what}; the capture is damaged there: what stands before can be read, no more")
