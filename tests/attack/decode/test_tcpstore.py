"""What clients say to torch's rendezvous store."""

from __future__ import annotations

import random

from attack.capture.streams import Flow
from attack.decode.directory import Directory
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
    reader.close(FLOW)
    return directory, notes.lines()


def test_addresses_of_ranks_are_read_in_any_pieces() -> None:
    for size in (1, 3, 50, 10_000):
        directory, notes = read([STREAM[at : at + size] for at in range(0, len(STREAM), size)])
        [group] = directory.groups()
        assert (group.name, group.world) == ("/0//cpu//0", 2)
        assert group.ranks == {"[::1]:4711": 1, "10.0.0.7:80": 0}
        assert notes == []


def test_only_the_magic_number_is_taken_for_a_client() -> None:
    assert TcpStoreReader.sniff(HELLO) is True
    assert TcpStoreReader.sniff(HELLO[:3]) is None
    assert TcpStoreReader.sniff(b"\0\0") is False


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
