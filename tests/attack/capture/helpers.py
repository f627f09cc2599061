"""Packets, segments and captures made by hand or by dpkt, and what every list of stream events must satisfy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import dpkt

from attack.capture.packets import ACK, FIN, RST, SYN, Packet, Segment
from attack.capture.reassembly import Reassembler
from attack.capture.streams import Closed, Conflict, Data, Flow, Gap, Opened, StreamEvent

CLIENT, SERVER = "10.0.0.1:40000", "10.0.0.2:5555"
MASK = 0xFFFFFFFF


def segment(
    seq: int,
    payload: bytes = b"",
    *,
    ack: int | None = None,
    flags: int = 0,
    length: int | None = None,
    back: bool = False,
    time: float = 1.0,
    ports: tuple[str, str] = (CLIENT, SERVER),
) -> Segment:
    """A segment of the client, or of the server (`back`)."""
    source, destination = ports[::-1] if back else ports
    flags |= 0 if ack is None else ACK
    view = memoryview(payload)
    return Segment(source, destination, seq & MASK, (ack or 0) & MASK, flags, view, length or len(payload), time)


def syn(seq: int, **rest: Any) -> Segment:
    return segment(seq, flags=SYN, **rest)


def fin(seq: int, payload: bytes = b"", **rest: Any) -> Segment:
    return segment(seq, payload, flags=FIN, **rest)


def rst(seq: int, **rest: Any) -> Segment:
    return segment(seq, flags=RST, **rest)


def feed(segments: Iterable[Segment], reassembler: Reassembler | None = None) -> list[StreamEvent]:
    """All events of a capture."""
    reassembler = reassembler or Reassembler()
    events = [event for one in segments for event in reassembler.feed(one)]
    return events + reassembler.finish()


@dataclasses.dataclass(kw_only=True)
class Stream:
    """What the events of one stream add up to."""

    from_start: bool
    content: bytearray = dataclasses.field(default_factory=bytearray)
    """Holes are zeros."""
    gaps: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    conflicts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    how: str | None = None


def streams(events: Iterable[StreamEvent]) -> dict[Flow, Stream]:
    """Adds events up, and asserts that those of each stream tile it."""
    found: dict[Flow, Stream] = {}
    for event in events:
        if isinstance(event, Opened):
            assert event.flow not in found, "opened twice"
            found[event.flow] = Stream(from_start=event.from_start)
            continue
        stream = found[event.flow]
        assert stream.how is None, f"after its end: {event}"
        if isinstance(event, Data):
            assert event.offset == len(stream.content) and len(event.payload)
            stream.content += event.payload
        elif isinstance(event, Gap):
            assert event.offset == len(stream.content) and event.length > 0
            stream.gaps.append((event.offset, event.length))
            stream.content += bytes(event.length)
        elif isinstance(event, Conflict):
            assert event.length > 0
            stream.conflicts.append((event.offset, event.length))
        elif isinstance(event, Closed):
            stream.how = event.how
    assert all(stream.how for stream in found.values()), "never closed"
    return found


def only_stream(events: Iterable[StreamEvent]) -> Stream:
    """That of the client, where the server has sent nothing."""
    (stream,) = streams(events).values()
    return stream


def tcp_frame(payload: bytes, *, seq: int = 1, ack: int = 0, flags: int = ACK, back: bool = False) -> bytes:
    """An Ethernet frame of the client, or of the server (`back`), made by dpkt."""
    ends = [(bytes([10, 0, 0, 1]), 40000), (bytes([10, 0, 0, 2]), 5555)]
    (source, sport), (destination, dport) = ends[::-1] if back else ends
    tcp = dpkt.tcp.TCP(sport=sport, dport=dport, seq=seq & MASK, ack=ack & MASK, flags=flags, data=payload)
    ip = dpkt.ip.IP(src=source, dst=destination, p=6, data=tcp)
    return bytes(dpkt.ethernet.Ethernet(src=bytes(6), dst=bytes(6), type=0x0800, data=ip))


def conversation() -> list[tuple[float, bytes]]:
    """Time and bytes of the packets of a small exchange, from SYN to FIN."""
    up, down = b"gradient" * 10, b"average" * 9
    frames = [
        tcp_frame(b"", seq=100, flags=SYN),
        tcp_frame(b"", seq=900, ack=101, flags=SYN | ACK, back=True),
        tcp_frame(up[:33], seq=101, ack=901),
        tcp_frame(up[33:], seq=134, ack=901),
        tcp_frame(down, seq=901, ack=181, back=True),
        tcp_frame(b"", seq=181, ack=964, flags=FIN | ACK),
        tcp_frame(b"", seq=964, ack=182, flags=FIN | ACK, back=True),
    ]
    return [(1_700_000_000 + index / 8, frame) for index, frame in enumerate(frames)]


def write_with_dpkt(path: Path, packets: Sequence[tuple[float, bytes]], *, writer: type = dpkt.pcapng.Writer) -> Path:
    with path.open("wb") as file:
        out = writer(file)
        for time, data in packets:
            out.writepkt(data, time)
    return path


def packet(data: bytes, *, link_type: int = 1, original_length: int | None = None) -> Packet:
    return Packet(1.0, link_type, memoryview(data), original_length or len(data), 0)
