"""ZMTP framing: the public specification's rows, any chunking, holes, bounds, and one error class."""

from __future__ import annotations

import numpy as np
import pytest

from attack.decode.frames import Command, Event, Frame, Greeting, Lost, Resumed, Sealed
from attack.decode.zmtp import ZmtpDecoder
from attack.errors import DecodeError
from harness.wire import Header, Kind
from tests.attack.decode.feeding import Part, decoder, feed, in_pieces, outcome
from tests.attack.decode.job import GREETING, RUN, frame, ready

START = GREETING + ready("DEALER")


def greeting(mechanism: bytes = b"NULL", *, major: int = 3, as_server: int = 0) -> bytes:
    return (
        b"\xff" + bytes(8) + b"\x7f" + bytes([major, 1]) + mechanism.ljust(20, b"\0") + bytes([as_server]) + bytes(31)
    )


def message(payload: bytes, *, step: int = 0, at: int = 0) -> bytes:
    """A GRADIENT chunk as two frames."""
    count = len(payload) // 4
    header = Header(
        kind=Kind.GRADIENT, run=RUN, rank=0, step=step, at=at, count=count, total=1 << 20, size=len(payload)
    )
    return frame(header.pack(), more=True) + frame(payload)


def bodies(events: list[Event]) -> list[bytes]:
    return [bytes(event.body) for event in events if isinstance(event, Frame)]


def test_greeting_and_null_handshake() -> None:
    events = feed(decoder(), [START])
    assert events[0] == Greeting(offset=0, version=(3, 1), mechanism="NULL", as_server=False)
    assert isinstance(events[1], Command)
    assert (events[1].name, events[1].metadata, events[1].offset) == ("READY", {"Socket-Type": b"DEALER"}, 64)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65536, 1 << 20])
def test_frames_of_every_size_keep_their_bytes(size: int) -> None:
    body = np.random.default_rng(size).bytes(size)
    for more in (False, True):
        events = feed(decoder(), [START, frame(body, more=more), frame(b"end")])
        assert bodies(events) == [body, b"end"]
        assert isinstance(events[2], Frame) and events[2].more is more


def test_a_short_body_in_a_long_frame_is_allowed() -> None:
    assert bodies(feed(decoder(), [START, b"\x02" + (3).to_bytes(8, "big") + b"abc"])) == [b"abc"]


@pytest.mark.parametrize(
    ("name", "data"), [("PING", b"\0\x0actx"), ("PONG", b"ctx"), ("SUBSCRIBE", b"topic"), ("CANCEL", b"topic")]
)
def test_commands_between_messages(name: str, data: bytes) -> None:
    command = frame(bytes([len(name)]) + name.encode() + data, command=True)
    events = feed(decoder(), [START, frame(b"a"), command, frame(b"b")])
    assert events[3] == Command(offset=len(START) + 3, name=name, data=data)
    assert bodies(events) == [b"a", b"b"]


def test_plain_handshake_of_both_sides() -> None:
    client = (
        greeting(b"PLAIN") + frame(b"\x05HELLO\x05admin\x06secret", command=True) + frame(b"\x08INITIATE", command=True)
    )
    server = greeting(b"PLAIN", as_server=1) + frame(b"\x07WELCOME", command=True) + ready("ROUTER")
    for stream, names in ((client, ["HELLO", "INITIATE"]), (server, ["WELCOME", "READY"])):
        events = feed(decoder(), [stream, frame(b"payload")])
        assert [event.name for event in events if isinstance(event, Command)] == names
        assert bodies(events) == [b"payload"]


