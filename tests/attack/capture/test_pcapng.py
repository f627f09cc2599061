from __future__ import annotations

import gzip
import io
import os
import resource
import signal
from pathlib import Path
from typing import Any

import dpkt
import pytest

from attack.capture.pcapng import PcapngWriter
from attack.capture.reader import CaptureReader

PACKETS = [
    (index % 2, 1_700_000_000_123_456_789 + index * 1_000_003, os.urandom(index), index) for index in range(1500)
]
VIEWS = [(interface, time, memoryview(data), length) for interface, time, data, length in PACKETS]
INTERFACES = [("lo", 1), ("eth0", 101)]


def write(file: io.IOBase, **options: Any) -> int:
    writer = PcapngWriter(file, interfaces=INTERFACES, **options)
    return writer.write(VIEWS)


def test_dpkt_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    with path.open("wb") as file:
        write(file)
    with path.open("rb") as file:
        reader = dpkt.pcapng.Reader(file)
        read = list(reader)
        assert reader.datalink() == 1
    assert [data for _, data in read] == [data for _, _, data, _ in PACKETS]
    # dpkt divides in decimal, with rounding; a float's own resolution is 240 ns at this time.
    assert all(
        abs(float(time) - wanted / 1e9) < 1e-6 for (time, _), (_, wanted, _, _) in zip(read, PACKETS, strict=True)
    )


def test_our_reader_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    with path.open("wb", buffering=0) as file:
        write(file)
    read = list(CaptureReader(path))
    assert [(one.interface, bytes(one.data), one.original_length) for one in read] == [
        (interface, data, length) for interface, _, data, length in PACKETS
    ]
    assert [one.time for one in read] == [time / 10**9 for _, time, _, _ in PACKETS]
    assert {one.interface: one.link_type for one in read} == {0: 1, 1: 101}


@pytest.mark.parametrize("kind", ["buffered", "unbuffered", "memory", "gzip"])
def test_every_kind_of_file_gets_the_same_bytes(tmp_path: Path, kind: str) -> None:
    wanted = io.BytesIO()
    written = write(wanted)
    path = tmp_path / "a"
    if kind == "memory":
        content = wanted.getvalue()
    elif kind == "gzip":
        with gzip.open(path, "wb") as file:
            write(file)
        content = gzip.decompress(path.read_bytes())
    else:
        with path.open("wb", buffering=0 if kind == "unbuffered" else -1) as file:
            write(file)
        content = path.read_bytes()
    assert content == wanted.getvalue()
    head = io.BytesIO()
    PcapngWriter(head, interfaces=INTERFACES)
    assert written == len(content) - len(head.getvalue())


def test_many_packets_take_few_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, pieces: calls.append(len(pieces)) or real(descriptor, pieces))
    with (tmp_path / "a").open("wb") as file:
        write(file)
    assert len(calls) == 1 + -(-len(PACKETS) // 341)


def test_a_system_that_takes_little_at_a_time_gets_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = io.BytesIO()
    write(wanted)
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, pieces: real(descriptor, [b"".join(pieces)[:5000]]))
    with (tmp_path / "a").open("wb") as file:
        write(file)
    assert (tmp_path / "a").read_bytes() == wanted.getvalue()


def test_memory_may_be_used_again_once_it_is_written(tmp_path: Path) -> None:
    buffer = bytearray(b"first")
    with (tmp_path / "a").open("wb") as file:
        writer = PcapngWriter(file, interfaces=INTERFACES)
        writer.write([(0, 1, memoryview(buffer), 5)])
        buffer[:] = b"other"
    assert [bytes(one.data) for one in CaptureReader(tmp_path / "a")] == [b"first"]


def test_a_packet_longer_than_snaplen_is_cut_and_keeps_its_length(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        PcapngWriter(file, interfaces=INTERFACES, snaplen=10).write([(0, 1, memoryview(bytes(25)), 30)])
    (one,) = CaptureReader(tmp_path / "a")
    assert (len(one.data), one.original_length) == (10, 30)


def test_statistics_comment_and_application_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with PcapngWriter(path.open("wb"), interfaces=INTERFACES, application="app", comment="say so") as writer:
        writer.statistics(0, received=100, dropped=7)
        writer.statistics(1, received=50, dropped=2)
    reader = CaptureReader(path)
    assert list(reader) == []
    assert reader.statistics.dropped == 9
    content = path.read_bytes()
    section = dpkt.pcapng.SectionHeaderBlockLE(content[: int.from_bytes(content[4:8], "little")])
    options = {option.code: bytes(option.data) for option in section.opts if option.code}
    assert options == {dpkt.pcapng.PCAPNG_OPT_SHB_USERAPPL: b"app", dpkt.pcapng.PCAPNG_OPT_COMMENT: b"say so"}


def test_a_full_disk_is_an_error_and_the_packets_before_stay_readable(tmp_path: Path) -> None:
    # A limit on the size of files is to a writer what a full disk is: it takes a part, then nothing more.
    path = tmp_path / "a.pcapng"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with path.open("wb", buffering=0) as file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (777_777, hard))
            with pytest.raises(OSError, match="File too large"):
                write(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == 777_777
    reader = CaptureReader(path)
    read = [bytes(one.data) for one in reader]
    assert len(read) > 1000
    assert read == [data for _, _, data, _ in PACKETS[: len(read)]]
    assert reader.statistics.cut_at is not None


def test_a_device_without_room_is_an_error() -> None:
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        write(file)
