from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import dpkt
import pytest

from attack.capture.packets import Packet
from attack.capture.pcapng_reader import read_pcapng
from attack.capture.reader import CaptureReader
from attack.capture.statistics import Progress
from attack.errors import CaptureError
from tests.attack.capture.helpers import conversation, write_with_dpkt


class Blocks:
    """Writes blocks in one byte order, field by field as the specification lists them."""

    def __init__(self, order: str) -> None:
        self.order = order

    def block(self, kind: int, fields: str, *values: object, tail: bytes = b"") -> bytes:
        body = struct.pack(self.order + fields, *values) + tail
        body += bytes(-len(body) % 4)
        length = struct.pack(self.order + "I", 12 + len(body))
        return struct.pack(self.order + "I", kind) + length + body + length

    def option(self, code: int, value: bytes) -> bytes:
        return struct.pack(self.order + "HH", code, len(value)) + value + bytes(-len(value) % 4)

    def section(self, *, major: int = 1) -> bytes:
        return self.block(0x0A0D0D0A, "IHHq", 0x1A2B3C4D, major, 0, -1)

    def interface(self, *, link_type: int = 1, snaplen: int = 0, options: bytes = b"") -> bytes:
        return self.block(1, "HHI", link_type, 0, snaplen, tail=options)

    def packet(self, data: bytes, *, ticks: int = 0, interface: int = 0, options: bytes = b"") -> bytes:
        padded = data + bytes(-len(data) % 4)
        fields = (interface, ticks >> 32, ticks & 0xFFFFFFFF, len(data), len(data) + 1)
        return self.block(6, "IIIII", *fields, tail=padded + options)

    def statistics(self, *, options: bytes, interface: int = 0) -> bytes:
        return self.block(5, "III", interface, 0, 0, tail=options)

    def count(self, value: int) -> bytes:
        return struct.pack(self.order + "Q", value)


def read(content: bytes) -> tuple[list[Packet], Progress]:
    progress = Progress()
    return list(read_pcapng(memoryview(content), progress)), progress


@pytest.fixture(params=["<", ">"])
def blocks(request: pytest.FixtureRequest) -> Blocks:
    return Blocks(request.param)


def test_dpkts_files_are_read(tmp_path: Path) -> None:
    reader = CaptureReader(write_with_dpkt(tmp_path / "a.pcapng", conversation()))
    assert [(one.time, bytes(one.data)) for one in reader] == conversation()


def test_dpkts_big_endian_files_are_read(tmp_path: Path) -> None:
    # Its writer has the machine's own order; its blocks have either.
    content = bytes(dpkt.pcapng.SectionHeaderBlock()) + bytes(dpkt.pcapng.InterfaceDescriptionBlock(snaplen=1 << 16))
    for _, data in conversation():
        content += bytes(dpkt.pcapng.EnhancedPacketBlock(caplen=len(data), pkt_len=len(data), pkt_data=data))
    path = tmp_path / "a.pcapng"
    path.write_bytes(content)
    assert [bytes(one.data) for one in CaptureReader(path)] == [data for _, data in conversation()]


def test_the_common_blocks(blocks: Blocks) -> None:
    content = blocks.section() + blocks.interface(link_type=113) + blocks.packet(b"hello", ticks=1_500_000)
    assert read(content)[0] == [(1.5, 113, b"hello", 6, 0)]


@pytest.mark.parametrize(
    ("resolution", "seconds"), [(6, 3e6), (9, 3e3), (0, 3e12), (0x80, 3e12), (0x94, 3e12 / 2**20), (127, 3e-115)]
)
def test_every_resolution_of_time(blocks: Blocks, resolution: int, seconds: float) -> None:
    options = blocks.option(9, bytes([resolution])) + blocks.option(0, b"")
    ((time, *_),), _ = read(blocks.section() + blocks.interface(options=options) + blocks.packet(b"", ticks=3 * 10**12))
    assert time == pytest.approx(seconds, rel=1e-15)


def test_times_may_be_counted_from_elsewhere(blocks: Blocks) -> None:
    options = blocks.option(14, struct.pack(blocks.order + "q", -100))
    ((time, *_),), _ = read(blocks.section() + blocks.interface(options=options) + blocks.packet(b"", ticks=10**6))
    assert time == -99.0


def test_simple_packets_have_no_time_and_their_interfaces_snaplen(blocks: Blocks) -> None:
    whole, cut = blocks.block(3, "I", 2, tail=b"ab"), blocks.block(3, "I", 9, tail=b"abcd")
    assert read(blocks.section() + blocks.interface(snaplen=4) + whole + cut)[0] == [
        (0.0, 1, b"ab", 2, 0),
        (0.0, 1, b"abcd", 9, 0),
    ]


def test_obsolete_packets_say_how_many_were_dropped_before(blocks: Blocks) -> None:
    def obsolete(drops: int) -> bytes:
        return blocks.block(2, "HHIIII", 0, drops, 0, 7_000_000, 3, 5, tail=b"abc")

    packets, progress = read(blocks.section() + blocks.interface() + obsolete(4) + obsolete(0xFFFF) + obsolete(2))
    assert packets == [(7.0, 1, b"abc", 5, 0)] * 3
    assert progress.dropped == 6


