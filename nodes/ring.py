"""A ring of memory that the kernel fills with an interface's packets (AF_PACKET, TPACKET_V3).

In: an interface's name. Out: blocks of packets as views of the ring's own memory, and how many the kernel dropped.
Refuses to know what a packet says, and to send: the socket is read through its memory map alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import mmap
import socket
import struct
from collections.abc import Iterator
from typing import Self, TypeAlias

Packet: TypeAlias = tuple[int, int, memoryview, int]
"""Interface number, nanoseconds since the epoch, the bytes kept, and how many bytes the packet had."""

SNAPLEN = 262_144
"""Bytes kept of a packet: loopback hands over TCP segments of up to 64 KiB, and IPv6 jumbograms may be larger."""

LARGEST_BLOCK = 4 << 20
"""About 64 loopback packets: enough for one large write, and small enough that the kernel finds it in one piece."""

SMALLEST_BLOCK = 2 * SNAPLEN
"""A packet of any size that is kept fits."""

FEW_BLOCKS = 16
"""What a ring has at least, where its size allows. A block is gone with the first packet that waits RETIRE_MS in it, so
it is their number, not their bytes, that bridges the time in which the reader is held up: here a third of a second."""

RETIRE_MS = 20
"""The kernel hands over a block that is not yet full after this long."""

# linux/if_packet.h, linux/if_ether.h, linux/if_arp.h, asm-generic/socket.h
SOL_PACKET, PACKET_RX_RING, PACKET_STATISTICS, PACKET_VERSION, PACKET_IGNORE_OUTGOING = 263, 5, 6, 10, 23
TPACKET_V3, TP_STATUS_USER = 2, 1
ETH_P_ALL, SO_ATTACH_FILTER, ARPHRD_LOOPBACK = 0x0003, 26, 772
BPF_RETURN = 0x06

BLOCK_HEADER = struct.Struct("=8xIII")
"""struct tpacket_block_desc: version and private offset (skipped), status, packets, offset of the first packet."""
PACKET_HEADER = struct.Struct("=IIIII4xH")
"""struct tpacket3_hdr: offset of the next, seconds, nanoseconds, bytes kept, length, status (skipped), their place."""
STATUS = struct.Struct("=I")


@dataclasses.dataclass(kw_only=True, slots=True)
class Counts:
    """What the kernel says of a ring since it was opened."""

    received: int = 0
    """Packets that arrived, dropped ones included."""
    dropped: int = 0
    """Packets that found the ring full."""


def _block_bytes(num_bytes: int) -> int:
    """Size of a ring's blocks, a power of two as the kernel's pages want it."""
    size = LARGEST_BLOCK
    while size > SMALLEST_BLOCK and num_bytes // size < FEW_BLOCKS:
        size //= 2
    return size


class Ring:
    """The packets of one interface from now on. Reading never blocks; `fileno` can be polled for the next block."""

    def __init__(self, interface: str, *, number: int, num_bytes: int, incoming_only: bool) -> None:
        """Opens the ring; from the return on, every packet is in it or counted as dropped.

        Args:
            interface: such as `lo`.
            number: what the ring's packets carry as their interface.
            num_bytes: size of the ring; rounded down to whole blocks, and halved until the kernel grants it.
            incoming_only: leave out what this host sends through the interface. Always so on loopback, where each
                packet would otherwise be there twice.

        Raises: OSError, PermissionError among them where CAP_NET_RAW is missing.
        """
        self.interface = interface
        self.number = number
        self.counts = Counts()
        self.packets_read = 0
        """Packets of the blocks that were handed over and given back."""
        self._next_block = 0
        # Protocol 0: nothing arrives before the bind below, so no packet of another interface slips in.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            self._accept(SNAPLEN)
            self._socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
            self.block_bytes = _block_bytes(num_bytes)
            self.num_blocks = self._allocate(max(2, num_bytes // self.block_bytes))
            self._map = mmap.mmap(self._socket.fileno(), self.num_bytes)
            # getsockname() of a socket bound to an interface names its hardware type; protocol 0 keeps it silent.
            self._socket.bind((interface, 0))
            self.hardware_type: int = self._socket.getsockname()[3]
            if incoming_only or self.hardware_type == ARPHRD_LOOPBACK:
                self._socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            self._socket.bind((interface, ETH_P_ALL))
        except BaseException:
            self._socket.close()
            raise
        self._memory = memoryview(self._map)

    def _allocate(self, num_blocks: int) -> int:
        """Returns the number of blocks that the kernel granted."""
        while True:
            # Frames mean nothing to TPACKET_V3, which packs packets of any size; their product must fit all the same.
            frame_bytes = 1 << 16
            num_frames = num_blocks * (self.block_bytes // frame_bytes)
            request = struct.pack("=7I", self.block_bytes, num_blocks, frame_bytes, num_frames, RETIRE_MS, 0, 0)
            try:
                self._socket.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
                return num_blocks
            except OSError as error:
                if error.errno != errno.ENOMEM or num_blocks <= 2:
                    raise
                num_blocks //= 2

    def _accept(self, num_bytes: int) -> None:
        """Tells the kernel how many bytes of each packet to keep; 0 lets none in."""
        program = ctypes.create_string_buffer(struct.pack("=HBBI", BPF_RETURN, 0, 0, num_bytes))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(program)))

    def fileno(self) -> int:
        return self._socket.fileno()

    def error(self) -> int:
        """The errno that a poll for errors announced, such as ENETDOWN; 0 where there is none."""
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    @property
    def num_bytes(self) -> int:
        """Size of the ring, as the kernel granted it."""
        return self.num_blocks * self.block_bytes

    def blocks(self) -> Iterator[list[Packet]]:
        """The full blocks, oldest first, until there is none. A block's views end when the next one is asked for."""
        while True:
            block_at = self._next_block * self.block_bytes
            status, num_packets, first = BLOCK_HEADER.unpack_from(self._memory, block_at)
            if not status & TP_STATUS_USER:
                return
            try:
                yield self._packets(block_at + first, num_packets)
            finally:
                STATUS.pack_into(self._memory, block_at + 8, 0)  # the kernel's again
                self._next_block = (self._next_block + 1) % self.num_blocks
                self.packets_read += num_packets

    def _packets(self, at: int, num_packets: int) -> list[Packet]:
        packets: list[Packet] = []
        memory, unpack, number = self._memory, PACKET_HEADER.unpack_from, self.number
        for _ in range(num_packets):
            following, seconds, nanoseconds, kept, length, offset = unpack(memory, at)
            start = at + offset
            packets.append((number, seconds * 1_000_000_000 + nanoseconds, memory[start : start + kept], length))
            at += following
        return packets

    def count(self) -> Counts:
        """The counts since the ring was opened. The kernel's own start again at each call, hence the sum."""
        received, dropped, _ = struct.unpack("=III", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 12))
        self.counts.received += received
        self.counts.dropped += dropped
        return self.counts

    def stop(self) -> None:
        """Lets no more packets in. Those that arrived before are still handed over."""
        self._accept(0)

    @property
    def drained(self) -> bool:
        """True where every packet that the kernel put into the ring has been read."""
        counts = self.count()
        return self.packets_read == counts.received - counts.dropped

    def close(self) -> None:
        """Gives the memory back once no view of it is held any more."""
        self._socket.close()
        del self._memory, self._map  # not map.close(): it refuses while a view is alive, as in a traceback's frames

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
