"""What clients say to torch's rendezvous store."""

from __future__ import annotations

import random

import pytest

from attack.capture.streams import Flow
from attack.decode.directory import Directory
from attack.decode.listings import ListingSearch
from attack.decode.notes import Notes
from attack.decode.tcpstore import TcpStoreReader

FLOW = Flow(source="[::1]:40000", destination="[::1]:29500")
HELLO = b"\0" + (0x3C85F7CE).to_bytes(4, "little")


def text(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def listens(*, port: int, address: bytes, family: int, world: int) -> bytes:
    where = family.to_bytes(2, "little") + port.to_bytes(2, "big")
    sockaddr = (where + (bytes(4) if family == 10 else b"") + address).ljust(128, b"\0")
    return text(b"localhost") + (136).to_bytes(8, "little") + sockaddr + b"\xff" * 8 + bytes(8 * world)


REQUESTS = [
    HELLO,
    b"\x0d" + bytes(4),
    b"\x04" + text(b"init/") + (1).to_bytes(8, "little"),
    b"\x01" + text(b"/0//cpu//0/1") + text(listens(port=4711, address=bytes(15) + b"\x01", family=10, world=2)),
    b"\x0a" + (2).to_bytes(8, "little") + text(b"a") + text(b"b"),
    b"\x0b" + (1).to_bytes(8, "little") + text(b"x") + text(b"y"),
    b"\x06" + (1).to_bytes(8, "little") + text(b"a"),
    b"\x0c",
    b"\x01" + text(b"/0//cpu//0/0") + text(listens(port=80, address=bytes([10, 0, 0, 7]), family=2, world=0)),
]
STREAM = b"".join(REQUESTS)


def read(parts: list[bytes]) -> tuple[Directory, list[str]]:
    directory, notes = Directory(), Notes()
    reader = TcpStoreReader(notes=notes, directory=directory, optimizer=None, run=None)
    reader.open(FLOW, from_start=True)
    for part in parts:
        reader.receive(FLOW, 0.0, part)
    reader.close(FLOW, finished=True)
    return directory, notes.lines()


def test_addresses_of_ranks_are_read_in_any_pieces() -> None:
    for size in (1, 3, 50, 10_000):
        directory, notes = read([STREAM[at : at + size] for at in range(0, len(STREAM), size)])
        [group] = directory.groups()
        assert (group.name, group.world) == ("/0//cpu//0", 2)
        assert group.ranks == {"[::1]:4711": 1, "10.0.0.7:80": 0}
        assert notes == []


FETCHING = [
    (HELLO, b""),
    (b"\x0d" + (77).to_bytes(4, "little"), (77).to_bytes(4, "little")),
    (b"\x04" + text(b"init/") + (1).to_bytes(8, "little"), (5).to_bytes(8, "little")),
    (b"\x01" + text(b"mine") + text(b"value"), b""),
    (b"\x06" + (1).to_bytes(8, "little") + text(b"/0//cpu//0/0"), b"\0"),
    (
        b"\x03" + text(b"/0//cpu//0/0"),
        text(listens(port=4711, address=bytes([10, 0, 0, 7]), family=2, world=2)),
    ),
    (
        b"\x0a" + (2).to_bytes(8, "little") + text(b"other") + text(b"/0//cpu//0/1"),
        text(b"") + text(listens(port=80, address=bytes([10, 0, 0, 8]), family=2, world=2)),
    ),
]
REQUESTED, ANSWERED = (b"".join(sides) for sides in zip(*FETCHING, strict=True))
WHOLE = {"10.0.0.7:4711": 0, "10.0.0.8:80": 1}


def hear(parts: list[tuple[Flow, bytes]], *, doubted: Flow | None = None) -> dict[str, int]:
    """Ranks by address, from both sides of a connection in the order given."""
    directory = Directory()
    reader = TcpStoreReader(notes=Notes(), directory=directory, optimizer=None, run=None)
    for flow in (FLOW, FLOW.reverse):
        reader.open(flow, from_start=True)
    if doubted is not None:
        reader.doubt(doubted, 20, 21)
    for flow, part in parts:
        reader.receive(flow, 0.0, part)
    reader.close(FLOW, finished=True)
    reader.close(FLOW.reverse, finished=True)
    return {address: rank for group in directory.groups() for address, rank in group.ranks.items()}


def test_what_a_rank_fetches_is_read_from_the_answers_in_any_pieces_and_order() -> None:
    draw = random.Random(0)
    assert hear([(FLOW, REQUESTED), (FLOW.reverse, ANSWERED)]) == WHOLE
    assert hear([(FLOW.reverse, ANSWERED), (FLOW, REQUESTED)]) == WHOLE
    for size in (1, 7, 100):
        parts = [(FLOW, REQUESTED[at : at + size]) for at in range(0, len(REQUESTED), size)]
        answers = [(FLOW.reverse, ANSWERED[at : at + size]) for at in range(0, len(ANSWERED), size)]
        mixed = []
        while parts or answers:
            mixed.append((parts if parts and (not answers or draw.random() < 0.5) else answers).pop(0))
        assert hear(mixed) == WHOLE


def test_answers_that_do_not_fit_their_requests_are_not_read() -> None:
    assert hear([(FLOW, REQUESTED), (FLOW.reverse, b"\x4e" + ANSWERED[1:])]) == {}  # another number than the PING's
    cancelled = ANSWERED.replace(b"\0" + ANSWERED[13:30], b"\1" + ANSWERED[13:30])
    assert cancelled != ANSWERED and hear([(FLOW, REQUESTED), (FLOW.reverse, cancelled)]) == {}
    for doubted in (FLOW, FLOW.reverse):
        assert hear([(FLOW, REQUESTED), (FLOW.reverse, ANSWERED)], doubted=doubted) == {}
    unread = b"\x0c" + REQUESTED[len(HELLO) + 5 :]  # CANCEL_WAIT: what follows could be anything
    assert hear([(FLOW, REQUESTED[: len(HELLO) + 5] + unread), (FLOW.reverse, ANSWERED)]) == {}


def test_both_sides_are_known_by_their_first_bytes() -> None:
    assert TcpStoreReader.sniff(HELLO) is True
    assert TcpStoreReader.sniff(HELLO[:3]) is None
    assert TcpStoreReader.sniff(HELLO[:3] + b"\0\0") is False
    assert TcpStoreReader.sniff(ANSWERED) is True
    assert TcpStoreReader.sniff(ANSWERED[:11]) is None
    greeting_of_gloo = (3).to_bytes(8, "little") + (48).to_bytes(8, "little")
    assert TcpStoreReader.sniff(greeting_of_gloo) is False


def test_damage_is_a_note_and_nothing_else() -> None:
    draw = random.Random(0)
    for _ in range(200):
        data = bytearray(STREAM)
        data[draw.randrange(len(data))] = draw.randrange(256)
        read([bytes(data), draw.randbytes(50)])
    _, notes = read([HELLO, b"\x63"])
    assert notes == [f"not read further: flow {FLOW}, byte 5: wanted a request of TCPStore, got 99"]


def test_a_rank_that_moves_makes_a_new_group() -> None:
    directory = Directory()
    directory.add("0", 0, "a:1", 2)
    directory.add("0", 1, "a:2", 2)
    directory.add("0", 1, "a:3", 2)
    assert directory.groups()[0].ranks == {"a:3": 1}


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_behind_a_hole_listings_are_found_by_their_form(size: int) -> None:
    """Requests name the rank; answers say no more than that some rank listens there."""
    for stream, flow, cut in ((REQUESTED + STREAM, FLOW, 30), (ANSWERED, FLOW.reverse, 13)):
        directory = Directory()
        reader = TcpStoreReader(notes=Notes(), directory=directory, optimizer=None, run=None)
        reader.open(flow, from_start=True)
        reader.receive(flow, 0.0, stream[: cut - 10])
        reader.gap(flow, 0.0, 10)
        for at in range(cut, len(stream), size):
            reader.receive(flow, 0.0, stream[at : at + size])
        if flow == FLOW:
            assert {(a, r) for group in directory.groups() for a, r in group.ranks.items()} == {
                ("[::1]:4711", 1),
                ("10.0.0.7:80", 0),
            }
        else:
            assert directory.nameless == {"10.0.0.7:4711": 2, "10.0.0.8:80": 2} and not directory.groups()


def test_a_listing_with_a_hole_in_it_is_none() -> None:
    for start in range(150, len(STREAM) - 10, 23):
        directory = Directory()
        reader = TcpStoreReader(notes=Notes(), directory=directory, optimizer=None, run=None)
        reader.open(FLOW, from_start=False)
        reader.receive(FLOW, 0.0, STREAM[:start])
        reader.gap(FLOW, 0.0, 3)
        reader.receive(FLOW, 0.0, STREAM[start + 3 :])
        found = {(a, r) for group in directory.groups() for a, r in group.ranks.items()}
        assert found <= {("[::1]:4711", 1), ("10.0.0.7:80", 0)}


def test_random_bytes_hold_no_listing() -> None:
    draw = random.Random(0)
    for _ in range(200):
        data = bytearray(STREAM + ANSWERED)
        for _ in range(20):
            data[draw.randrange(len(data))] = draw.randrange(256)
        search = ListingSearch()
        for listing in search.receive(bytes(data)):
            assert listing.rank is None or listing.group is not None
