from __future__ import annotations

import functools
import struct
from pathlib import Path

import dpkt
import pytest

from attack.capture.pcap import LARGEST_PACKET
from attack.capture.reader import CaptureReader
from attack.errors import CaptureError
from tests.attack.capture.helpers import conversation, write_with_dpkt


def pcap(order: str, magic: int, *, link_type: int = 1) -> bytes:
    """Two packets, one of which was cut."""
    header = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link_type)
    one = struct.pack(order + "IIII", 1_700_000_000, 999_999, 3, 3) + b"abc"
    return header + one + struct.pack(order + "IIII", 1_700_000_001, 5, 2, 9) + b"de"


@pytest.mark.parametrize("nano", [False, True])
def test_dpkts_files_are_read(tmp_path: Path, nano: bool) -> None:
    writer = functools.partial(dpkt.pcap.Writer, nano=nano)
    reader = CaptureReader(write_with_dpkt(tmp_path / "a.pcap", conversation(), writer=writer))
    assert [(one.time, bytes(one.data)) for one in reader] == conversation()
    assert reader.statistics.dropped is None


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("magic", "parts"), [(0xA1B2C3D4, 10**6), (0xA1B23C4D, 10**9)])
def test_either_byte_order_and_either_resolution(tmp_path: Path, order: str, magic: int, parts: int) -> None:
    path = tmp_path / "a.pcap"
    path.write_bytes(pcap(order, magic))
    assert list(CaptureReader(path)) == [
        (1_700_000_000 + 999_999 / parts, 1, b"abc", 3, 0),
        (1_700_000_001 + 5 / parts, 1, b"de", 9, 0),
    ]


def test_flags_above_the_link_type_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    path.write_bytes(pcap("<", 0xA1B2C3D4, link_type=0x14000071))
    assert {one.link_type for one in CaptureReader(path)} == {0x71}


def test_a_length_that_no_packet_has_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    path.write_bytes(pcap("<", 0xA1B2C3D4) + struct.pack("<IIII", 1, 1, LARGEST_PACKET + 1, LARGEST_PACKET + 1))
    packets = iter(CaptureReader(path))
    assert [bytes(next(packets).data), bytes(next(packets).data)] == [b"abc", b"de"]
    with pytest.raises(
        CaptureError, match=r"a\.pcap: byte 61: wanted a packet of at most 16777216 bytes, got 16777217"
    ):
        next(packets)
