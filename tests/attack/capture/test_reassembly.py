from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attack.capture.direction import PATIENCE, SETTLING
from attack.capture.packets import ACK, FIN, SYN, Segment
from attack.capture.reader import CaptureReader
from attack.capture.reassembly import Reassembler, read_streams
from attack.capture.streams import Closed, Conflict, Data, Flow, Gap, Opened
from attack.errors import CaptureError
from tests.attack.capture.helpers import (
    CLIENT,
    MASK,
    SERVER,
    conversation,
    feed,
    fin,
    only_stream,
    rst,
    segment,
    streams,
    syn,
    write_with_dpkt,
)

UP, DOWN = Flow(source=CLIENT, destination=SERVER), Flow(source=SERVER, destination=CLIENT)
TEXT = bytes(range(256)) * 8


def pieces(seq: int, size: int = 100, text: bytes = TEXT) -> list[Segment]:
    return [segment(seq + at, text[at : at + size]) for at in range(0, len(text), size)]


# --- in order, and what may disturb it ---


def test_in_order_data_is_delivered_at_once_and_is_the_view_that_came() -> None:
    reassembler = Reassembler()
    reassembler.feed(syn(10))
    one = segment(11, b"hello", ack=0, time=3.0)
    (event,) = reassembler.feed(one)
    assert event == Data(flow=UP, time=3.0, offset=0, payload=b"hello")
    assert event.payload is one.payload


def test_data_that_comes_with_the_syn_has_offset_zero() -> None:
    stream = only_stream(feed([segment(7, b"fast", flags=SYN), segment(12, b" open")]))
    assert (bytes(stream.content), stream.from_start) == (b"fast open", True)


def test_reordered_segments_wait_for_the_one_before() -> None:
    reassembler = Reassembler()
    reassembler.feed(syn(10))
    assert not reassembler.feed(segment(14, b"def"))
    assert not reassembler.feed(segment(17, b"g"))
    assert [event.payload for event in reassembler.feed(segment(11, b"abc"))] == [b"abc", b"def", b"g"]


def test_a_capture_of_two_interfaces_with_every_packet_twice_gives_the_same_events() -> None:
    once = [
        syn(10),
        syn(70, back=True, ack=11),
        *pieces(11),
        segment(71, b"x" * 9, back=True, ack=40),
        fin(11 + len(TEXT)),
    ]
    reassembler = Reassembler()
    assert feed([one for one in once for _ in range(2)], reassembler) == feed(once)
    assert reassembler.counts.conflicts == 0
    assert reassembler.counts.connections == 1


@pytest.mark.parametrize("first", [0, 1, 0xFFFFFFFF, 0xFFFFFFF0, 0x7FFFFFF0])
def test_sequence_numbers_wrap(first: int) -> None:
    shuffled = pieces(first + 1)
    random.Random(1).shuffle(shuffled)
    stream = only_stream(feed([syn(first), *shuffled, fin(first + 1 + len(TEXT))]))
    assert (bytes(stream.content), stream.gaps, stream.how) == (TEXT, [], "fin")


def test_a_stream_longer_than_all_sequence_numbers_keeps_its_offsets() -> None:
    block = memoryview(bytes(1 << 20))
    reassembler = Reassembler()
    reassembler.feed(syn(5))
    at = 6
    for _ in range(4097):
        (event,) = reassembler.feed(Segment(CLIENT, SERVER, at & 0xFFFFFFFF, 0, ACK, block, len(block), 1.0))
        at += len(block)
    assert isinstance(event, Data) and event.offset == 4096 << 20


# --- copies that overlap ---


def test_of_overlapping_copies_the_first_counts_and_equal_ones_are_no_news() -> None:
    sent = [syn(10), segment(11, b"abcdef"), segment(13, b"cdefgh"), segment(21, b"kl"), segment(17, b"ghijklmn")]
    reassembler = Reassembler()
    stream = only_stream(feed(sent, reassembler))
    assert (bytes(stream.content), stream.conflicts) == (b"abcdefghijklmn", [])
    assert reassembler.counts.duplicate_bytes == 4 + 2 + 2


def test_a_different_copy_of_delivered_bytes_is_a_conflict_that_names_them() -> None:
    events = feed([syn(10), segment(11, b"abcdef"), segment(12, b"bXXeYg", time=4.0)])
    assert Conflict(flow=UP, time=4.0, offset=2, length=4) in events
    assert bytes(only_stream(events).content) == b"abcdefg"


