from __future__ import annotations

import struct

import dpkt
import pytest

from attack.capture.packets import ACK, Segment, Skip, parse_segment
from tests.attack.capture.helpers import packet, tcp_frame

TCP = dpkt.tcp.TCP(sport=40000, dport=5555, seq=7, ack=9, flags=ACK, data=b"payload")
IPV4 = dpkt.ip.IP(src=b"\x7f\0\0\1", dst=b"\x7f\0\0\2", p=6, data=TCP)
IPV6 = dpkt.ip6.IP6(src=bytes(15) + b"\1", dst=bytes(15) + b"\2", nxt=6, hlim=64, plen=len(bytes(TCP)), data=TCP)
V4, V6 = bytes(IPV4), bytes(IPV6)


def ethernet(kind: int, content: bytes) -> bytes:
    return bytes(12) + struct.pack(">H", kind) + content


def ipv6(kind: int, content: bytes, *, length: int | None = None) -> bytes:
    length = len(content) if length is None else length
    return struct.pack(">IHBB", 6 << 28, length, kind, 64) + V6[8:40] + content


def ipv4_with(at: int, value: bytes) -> bytes:
    return V4[:at] + value + V4[at + len(value) :]


def parse(data: bytes, *, link_type: int = 1, original_length: int | None = None) -> Segment:
    segment = parse_segment(packet(data, link_type=link_type, original_length=original_length))
    assert isinstance(segment, Segment), segment
    return segment


@pytest.mark.parametrize(
    ("link_type", "data"),
    {
        "ethernet": (1, ethernet(0x0800, V4)),
        "one VLAN tag": (1, ethernet(0x8100, b"\0\5\x08\0" + V4)),
        "two VLAN tags": (1, ethernet(0x88A8, b"\0\5\x81\0\0\6\x08\0" + V4)),
        "padded": (1, ethernet(0x0800, V4) + bytes(20)),
        "cooked": (113, bytes(dpkt.sll.SLL(type=0, hrd=772, hlen=6, hdr=bytes(8), ethtype=0x0800, data=IPV4))),
        "cooked, version 2": (276, bytes(dpkt.sll2.SLL2(ethtype=0x0800, intindex=1, data=IPV4))),
        "raw": (101, V4),
        "IPv4": (228, V4),
        "BSD loopback": (0, b"\2\0\0\0" + V4),
        "OpenBSD loopback": (108, b"\0\0\0\2" + V4),
        "options": (101, b"\x47" + V4[1:2] + struct.pack(">H", len(V4) + 8) + V4[4:20] + b"\1" * 8 + V4[20:]),
    }.values(),
)
def test_ipv4_is_found_behind_every_link_layer(link_type: int, data: bytes) -> None:
    segment = parse(data, link_type=link_type)
    assert segment == ("127.0.0.1:40000", "127.0.0.2:5555", 7, 9, ACK, b"payload", 7, 1.0)


ATOMIC_FRAGMENT = bytes([6, 0, 0, 0]) + bytes(4)
HOP_BY_HOP = bytes([6, 0, 1, 4, 0, 0, 0, 0])
ROUTING = bytes([60, 2]) + bytes(22)
DESTINATION = bytes([51, 0, 1, 4, 0, 0, 0, 0])
AUTHENTICATION = bytes([6, 4]) + bytes(22)


@pytest.mark.parametrize(
    ("link_type", "data"),
    {
        "ethernet": (1, ethernet(0x86DD, V6)),
        "raw": (101, V6),
        "IPv6": (229, V6),
        "macOS loopback": (0, b"\x1e\0\0\0" + V6),
        "hop by hop": (101, ipv6(0, HOP_BY_HOP + bytes(TCP))),
        "atomic fragment": (101, ipv6(44, ATOMIC_FRAGMENT + bytes(TCP))),
        "several": (101, ipv6(43, ROUTING + DESTINATION + AUTHENTICATION + bytes(TCP))),
    }.values(),
)
def test_ipv6_is_found_behind_its_extension_headers(link_type: int, data: bytes) -> None:
    segment = parse(data, link_type=link_type)
    assert segment == ("[::1]:40000", "[::2]:5555", 7, 9, ACK, b"payload", 7, 1.0)