def test_curve_frames_are_sealed_and_only_their_size_is_told() -> None:
    shaking = frame(b"\x05HELLO" + bytes(194), command=True) + frame(b"\x08INITIATE" + bytes(287), command=True)
    box = frame(b"\x07MESSAGE" + bytes(8 + 300))
    events = feed(decoder(), [greeting(b"CURVE"), shaking, box])
    assert events[-1] == Sealed(offset=64 + len(shaking), size=316)
    assert not any(isinstance(event, Frame) for event in events)


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"\x00" + bytes(63), "byte 0: ZMTP: wanted a greeting's signature"),
        (greeting(major=2), "byte 10: ZMTP: wanted ZMTP 3, got major version 2"),
        (greeting(b""), "byte 12: ZMTP: wanted the name of a mechanism"),
        (greeting(as_server=2), "byte 32: ZMTP: wanted 0 or 1 for as-server"),
        (GREETING + frame(b"early"), "byte 64: ZMTP: wanted a command of the handshake, got a message"),
        (GREETING + frame(b"\x05OTHER", command=True), "byte 64: ZMTP: wanted one of READY, ERROR, got command OTHER"),
        (START + b"\x08\x00", "wanted the flags of a frame, got 0x08"),
        (START + b"\x05\x00", "wanted the flags of a frame, got 0x05"),
        (START + frame(b"\x09PING", command=True), "wanted a command, got"),
        (START + b"\x02" + (1 << 62).to_bytes(8, "big"), f"a frame of {1 << 62} bytes, at most"),
    ],
)
def test_what_the_specification_forbids_is_one_error_with_flow_and_offset(stream: bytes, says: str) -> None:
    with pytest.raises(DecodeError, match=r"^flow a -> b, byte \d+: ZMTP: ") as caught:
        feed(decoder(), [stream])
    assert says in str(caught.value)


def test_a_frame_over_the_limit_is_refused_before_it_is_allocated() -> None:
    assert bodies(feed(decoder(max_frame_bytes=1000), [START, frame(bytes(1000))])) == [bytes(1000)]
    with pytest.raises(DecodeError, match="a frame of 1001 bytes, at most 1000"):
        feed(decoder(max_frame_bytes=1000), [START, frame(bytes(1001))])