def test_a_different_copy_of_held_bytes_is_a_conflict_before_they_are_delivered() -> None:
    events = feed([syn(10), segment(14, b"def"), segment(13, b"cdEf"), segment(11, b"ab")])
    kinds = [type(event) for event in events]
    assert kinds.index(Conflict) < kinds.index(Data)
    stream = only_stream(events)
    assert (bytes(stream.content), stream.conflicts) == (b"abcdef", [(4, 1)])


@pytest.mark.parametrize("missing_before", [False, True])
def test_keepalive_probes_with_any_byte_are_no_conflict(missing_before: bool) -> None:
    sent = [syn(10), segment(11, b"abc"), segment(13, b"\0"), segment(13, b"")]
    stream = only_stream(feed(sent[:1] + sent[2 if missing_before else 1 :]))
    assert stream.conflicts == []
    if not missing_before:
        assert bytes(stream.content) == b"abc"


def test_a_zero_window_probe_is_the_next_byte_and_may_come_again() -> None:
    stream = only_stream(
        feed([syn(10), segment(11, b"abc"), segment(14, b"d"), segment(14, b"d"), segment(14, b"defg")])
    )
    assert (bytes(stream.content), stream.conflicts) == (b"abcdefg", [])


# --- holes ---


def test_a_hole_is_named_once_it_is_acknowledged_and_enough_more_has_come() -> None:
    reassembler = Reassembler()
    for one in (syn(10), segment(11, b"abc"), segment(20, b"jkl")):
        reassembler.feed(one)
    for _ in range(PATIENCE):
        assert not reassembler.feed(segment(500, ack=23, back=True))
    gap, data = reassembler.feed(segment(500, ack=23, back=True, time=9.0))
    assert gap == Gap(flow=UP, time=9.0, offset=3, length=6)
    assert data == Data(flow=UP, time=9.0, offset=9, payload=b"jkl")


def test_a_hole_that_nobody_acknowledged_is_waited_for() -> None:
    reassembler = Reassembler()
    for one in (syn(10), segment(11, b"abc"), segment(20, b"jkl")):
        reassembler.feed(one)
    for index in range(10 * PATIENCE):
        assert not reassembler.feed(segment(23 + index, b"x", ack=500))
    assert len(reassembler.feed(segment(14, b"defghi"))) == 2 + 10 * PATIENCE


def test_bytes_that_come_after_their_hole_was_given_up_are_counted_not_delivered() -> None:
    sent = [
        syn(10),
        segment(20, b"jkl"),
        *[segment(500, ack=23, back=True)] * (PATIENCE + 1),
        segment(11, b"abcdefghi"),
    ]
    reassembler = Reassembler()
    stream = only_stream(feed(sent, reassembler))
    assert stream.gaps == [(0, 9)]
    assert reassembler.counts.late_bytes == 9


def test_too_much_data_behind_a_hole_gives_it_up_and_bounds_the_memory() -> None:
    reassembler = Reassembler(max_held_bytes_per_stream=100_000)
    reassembler.feed(syn(10))
    delivered = 0
    for index in range(1000):
        for event in reassembler.feed(segment(12 + 1000 * index, bytes(1000))):
            delivered += isinstance(event, Data)
        direction = reassembler._directions[CLIENT, SERVER]
        assert direction.held_cost <= 100_000
    assert delivered > 900


def test_memory_is_bounded_over_all_streams_together() -> None:
    reassembler = Reassembler(max_held_bytes=100_000)
    events = []
    for port in range(200):
        ports = (f"10.0.0.1:{port + 1}", SERVER)
        events += reassembler.feed(syn(10, ports=ports))
        events += reassembler.feed(segment(20, bytes(2000), ports=ports))
        held = sum(direction.held_cost for direction in reassembler._directions.values())
        assert held == reassembler._held <= 100_000
    found = streams(events + reassembler.finish())
    assert len(found) == 200
    assert all(stream.gaps == [(0, 9)] for stream in found.values())


def test_what_the_recorder_cut_off_a_packet_is_a_hole_not_a_short_stream() -> None:
    stream = only_stream(feed([syn(10), segment(11, b"abc", length=8), segment(19, b"ijk", length=5)]))
    assert (bytes(stream.content), stream.gaps) == (b"abc\0\0\0\0\0ijk\0\0", [(3, 5), (11, 2)])


