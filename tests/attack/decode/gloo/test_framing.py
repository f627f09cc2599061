"""Bytes of one direction between two Gloo pairs, in any pieces, with any hole, and not Gloo at all."""

from __future__ import annotations

import random

import pytest

from attack.decode.gloo.framing import Event, GlooDecoder, Hello, Lost, Message, Resumed
from attack.decode.gloo.head import Kind, Opcode, Slot, pack_head, parse_head
from attack.errors import DecodeError

SLOT = Slot(Kind.ALLREDUCE, 7, 0)
PAYLOADS = [bytes(range(200)), b"", b"\x01" * 3000, b"\0" * 500, b"last"]
HELLO = (3).to_bytes(8, "little")


def message(payload: bytes, slot: Slot = SLOT) -> bytes:
    announced = pack_head(Opcode.NOTIFY_SEND_READY, slot, len(payload))
    return announced + pack_head(Opcode.SEND_UNBOUND_BUFFER, slot, len(payload)) + payload


SLOTS = [SLOT, Slot(Kind.POINT_TO_POINT, 0, 0), SLOT, Slot(Kind.POINT_TO_POINT, 1 << 31, 0), Slot(Kind.BARRIER, 8, 0)]
STREAM = HELLO + b"".join(map(message, PAYLOADS, SLOTS))


def feed(parts: list[bytes | int], *, from_start: bool = True) -> list[Event]:
    decoder = GlooDecoder("a -> b", from_start=from_start)
    events: list[Event] = []
    for part in parts:
        events += decoder.gap(part) if isinstance(part, int) else decoder.receive(part)
    return [*events, *decoder.finish()]


def payloads(events: list[Event]) -> list[bytes]:
    return [bytes(event.payload) for event in events if isinstance(event, Message)]


def test_a_head_and_its_parts() -> None:
    data = pack_head(Opcode.SEND_UNBOUND_BUFFER, SLOT, 12)
    assert len(data) == 48
    head = parse_head(data)
    assert head is not None and head == (Opcode.SEND_UNBOUND_BUFFER, SLOT, 12, 12)
    between_two = Slot(Kind.POINT_TO_POINT, 0x1234_5678, 0)
    head = parse_head(pack_head(Opcode.SEND_UNBOUND_BUFFER, between_two, 12))
    assert head is not None and head == (Opcode.SEND_UNBOUND_BUFFER, between_two, 12, 12)
    assert parse_head(bytes(48)) is None
    assert parse_head(data[:16] + b"\x09" * 8 + data[24:]) is None  # of no kind


@pytest.mark.parametrize("size", [1, 7, 48, 1000, 1 << 20])
def test_any_chunking_gives_the_same_events(size: int) -> None:
    for stream in (STREAM, STREAM[8:]):
        events = feed([stream[at : at + size] for at in range(0, len(stream), size)])
        assert payloads(events) == PAYLOADS
        assert (events[0] == Hello(3)) == (stream is STREAM)


def test_a_hole_in_a_payload_keeps_the_framing() -> None:
    at = STREAM.index(b"\x01" * 3000) + 100
    events = feed([STREAM[:at], 500, STREAM[at + 500 :]])
    whole = [event for event in events if isinstance(event, Message)]
    assert [event.holes for event in whole] == [(), (), ((100, 600),), (), ()]
    assert not any(isinstance(event, Lost) for event in events)


@pytest.mark.parametrize("seed", range(60))
def test_framing_is_resumed_at_messages_only(seed: int) -> None:
    draw = random.Random(seed)
    start = draw.randrange(len(STREAM))
    stop = min(len(STREAM), start + draw.choice([1, 10, 100, 1000]))
    size = draw.choice([5, 60, 10_000])
    rest = [STREAM[stop:][at : at + size] for at in range(0, len(STREAM) - stop, size)]
    events = feed([STREAM[:start], stop - start, *rest])
    skipped = 0
    for event in events:
        if isinstance(event, Message):
            place = STREAM[event.offset - 48 : event.offset + len(event.payload)]
            head = parse_head(place)
            assert head is not None and len(event.payload) == head.payload
            known = bytearray(place[48:])
            for first, last in event.holes:
                known[first:last] = bytes(last - first)
            assert event.payload == known
        elif isinstance(event, Lost):
            skipped = event.offset
        elif isinstance(event, Resumed):
            assert event.offset - event.skipped == skipped


def test_a_stream_joined_in_the_middle_is_found_again() -> None:
    events = feed([STREAM[100:]], from_start=False)
    assert isinstance(events[0], Resumed)
    assert payloads(events) == PAYLOADS[1:]


@pytest.mark.parametrize("seed", range(30))
def test_other_bytes_are_one_error(seed: int) -> None:
    draw = random.Random(seed)
    data = bytearray(STREAM)
    for _ in range(draw.choice([1, 5, 200])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    for stream in (bytes(data), draw.randbytes(5000)):
        try:
            feed([stream])
        except DecodeError as error:
            assert "flow a -> b, byte " in str(error) and "\n" not in str(error)