STREAMS: dict[str, list[Part]] = {
    "whole": [START, message(bytes(range(256)) * 4), frame(b"\x04PING\0\x01", command=True), message(b"abcd", at=9)],
    "a hole in a body": [START, message(bytes(1024))[:300], 200, message(bytes(1024))[500:], message(b"abcd")],
    "two holes in a body": [START, message(bytes(1024))[:300], 7, bytes(10), 9, message(bytes(1024))[326:]],
    "a hole over a head": [
        START,
        message(bytes(64))[:-3],
        20,
        message(b"abcd")[17:],
        message(b"efgh"),
        message(b"ijkl"),
    ],
    "a hole over the greeting": [30, START[30:], message(b"abcd"), message(b"efgh")],
    "only a hole": [5_000_000],
    "cut in a body": [START, message(bytes(1024))[:-5]],
    "cut in a head": [START, message(bytes(1024)), b"\x03\0\0"],
    "an error": [START, message(b"abcd"), b"\xf0\x00"],
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("late", [False, True])
def test_any_chunking_gives_the_same_events(name: str, late: bool) -> None:
    parts = STREAMS[name]
    want = outcome(decoder(from_start=not late), parts)
    assert outcome(decoder(from_start=not late), in_pieces(parts, 1 if name != "only a hole" else 99_999)) == want
    for size in (2, 3, 7, 64, 1000):
        if name != "only a hole":
            assert outcome(decoder(from_start=not late), in_pieces(parts, size)) == want


def test_split_anywhere_gives_the_same_events() -> None:
    stream = START + message(bytes(range(200))) + message(b"abcd") + frame(bytes(300))
    want = feed(decoder(), [stream])
    for at in range(len(stream)):
        assert feed(decoder(), [stream[:at], stream[at:]]) == want


def test_truncated_anywhere_is_a_prefix_that_says_that_it_was_cut() -> None:
    stream = START + message(bytes(range(200))) + message(b"abcd") + frame(bytes(300))
    whole = feed(decoder(), [stream])
    ends = {64, len(START), len(stream)} | {event.offset for event in whole if isinstance(event, Frame)}
    for at in range(len(stream)):
        events = feed(decoder(), [stream[:at]])
        lost = [event for event in events if isinstance(event, Lost)]
        assert bool(lost) == (at not in ends and at > 0)
        assert events[: len(events) - len(lost)] == whole[: len(events) - len(lost)]


def test_a_hole_inside_a_body_is_marked_and_framing_goes_on() -> None:
    body = bytes(range(1, 201)) * 5
    stream = frame(body)
    events = feed(decoder(), [START, stream[:109], 50, stream[159:], frame(b"next")])
    first, second = (event for event in events if isinstance(event, Frame))
    assert (first.holes, second.body) == (((100, 150),), b"next")
    assert first.body[:100] == body[:100] and first.body[150:] == body[150:] and not any(first.body[100:150])


def test_a_hole_up_to_the_end_of_a_body_leaves_the_next_frame_alone() -> None:
    stream = frame(bytes(1000))
    events = feed(decoder(), [START, stream[:509], 500, frame(b"next")])
    assert bodies(events)[1] == b"next" and not any(isinstance(event, Lost) for event in events)


def test_framing_resumes_only_at_a_proven_message() -> None:
    one, two, three = message(bytes(400)), message(b"abcd", at=4), message(b"efgh", at=5)
    events = feed(decoder(runs={RUN}), [START, one[:-10], 30, two[20:], three])
    at = len(START) + len(one) - 10 + 30 + len(two) - 20
    assert [event for event in events if isinstance(event, Lost | Resumed)] == [
        Lost(offset=len(START) + len(one), why="a hole covers the beginning of a frame"),
        Resumed(offset=at, skipped=at - len(START) - len(one)),
    ]
    assert bodies(events)[-1] == b"efgh"


def test_an_unknown_run_needs_two_chained_messages() -> None:
    one, two = message(b"abcd"), message(b"efgh", at=1)
    assert bodies(feed(decoder(from_start=False), [b"junk", one])) == []
    assert bodies(feed(decoder(from_start=False), [b"junk", one, b"x", two])) == []
    assert bodies(feed(decoder(from_start=False), [b"junk", one, two]))[1::2] == [b"abcd", b"efgh"]
    assert bodies(feed(decoder(from_start=False, runs={RUN}), [b"junk", one]))[1::2] == [b"abcd"]


def test_a_hole_in_the_first_payload_does_not_break_the_proof_but_one_in_a_header_does() -> None:
    one, two = message(bytes(1000)), message(b"efgh", at=1)
    holed = feed(decoder(from_start=False), [b"junk", one[:-500], 100, one[-400:], two])
    assert [event.holes for event in holed if isinstance(event, Frame)] == [(), ((500, 600),), (), ()]
    assert bodies(feed(decoder(from_start=False), [b"junk", one[:40], 10, one[50:], two])) == []


def test_random_payload_never_looks_like_a_boundary() -> None:
    # A payload that holds a header of another run, or one of ours without its frame, is still no proof.
    generator = np.random.default_rng(0)
    other = Header(kind=Kind.BYE, run=b"otherrun", rank=0, step=0).pack()
    ours = Header(kind=Kind.BYE, run=RUN, rank=0, step=0, size=0).pack()
    for inner in (
        other,
        ours,
        frame(other, more=True) + frame(b""),
        frame(ours) + frame(b""),
        frame(ours, more=True) + b"\0\1",
    ):
        noise = generator.bytes(5000) + inner + generator.bytes(5000)
        events = feed(decoder(runs={RUN}), [START, frame(bytes(500))[:-100], 200, noise])
        assert not any(isinstance(event, Resumed) for event in events)


def test_without_an_anchor_what_is_lost_stays_lost() -> None:
    events = feed(ZmtpDecoder("a -> b"), [START, 1, message(b"abcd"), message(b"abcd")])
    assert isinstance(events[-1], Lost)


def test_random_bytes_give_events_or_a_decode_error() -> None:
    generator = np.random.default_rng(1)
    for _ in range(2000):
        data = generator.bytes(int(generator.integers(200)))
        for start in (b"", START):
            outcome(decoder(from_start=bool(generator.integers(2))), [start, data])