def test_bytes_acknowledged_but_never_seen_are_a_hole_at_the_end() -> None:
    events = feed([syn(10), segment(11, b"abc"), segment(500, ack=40, back=True)])
    assert only_stream(events).gaps == [(3, 26)]


def test_an_absurd_acknowledgment_makes_no_hole() -> None:
    events = feed([syn(10), segment(11, b"abc"), segment(500, ack=11 + (1 << 31), back=True)])
    assert only_stream(events).gaps == []


@pytest.mark.parametrize("lost", [1 << 20, 1 << 31, (1 << 32) - (1 << 29)])
def test_a_loss_of_gigabytes_is_a_hole_of_that_length(lost: int) -> None:
    stream_events = feed([syn(10), segment(11, b"abc"), segment(14 + lost, b"xyz"), segment(17 + lost, b"!")])
    gaps = [event for event in stream_events if isinstance(event, Gap)]
    assert [(gap.offset, gap.length) for gap in gaps] == [(3, lost)]


def test_the_fin_waits_for_a_hole_before_it() -> None:
    reassembler = Reassembler()
    for one in (syn(10), segment(11, b"abc"), fin(17, b"gh")):
        reassembler.feed(one)
    *_, closed = reassembler.feed(segment(14, b"def", time=8.0))
    assert closed == Closed(flow=UP, time=8.0, how="fin")


def test_a_hole_before_the_fin_is_named_when_it_is_acknowledged() -> None:
    sent = [syn(10), segment(11, b"abc"), fin(17), *[segment(500, ack=18, back=True)] * (PATIENCE + 1)]
    reassembler = Reassembler()
    events = [event for one in sent for event in reassembler.feed(one)]
    stream = only_stream(events)
    assert (stream.gaps, stream.how) == ([(3, 3)], "fin")


# --- beginnings ---


def test_a_late_start_begins_at_the_lowest_byte_of_the_first_segments() -> None:
    reassembler = Reassembler()
    for seq in (1100, 1000, 1200):
        assert not reassembler.feed(segment(seq, bytes(100)))
    events = reassembler.feed(segment(1300, bytes(100)))
    assert SETTLING == 4
    assert events[0] == Opened(flow=UP, time=1.0, from_start=False)
    assert [event.offset for event in events[1:]] == [0, 100, 200, 300]


def test_a_syn_that_is_captured_after_its_first_data_still_is_the_start() -> None:
    stream = only_stream(feed([segment(11, b"abc"), segment(14, b"def"), syn(10), segment(17, b"g")]))
    assert (bytes(stream.content), stream.from_start) == (b"abcdefg", True)


def test_a_syn_that_is_captured_long_after_its_data_opens_nothing_new() -> None:
    found = streams(feed([*pieces(11), syn(10), *pieces(11 + len(TEXT))]))
    assert list(found) == [UP]
    assert bytes(found[UP].content) == TEXT * 2


def test_bytes_before_a_late_start_are_counted() -> None:
    reassembler = Reassembler()
    stream = only_stream(feed([*pieces(1000), segment(950, bytes(50) + TEXT[:50])], reassembler))
    assert bytes(stream.content) == TEXT
    assert reassembler.counts.refused_bytes == 50


def test_acknowledgments_alone_open_no_stream() -> None:
    assert feed([segment(11, ack=5), segment(5, ack=11, back=True)]) == []


# --- ends, and ports that are used again ---


def test_each_direction_ends_for_itself() -> None:
    sent = [
        syn(10),
        syn(70, back=True, ack=11),
        fin(11, b"question", ack=71),
        segment(71, b"answer", back=True, ack=20),
        fin(77, back=True, ack=20),
        segment(20, ack=78),
    ]
    events = feed(sent)
    found = streams(events)
    assert {flow: (bytes(stream.content), stream.how, stream.gaps) for flow, stream in found.items()} == {
        UP: (b"question", "fin", []),
        DOWN: (b"answer", "fin", []),
    }
    assert events.index(Closed(flow=UP, time=1.0, how="fin")) < events.index(
        Data(flow=DOWN, time=1.0, offset=0, payload=b"answer")
    )


def test_packets_after_the_fin_change_nothing() -> None:
    reassembler = Reassembler()
    stream = only_stream(
        feed([syn(10), fin(11, b"abc"), segment(11, b"abc"), segment(14, b"xyz"), fin(14)], reassembler)
    )
    assert (bytes(stream.content), stream.how) == (b"abc", "fin")
    assert reassembler.counts.refused_bytes == 6


