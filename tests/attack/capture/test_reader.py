from __future__ import annotations

import os
import random
import re
from pathlib import Path

import dpkt
import pytest

from attack.capture.packets import Segment
from attack.capture.pcapng import PcapngWriter
from attack.capture.reader import CaptureReader
from attack.capture.reassembly import read_streams
from attack.capture.statistics import CaptureStatistics
from attack.capture.streams import Data
from attack.errors import CaptureError
from tests.attack.capture.helpers import conversation, tcp_frame, write_with_dpkt

WRITERS = {"pcapng": dpkt.pcapng.Writer, "pcap": dpkt.pcap.Writer}


def own_capture(path: Path) -> Path:
    with PcapngWriter(path.open("wb"), interfaces=[("lo", 1), ("eth0", 1)], comment="mutated") as writer:
        packets = [
            (index % 2, round(time * 1e9), memoryview(data), len(data))
            for index, (time, data) in enumerate(conversation())
        ]
        writer.write(packets)
        writer.statistics(0, received=9, dropped=2)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"time,rank\n1,2\n", r"not a capture: wanted pcapng or pcap, got a file that begins with b'time,rank\n1,2\n'"),
        (
            b"\x89PNG\r\n\x1a\n" + bytes(50),
            "not a capture: wanted pcapng or pcap, got a file that begins with b'\\x89PNG",
        ),
        (b"PK\x03\x04" + bytes(50), "a zip archive, as it seems: unpack it first"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip, as it seems: unpack it first"),
        (b"\n\r", "not a capture"),
    ],
)
def test_what_is_no_capture_is_one_line_that_says_so(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=re.escape(message)) as caught:
        CaptureReader(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_what_cannot_be_opened_is_one_line_that_says_why(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CaptureError, match="cannot be read: No such file or directory"):
        CaptureReader(tmp_path / "absent")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CaptureError, match="wanted a regular file"):
            CaptureReader(other)


def test_each_pass_begins_at_the_start_and_counts_for_itself(tmp_path: Path) -> None:
    reader = CaptureReader(own_capture(tmp_path / "a"))
    size = sum(len(data) for _, data in conversation())
    for _ in range(2):
        assert len(list(reader.segments())) == len(conversation())
        assert reader.statistics == CaptureStatistics(packets=7, bytes=size, dropped=2, skipped={}, cut_at=None)
    next(iter(reader))
    assert reader.statistics.packets == 1


def test_packets_without_a_segment_are_counted_by_reason(tmp_path: Path) -> None:
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    packets = [(1.0, arp), (2.0, tcp_frame(b"x")), (3.0, arp), (4.0, tcp_frame(b"x")[:20])]
    reader = CaptureReader(write_with_dpkt(tmp_path / "a", packets))
    assert len(list(reader.segments())) == 1
    assert reader.statistics.skipped == {"not IP": 2, "cut short within its headers": 1}


@pytest.mark.parametrize("kind", ["pcapng", "pcap"])
def test_a_file_cut_anywhere_gives_the_packets_before_and_says_where(tmp_path: Path, kind: str) -> None:
    path = write_with_dpkt(tmp_path / "whole", conversation(), writer=WRITERS[kind])
    content = path.read_bytes()
    ends = []
    for length in range(4, len(content) + 1):
        cut_file = tmp_path / f"cut{length}"  # a new name: emptying a file that was just written waits for the disk
        cut_file.write_bytes(content[:length])
        reader = CaptureReader(cut_file)
        data = [bytes(one.data) for one in reader]
        assert data == [data for _, data in conversation()[: len(data)]]
        cut_at = reader.statistics.cut_at
        if cut_at is None:
            ends.append(length)
        else:
            assert cut_at == max(ends, default=0)
    assert len(ends) == len(conversation()) + (2 if kind == "pcapng" else 1)
    assert ends[-1] == len(content)


@pytest.mark.parametrize("kind", ["own", "pcapng", "pcap"])
def test_random_damage_gives_packets_or_one_error_and_nothing_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "whole"
    own_capture(path) if kind == "own" else write_with_dpkt(path, conversation(), writer=WRITERS[kind])
    whole = path.read_bytes()
    rng = random.Random(kind)
    outcomes = set()
    for number in range(2500):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(damaged))
            what = rng.randrange(5)
            if what == 0:
                damaged[at] ^= 1 << rng.randrange(8)
            elif what == 1:
                damaged[at] = rng.choice([0, 0xFF, 0x7F, 0x80])
            elif what == 2:
                damaged[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", bytes(4), rng.randbytes(4)])
            elif what == 3:
                del damaged[at : at + rng.randrange(1, 9)]
            else:
                damaged[at:at] = rng.randbytes(rng.randrange(1, 9))
        damaged_file = tmp_path / f"damaged{number}"
        damaged_file.write_bytes(damaged)
        try:
            num_bytes = sum(len(event.payload) for event in read_streams(damaged_file) if isinstance(event, Data))
            outcomes.add("read")
            assert num_bytes <= len(damaged)
        except CaptureError as error:
            outcomes.add("refused")
            assert "\n" not in str(error)
        damaged_file.unlink()
    assert outcomes == {"read", "refused"}


def resident_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see how much memory is resident")
def test_memory_does_not_grow_with_the_length_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long.pcapng"
    frame = memoryview(tcp_frame(bytes(60_000)))
    with PcapngWriter(path.open("wb"), interfaces=[("lo", 1)]) as writer:
        writer.write((0, time, frame, len(frame)) for time in range(5000))
    assert path.stat().st_size > 300_000_000
    before, most, touched = resident_bytes(), 0, 0
    held = []
    for index, one in enumerate(CaptureReader(path)):
        touched += sum(one.data[::4096])  # every page
        if index % 100 == 0:
            most = max(most, resident_bytes())
            held.append(one.data)
    path.unlink()
    assert most - before < 80 << 20
    # What is held stays what it was, though its memory was handed back meanwhile.
    assert all(view == frame for view in held)


def test_segments_are_views_of_the_file(tmp_path: Path) -> None:
    reader = CaptureReader(own_capture(tmp_path / "a"))
    segments = list(reader.segments())
    assert all(isinstance(one, Segment) and one.payload.readonly for one in segments)
    assert {id(one.payload.obj) for one in segments} == {id(reader._map)}
