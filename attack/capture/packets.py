"""Packet -> TCP segment: link layers, IPv4 and IPv6, the TCP header.

In comes one captured packet; out goes its segment, or the reason why it has none. Nothing is copied: a segment's
payload is a view of the packet. Refuses to know about connections (`reassembly.py`) and about files (`reader.py`).

Checksums are not verified. Where the sender leaves them to the network card, and on every loopback, a packet is
captured before they are filled in, so nearly all of them would look wrong.
"""

from __future__ import annotations

import enum
import functools
import ipaddress
import struct
from typing import Final, NamedTuple

# https://www.tcpdump.org/linktypes.html
LINK_NULL: Final = 0
LINK_ETHERNET: Final = 1
LINK_RAW: Final = 101
LINK_LOOP: Final = 108
LINK_LINUX_SLL: Final = 113
LINK_IPV4: Final = 228
LINK_IPV6: Final = 229
LINK_LINUX_SLL2: Final = 276

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
ACK: Final = 0x10

_ETHERTYPE_IP: Final = frozenset({0x0800, 0x86DD})
_ETHERTYPE_VLAN: Final = frozenset({0x8100, 0x88A8, 0x9100})

_PROTOCOL_TCP: Final = 6
_HOP_BY_HOP: Final = 0
_FRAGMENT: Final = 44
_AUTHENTICATION: Final = 51
_EXTENSIONS: Final = frozenset({_HOP_BY_HOP, 43, 60, 135, 139, 140, _FRAGMENT, _AUTHENTICATION})
_JUMBO: Final = 0xC2  # RFC 2675


class Packet(NamedTuple):
    """One packet of a capture.

    A named tuple, as `Segment` is: made for every packet, it costs 0.26 us where a frozen dataclass costs 0.65.
    """

    time: float
    """Seconds since the epoch; 0.0 where the file gives none."""
    link_type: int
    """What `data` begins with, as numbered by tcpdump.org."""
    data: memoryview
    """What was captured: a view of the file, no more than `original_length`."""
    original_length: int
    """Bytes that the packet had on the wire."""
    interface: int
    """Counts the interfaces of a capture, from 0."""


class Segment(NamedTuple):
    """One TCP segment."""

    source: str
    """Address and port, `127.0.0.1:5555` or `[::1]:5555`."""
    destination: str
    seq: int
    ack: int
    flags: int
    payload: memoryview
    """What was captured of the payload: its beginning."""
    length: int
    """Bytes of payload on the wire; more than `payload` has where the recorder cut the packet short."""
    time: float


class Skip(enum.StrEnum):
    """Why a packet has no segment."""

    LINK = "link layer not known"
    NOT_IP = "not IP"
    NOT_TCP = "not TCP"
    FRAGMENT = "IP fragment"
    CUT = "cut short within its headers"
    MALFORMED = "headers contradict themselves"


def parse_segment(packet: Packet) -> Segment | Skip:
    """The TCP segment that a packet carries.

        IPv4   version and header length 1 B, -, total length 2 B, -, flags and fragment offset 2 B, -, protocol 1 B, -,
               addresses 8 B, options
        IPv6   version and flow 4 B, payload length 2 B, next header 1 B, -, addresses 32 B, extension headers
        TCP    ports 4 B, seq 4 B, ack 4 B, header length in the upper half of 1 B, flags 1 B, ..., options

    The payload ends where IP says, so neither Ethernet's padding nor a checksum behind it is taken for payload. A
    length of 0 is what a segment has that is too big for the field (segmentation left to the card, BIG TCP): the
    packet's own length counts.
    """
    time, link_type, data, original_length, _ = packet
    try:
        at = _network_header(link_type, data)
        if isinstance(at, Skip):
            return at
        version = data[at] >> 4
        if version == 4:
            head, length, fragment, protocol, addresses = _IPV4(data, at)
            if fragment & 0x3FFF:  # more to come, or not the first
                return Skip.FRAGMENT
            tcp = at + 4 * (head & 0x0F)
            end = at + length
            if head & 0x0F < 5:
                return Skip.MALFORMED
        elif version == 6:
            length, protocol, addresses = _IPV6(data, at)
            tcp = at + 40
            end = tcp + length
            if protocol in _EXTENSIONS:
                protocol, tcp, jumbo = _skip_extensions(data, protocol, tcp)
                if protocol == _FRAGMENT:
                    return Skip.FRAGMENT
                if not length and jumbo:
                    length, end = jumbo, at + 40 + jumbo
        else:
            return Skip.NOT_IP
        if protocol != _PROTOCOL_TCP:
            return Skip.NOT_TCP
        if not length:
            end = max(original_length, len(data))
        ports, seq, ack, header, flags = _TCP(data, tcp)
    except (struct.error, IndexError):
        return Skip.CUT
    start = tcp + 4 * (header >> 4)
    if header < 0x50 or start > end:
        return Skip.MALFORMED
    source, destination = _endpoints(addresses + ports)
    return Segment(source, destination, seq, ack, flags, data[start:end], end - start, time)