def test_tcp_options_are_no_payload() -> None:
    header = bytes(TCP)[:12] + b"\x80" + bytes(TCP)[13:20] + bytes(12)
    assert (
        parse(bytes(IPV4)[:2] + struct.pack(">H", 20 + 32 + 3) + V4[4:20] + header + b"abc", link_type=101).payload
        == b"abc"
    )


def test_a_segment_too_big_for_ipv4s_length_field_has_the_packets_length() -> None:
    segment = parse(ipv4_with(2, b"\0\0"), link_type=101)
    assert (segment.payload, segment.length) == (b"payload", 7)
    segment = parse(ipv4_with(2, b"\0\0"), link_type=101, original_length=len(V4) + 100_000)
    assert (segment.payload, segment.length) == (b"payload", 100_007)


def test_a_jumbogram_has_the_length_of_its_option() -> None:
    content = bytes(TCP)[:20] + bytes(80_000)
    jumbo = bytes([6, 0, 0xC2, 4]) + struct.pack(">I", 8 + len(content))
    data = ipv6(0, jumbo + content, length=0) + b"trailer"
    assert parse(data, link_type=101).length == 80_000


def test_an_ipv6_length_of_zero_without_the_option_is_the_packets_length() -> None:
    assert parse(ipv6(6, bytes(TCP), length=0), link_type=101).payload == b"payload"


def test_a_packet_cut_short_says_how_long_its_payload_was() -> None:
    whole = tcp_frame(b"x" * 1000)
    for kept in range(len(whole) + 1):
        segment = parse_segment(packet(whole[:kept], original_length=len(whole)))
        if kept < 54:
            assert segment is Skip.CUT if kept < 48 else True
        else:
            assert isinstance(segment, Segment)
            assert (len(segment.payload), segment.length) == (kept - 54, 1000)


@pytest.mark.parametrize(
    ("link_type", "data", "reason"),
    {
        "802.11": (105, V4, Skip.LINK),
        "ARP": (1, ethernet(0x0806, bytes(28)), Skip.NOT_IP),
        "version 5": (101, b"\x55" + V4[1:], Skip.NOT_IP),
        "UDP": (101, ipv4_with(9, b"\x11"), Skip.NOT_TCP),
        "ESP": (101, ipv6(50, bytes(TCP)), Skip.NOT_TCP),
        "first fragment": (101, ipv4_with(6, b"\x20\0"), Skip.FRAGMENT),
        "later fragment": (101, ipv4_with(6, b"\0\x10"), Skip.FRAGMENT),
        "IPv6 fragment": (101, ipv6(44, b"\6\0\0\1" + bytes(4) + bytes(TCP)), Skip.FRAGMENT),
        "nothing": (1, b"", Skip.CUT),
        "only a tag": (1, ethernet(0x8100, b""), Skip.CUT),
        "a short IP header": (101, b"\x41" + V4[1:], Skip.MALFORMED),
        "a short TCP header": (101, ipv4_with(32, b"\x40"), Skip.MALFORMED),
        "a TCP header beyond the packet": (101, ipv4_with(32, b"\xf0"), Skip.MALFORMED),
        "a length below the headers": (101, ipv4_with(2, b"\0\x20"), Skip.MALFORMED),
    }.values(),
)
def test_a_packet_without_a_segment_says_why(link_type: int, data: bytes, reason: Skip) -> None:
    assert parse_segment(packet(data, link_type=link_type)) is reason


def test_do_not_fragment_is_no_fragment() -> None:
    assert parse(ipv4_with(6, b"\x40\0"), link_type=101).payload == b"payload"


def test_the_names_of_the_ends_are_made_once() -> None:
    one, other = parse(tcp_frame(b"a")), parse(tcp_frame(b"b"))
    assert one.source is other.source and one.destination is other.destination