def test_bytes_beyond_the_fin_are_refused() -> None:
    stream = only_stream(feed([syn(10), segment(16, b"fghij"), fin(18), segment(11, b"abcde")]))
    assert (bytes(stream.content), stream.how) == (b"abcdefg", "fin")


def test_a_reset_ends_both_directions_and_names_what_was_missing() -> None:
    sent = [syn(10), syn(70, back=True, ack=11), segment(71, b"abc", back=True), segment(14, b"def"), rst(17)]
    found = streams(feed(sent))
    assert {flow: (stream.how, stream.gaps) for flow, stream in found.items()} == {
        UP: ("reset", [(0, 3)]),
        DOWN: ("reset", []),
    }


def test_a_reset_with_an_absurd_number_is_not_heeded() -> None:
    stream = only_stream(feed([syn(10), segment(11, b"abc"), rst(11 + (1 << 31)), segment(14, b"def")]))
    assert (bytes(stream.content), stream.how) == (b"abcdef", "capture ended")


def test_a_reset_that_answers_a_syn_ends_it() -> None:
    stream = only_stream(feed([syn(10), rst(0, back=True, ack=11)]))
    assert stream.how == "reset"


def test_a_syn_that_is_sent_again_is_the_same_connection() -> None:
    found = streams(feed([syn(10), syn(10), segment(11, b"abc"), syn(10)]))
    assert list(found) == [UP]


@pytest.mark.parametrize("ending", [[], [fin(14)], [rst(14)]])
def test_a_new_syn_on_the_same_ports_is_a_new_connection(ending: list[Segment]) -> None:
    sent = [
        *[syn(10), syn(70, back=True, ack=11), segment(11, b"abc"), segment(71, b"ABC", back=True), *ending],
        *[syn(9000), syn(7000, back=True, ack=9001), segment(9001, b"def"), segment(7001, b"DEF", back=True)],
    ]
    found = streams(feed(sent))
    assert [(flow.incarnation, bytes(stream.content)) for flow, stream in found.items()] == [
        (0, b"abc"),
        (0, b"ABC"),
        (1, b"def"),
        (1, b"DEF"),
    ]
    if not ending:
        assert found[UP].how == "replaced"


def test_a_new_connection_is_noticed_by_its_answer_as_well() -> None:
    sent = [syn(10), syn(70, back=True, ack=11), segment(11, b"abc"), syn(7000, back=True, ack=9001), syn(9000)]
    found = streams(feed([*sent, segment(9001, b"def", ack=7001)]))
    assert [(flow.incarnation, bytes(stream.content)) for flow, stream in found.items()] == [
        (0, b"abc"),
        (0, b""),
        (1, b""),
        (1, b"def"),
    ]


def test_a_new_connection_whose_syn_is_missing_is_told_by_its_numbers() -> None:
    found = streams(feed([syn(10), segment(11, b"abc"), rst(14), *pieces(2_000_000_000)]))
    assert [(flow.incarnation, bytes(stream.content)) for flow, stream in found.items()] == [(0, b"abc"), (1, TEXT)]


def test_more_connections_than_are_remembered_are_forgotten_by_age_and_end() -> None:
    reassembler = Reassembler(max_connections=10)
    events = []
    for port in range(100):
        ports = (f"10.0.0.1:{port + 1}", SERVER)
        for one in (syn(10, ports=ports, time=port), segment(11, b"abc", ports=ports, time=port)):
            events += reassembler.feed(one)
        assert len(reassembler._directions) <= 2 * 20
    again = ("10.0.0.1:1", SERVER)
    events += reassembler.feed(segment(14, b"def", ports=again, time=100.0))
    found = streams(events + reassembler.finish())
    assert {stream.how for stream in found.values()} == {"forgotten", "capture ended"}
    first, second = [flow.incarnation for flow in found if flow.source == again[0]]
    assert first == 0 < second


def test_a_socket_connected_to_itself_does_no_harm() -> None:
    loop = (CLIENT, CLIENT)
    sent = [syn(10, ports=loop), segment(11, b"abc", ack=11, ports=loop), fin(20, ack=14, ports=loop)]
    (stream,) = streams(feed(sent)).values()
    assert (bytes(stream.content), stream.gaps) == (b"abc\0\0\0\0\0\0", [(3, 6)])