def test_packets_say_how_many_were_dropped_before(blocks: Blocks) -> None:
    dropped = blocks.option(2, b"\0\0\0\1") + blocks.option(4, blocks.count(5)) + blocks.option(0, b"")
    content = blocks.section() + blocks.interface() + blocks.packet(b"abc", options=dropped) * 2
    packets, progress = read(content)
    assert [bytes(one.data) for one in packets] == [b"abc"] * 2
    assert progress.dropped == 10


def test_statistics_count_from_the_start_so_the_newest_holds(blocks: Blocks) -> None:
    def statistics(*drops: int) -> bytes:
        options = b"".join(blocks.option(code, blocks.count(value)) for code, value in zip((5, 7), drops, strict=False))
        return blocks.statistics(options=blocks.option(4, blocks.count(1000)) + options)

    head = blocks.section() + blocks.interface()
    assert read(head)[1].dropped is None
    assert read(head + statistics())[1].dropped is None
    assert read(head + statistics(0))[1].dropped == 0
    assert read(head + statistics(3) + statistics(5, 2))[1].dropped == 7
    # The packets told of the same drops.
    told = blocks.packet(b"", options=blocks.option(4, blocks.count(4)))
    assert read(head + told + statistics(6))[1].dropped == 6
    assert read((head + statistics(3)) * 2)[1].dropped == 6


def test_sections_follow_each_other_in_either_order() -> None:
    little, big = Blocks("<"), Blocks(">")
    parts = [
        part
        for blocks in (little, big, little)
        for part in (
            blocks.section(),
            blocks.interface(),
            blocks.interface(link_type=101),
            blocks.packet(b"x", interface=1),
        )
    ]
    assert read(b"".join(parts))[0] == [(0.0, 101, b"x", 2, number) for number in (1, 3, 5)]


def test_unknown_blocks_are_passed_over(blocks: Blocks) -> None:
    unknown = blocks.block(0x80000BAD, "I", 7, tail=b"whatever this is") + blocks.block(4, "I", 0)
    packets, progress = read(blocks.section() + unknown + blocks.interface() + unknown + blocks.packet(b"x") + unknown)
    assert len(packets) == 1 and progress.cut_at is None


def test_options_that_do_not_fit_are_the_end_of_the_options(blocks: Blocks) -> None:
    options = struct.pack(blocks.order + "HH", 9, 500) + b"\6\0\0\0"
    assert len(read(blocks.section() + blocks.interface(options=options) + blocks.packet(b"x"))[0]) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda blocks: blocks.packet(b"x", interface=1), "wanted one of the section's 1 interfaces, got 1"),
        (lambda blocks: blocks.statistics(options=b"", interface=9), "wanted one of the section's 1 interfaces, got 9"),
        (lambda blocks: blocks.block(6, "I", 0), "wanted all the fields of a block of type 6, got 16 bytes"),
        (
            lambda blocks: blocks.block(6, "IIIII", 0, 0, 0, 9, 9, tail=b"x"),
            "wanted 9 bytes of a packet, got a block with",
        ),
        (lambda blocks: blocks.block(3, "I", 9, tail=b"x"), "wanted 9 bytes of a packet, got a block with room for 4"),
        (lambda blocks: blocks.packet(b"x")[:-4] + b"abcd", "wanted the block's length, 36, again at its end, got"),
        (lambda blocks: bytes(64), "wanted a block length of 12 to 67108864 in steps of 4, got 0"),
        (lambda blocks: struct.pack(blocks.order + "II", 6, 33) + bytes(64), "in steps of 4, got 33"),
        (
            lambda blocks: struct.pack(blocks.order + "II", 6, 0xFFFFFFF0) + bytes(64),
            "67108864 in steps of 4, got 4294967280",
        ),
        (lambda blocks: blocks.section(major=2), "wanted version 1 of the format, got 2.0"),
        (
            lambda blocks: blocks.section()[:8] + b"abcd" + bytes(16),
            "wanted the byte order mark 1a2b3c4d of a section, got",
        ),
    ],
)
def test_damage_is_one_line_that_says_where(blocks: Blocks, damage: Callable[[Blocks], bytes], message: str) -> None:
    before = blocks.section() + blocks.interface() + blocks.packet(b"good")
    packets = read_pcapng(memoryview(before + damage(blocks)), Progress())
    assert bytes(next(packets).data) == b"good"
    with pytest.raises(CaptureError) as caught:
        next(packets)
    assert str(caught.value).startswith(f"byte {len(before)}: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_nothing_but_interfaces_is_refused_before_it_fills_the_memory() -> None:
    blocks = Blocks("<")
    with pytest.raises(CaptureError, match="wanted at most 65536 interfaces in a section, got one more"):
        read(blocks.section() + blocks.interface() * 65537)