_ETHERTYPE = struct.Struct(">H").unpack_from
_IPV4 = struct.Struct(">BxH2xHxB2x8s").unpack_from
_IPV6 = struct.Struct(">4xHBx32s").unpack_from
_TCP = struct.Struct(">4sIIBB").unpack_from
_JUMBO_LENGTH = struct.Struct(">I").unpack_from

# Where the protocol number stands, and where the header ends.
_FRAMES: Final = {LINK_ETHERNET: (12, 14), LINK_LINUX_SLL: (14, 16), LINK_LINUX_SLL2: (0, 20)}
# 12 and 14 are what some systems write for 101. BSD's loopbacks begin with an address family, which for IPv6 differs
# from system to system (10, 24, 28, 30): IP's own version field says the same without doubt.
_HEADER_LENGTH: Final = {LINK_RAW: 0, 12: 0, 14: 0, LINK_IPV4: 0, LINK_IPV6: 0, LINK_NULL: 4, LINK_LOOP: 4}


def _network_header(link_type: int, data: memoryview) -> int | Skip:
    """Where the IP header begins."""
    frame = _FRAMES.get(link_type)
    if frame is None:
        return _HEADER_LENGTH.get(link_type, Skip.LINK)
    (protocol,) = _ETHERTYPE(data, frame[0])
    at = frame[1]
    while protocol in _ETHERTYPE_VLAN:  # a tag: priority and number 2 B, then the protocol inside 2 B
        (protocol,) = _ETHERTYPE(data, at + 2)
        at += 4
    return at if protocol in _ETHERTYPE_IP else Skip.NOT_IP


def _skip_extensions(data: memoryview, protocol: int, at: int) -> tuple[int, int, int]:
    """Past IPv6 extension headers: what follows them, where, and the jumbo payload's length (0: none).

    Each is: next header 1 B, length 1 B (in units of 8 B, less one), content. A fragment ends the walk, except one that
    is the whole packet (RFC 6946).
    """
    jumbo = 0
    while protocol in _EXTENSIONS:
        length = 8 * (data[at + 1] + 1)
        if protocol == _AUTHENTICATION:
            length = 4 * (data[at + 1] + 2)
        elif protocol == _FRAGMENT:
            if _ETHERTYPE(data, at + 2)[0] & 0xFFF9:
                return _FRAGMENT, at, 0
            length = 8
        elif protocol == _HOP_BY_HOP and data[at + 2] == _JUMBO:
            (jumbo,) = _JUMBO_LENGTH(data, at + 4)  # its place is fixed by its alignment, if it is the only option
        protocol = data[at]
        at += length
    return protocol, at, jumbo


@functools.lru_cache(maxsize=1 << 16)
def _endpoints(addresses_and_ports: bytes) -> tuple[str, str]:
    """The two ends as text. Remembered, so that nothing is formatted twice for one connection."""
    half = len(addresses_and_ports) // 2 - 2
    texts = []
    for address, port in (
        (addresses_and_ports[:half], addresses_and_ports[-4:-2]),
        (addresses_and_ports[half:-4], addresses_and_ports[-2:]),
    ):
        ip = ipaddress.ip_address(address)
        texts.append(f"{ip}:{int.from_bytes(port)}" if ip.version == 4 else f"[{ip}]:{int.from_bytes(port)}")
    return texts[0], texts[1]