# --- anything at all, against the slow and obvious ---


@st.composite
def captures(draw: st.DrawFn) -> tuple[bytes, list[Segment], set[int]]:
    """What was sent, the segments that were captured, and the offsets of the bytes that these have."""
    truth = draw(st.binary(min_size=1, max_size=60))
    first = draw(st.sampled_from([0, 1000, 0xFFFFFFFF, 0xFFFFFFE0, 0x7FFFFFF0]))
    captured: set[int] = set()
    sent = []
    for _ in range(draw(st.integers(0, 25))):
        start = draw(st.integers(0, len(truth) - 1))
        # A segment of one byte may be a keepalive probe, which says nothing.
        end = draw(st.integers(min(start + 2, len(truth)), len(truth)))
        if end - start == 1:
            continue
        kept = draw(st.integers(0, end - start))
        sent.append(segment(first + 1 + start, truth[start : start + kept], length=end - start, ack=78))
        captured |= set(range(start, start + kept))
    sent.append(fin(first + 1 + len(truth), ack=78))
    acks = [
        segment(78, ack=first + 1 + draw(st.integers(0, len(truth))), back=True) for _ in range(draw(st.integers(0, 9)))
    ]
    return truth, [syn(first), *draw(st.permutations(sent + acks))], captured


@settings(max_examples=400, deadline=None)
@given(captures())
def test_any_segments_in_any_order_give_the_truth_and_name_exactly_what_is_missing(
    capture: tuple[bytes, list[Segment], set[int]],
) -> None:
    truth, sent, captured = capture
    stream = only_stream(feed(sent))
    missing = {offset for at, length in stream.gaps for offset in range(at, at + length)}
    assert missing == set(range(len(truth))) - captured
    assert bytes(stream.content) == bytes(0 if offset in missing else byte for offset, byte in enumerate(truth))
    assert (stream.conflicts, stream.how, stream.from_start) == ([], "fin", True)


@settings(max_examples=300, deadline=None)
@given(captures(), st.data())
def test_wherever_two_copies_differ_there_is_a_conflict_and_the_first_copy_stands(
    capture: tuple[bytes, list[Segment], set[int]], data: st.DataObject
) -> None:
    _, sent, _ = capture
    begin = sent[0].seq + 1
    copies: dict[int, list[int]] = {}
    damaged = []
    for one in [one for one in sent if not one.flags & FIN]:
        payload = bytearray(one.payload)
        if payload and data.draw(st.booleans()):
            payload[data.draw(st.integers(0, len(payload) - 1))] ^= 0x55
        damaged.append(one._replace(payload=memoryview(payload)))
        for offset, byte in enumerate(payload, start=(one.seq - begin) & MASK):
            copies.setdefault(offset, []).append(byte)
    stream = only_stream(feed(damaged))
    conflicting = {offset for at, length in stream.conflicts for offset in range(at, at + length)}
    assert {offset for offset, values in copies.items() if len(set(values)) > 1} <= conflicting
    assert all(stream.content[offset] == values[0] for offset, values in copies.items())
    assert not stream.conflicts or any(len(set(values)) > 1 for values in copies.values())


def lossy_exchange(seed: int, *, loss: float) -> tuple[list[bytes], list[Segment], list[Segment]]:
    """Two streams as TCP sends them, then as a capture has them: packets missing, swapped and doubled.

    Returns what was sent up and down, all segments, and those captured.
    """
    rng = random.Random(seed)
    truth = [rng.randbytes(rng.randrange(1, 60_000)) for _ in range(2)]
    first = [rng.randrange(1 << 32), (1 << 32) - rng.randrange(1, 1000)]
    done = [0, 0]
    sent = [syn(first[0]), syn(first[1], back=True, ack=first[0] + 1)]
    while done != [len(truth[0]), len(truth[1])]:
        way = rng.randrange(2)
        size = min(rng.randrange(0, 1500), len(truth[way]) - done[way])
        ack = first[1 - way] + 1 + done[1 - way]
        payload = truth[way][done[way] :][:size]
        sent.append(segment(first[way] + 1 + done[way], payload, ack=ack, back=way == 1, time=float(len(sent))))
        done[way] += size
        if rng.random() < 0.05:  # sent again, in another size
            back = rng.randrange(0, min(done[way], 3000) + 1)
            again = truth[way][done[way] - back : done[way]]
            sent.append(segment(first[way] + 1 + done[way] - back, again, ack=ack, back=way == 1))
    captured = []
    for one in sent:
        if rng.random() < loss:
            continue
        captured.insert(max(len(captured) - rng.choice([0, 0, 0, 0, 1, 2, 5]), 0), one)
        if rng.random() < 0.1:
            captured.insert(max(len(captured) - rng.randrange(5), 0), one)
    return truth, sent, captured


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.2, 0.7])
@pytest.mark.parametrize("seed", range(25))
def test_a_lossy_capture_never_gives_a_wrong_byte(seed: int, loss: float) -> None:
    truth, sent, captured = lossy_exchange(seed, loss=loss)
    reassembler = Reassembler()
    found = streams(feed(captured, reassembler))
    have_syn = {one.source for one in captured if one.flags & SYN}
    for flow, stream in found.items():
        assert flow.incarnation == 0
        whole = truth[0] if flow == UP else truth[1]
        begin = 0
        if not stream.from_start:
            (first_seq,) = {one.seq for one in sent if one.source == flow.source and one.flags & SYN}
            starts = [
                (one.seq - first_seq - 1) % (1 << 32) for one in captured if one.source == flow.source and one.length
            ]
            begin = min(starts[:SETTLING])
        holes = {offset for at, length in stream.gaps for offset in range(at, at + length)}
        for offset, byte in enumerate(stream.content):
            assert offset in holes or byte == whole[begin + offset]
        assert stream.conflicts == []
        assert stream.from_start == (flow.source in have_syn)
        if loss == 0.0:
            assert (bytes(stream.content), stream.gaps) == (whole, [])
    assert reassembler.counts.conflicts == 0


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([0, 1, 5, 50, 100, 0x10000000, 0x40000001, 0x7FFFFFFF, 0x80000000, 0xF0000001, 0xFFFFFFFE]),
            st.integers(0, 30),
            st.integers(0, 63),
            st.binary(max_size=20),
            st.integers(0, 5),
        ),
        max_size=150,
    ),
    st.booleans(),
)
def test_nonsense_gives_events_that_tile_and_nothing_else(
    script: list[tuple[bool, int, int, int, bytes, int]], to_itself: bool
) -> None:
    reassembler = Reassembler(max_held_bytes=6000, max_held_bytes_per_stream=4000, max_connections=1)
    ports = (CLIENT, CLIENT) if to_itself else (CLIENT, SERVER)
    sent = [
        segment(
            base + more,
            payload,
            ack=base if flags & ACK else None,
            flags=flags & ~ACK,
            length=len(payload) + cut,
            back=back,
            ports=ports,
        )
        for back, base, more, flags, payload, cut in script
    ]
    events = feed(sent, reassembler)
    closed = set()
    offsets: dict[Flow, int] = {}
    for event in events:
        assert event.flow not in closed
        if isinstance(event, Opened):
            assert event.flow not in offsets
            offsets[event.flow] = 0
        elif isinstance(event, Data | Gap):
            assert event.offset == offsets[event.flow]
            length = event.length if isinstance(event, Gap) else len(event.payload)
            assert length > 0
            offsets[event.flow] += length
        elif isinstance(event, Closed):
            closed.add(event.flow)
    assert closed == set(offsets)


# --- whole files ---


def test_a_file_gives_its_streams(tmp_path) -> None:
    found = streams(read_streams(write_with_dpkt(tmp_path / "a.pcapng", conversation())))
    assert [(str(flow), bytes(stream.content), stream.how) for flow, stream in found.items()] == [
        ("10.0.0.1:40000 -> 10.0.0.2:5555", b"gradient" * 10, "fin"),
        ("10.0.0.2:5555 -> 10.0.0.1:40000", b"average" * 9, "fin"),
    ]


def test_streams_are_closed_before_the_error_of_a_damaged_file(tmp_path) -> None:
    path = write_with_dpkt(tmp_path / "a.pcapng", conversation()[:5])
    path.write_bytes(path.read_bytes() + b"\x06\0\0\0\x03\0\0\0" + bytes(20))
    events = []
    reader = CaptureReader(path)
    with pytest.raises(CaptureError):
        for event in read_streams(reader):
            events.append(event)
    assert {stream.how for stream in streams(events).values()} == {"capture ended"}
    assert reader.statistics.packets == 5
