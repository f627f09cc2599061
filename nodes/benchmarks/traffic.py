"""Captures made on paper, as large as wanted: what ranks would send, as a tap would write it, without any socket.

Gloo's all-reduce of a DistributedDataParallel job, and this project's exchange through one ZeroMQ server. Made for
timing: gradients are random, weights are not trained, and each step sends the same. Knows nothing of decoding but the
geometry of a ring, and shares its heads.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from attack.capture.packets import LINK_RAW
from attack.capture.pcapng import PcapngWriter
from attack.decode.gloo.head import Kind, Opcode, Slot, pack_head
from attack.decode.gloo.ring import Ring
from harness.wire import SERVER_RANK, Header, Layout
from harness.wire import Kind as Says

MOST_BYTES = 65_483
"""In one segment on a loopback with IPv4: its MTU is 65,536."""
COLUMNS = 1000
"""Of the weights; the model is one matrix."""
BUCKET_BYTES = 25 << 20
CHUNK_BYTES = 1 << 20
_SYN, _ACK = 2, 16
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)


class Wire:
    """Writes TCP connections to a capture: every rank has an address, and connects to those below its own."""

    def __init__(self, path: Path) -> None:
        self._writer = PcapngWriter(path.open("wb"), interfaces=[("lo", LINK_RAW)])
        self._sent: dict[tuple[int, int], int] = {}
        self._time_ns = 1_700_000_000_000_000_000

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def connect(self, source: int, target: int) -> None:
        """Begins a connection, and both directions with it."""
        for ends, flags in (((source, target), _SYN), ((target, source), _SYN | _ACK), ((source, target), _ACK)):
            self._sent.setdefault(ends, 0)
            self._put(ends, flags, b"")
            if flags & _SYN:
                self._sent[ends] = 1

    def send(self, source: int, target: int, *data: bytes | memoryview) -> None:
        """Bytes on a connection that has begun."""
        whole = memoryview(b"".join(data))
        for at in range(0, len(whole), MOST_BYTES):
            piece = whole[at : at + MOST_BYTES]
            self._put((source, target), _ACK, piece)
            self._sent[source, target] += len(piece)

    def _put(self, ends: tuple[int, int], flags: int, payload: bytes | memoryview) -> None:
        """IPv4 and TCP, 20 bytes each; checksums are left out, as where a network card fills them in."""
        source, target = ends
        ports = (40_000 + target, 29_000) if source > target else (29_000, 40_000 + source)
        addresses = [socket.inet_aton(f"10.0.0.{end + 1}") for end in ends]
        total = 40 + len(payload)
        sequence, acknowledged = (self._sent.get(way, 0) & 0xFFFF_FFFF for way in (ends, ends[::-1]))
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, total, 0, 0, 64, 6, 0, *addresses)
        head += struct.pack(">HHIIBBHHH", *ports, sequence, acknowledged, 0x50, flags, 0xFFFF, 0, 0)
        self._time_ns += 10_000
        packet = memoryview(head + payload)
        self._writer.write([(0, self._time_ns, packet, len(packet))])


def write_gloo(path: Path, *, world_size: int, numel: int, steps: int) -> npt.NDArray[np.float32]:
    """A DistributedDataParallel job of one matrix and one small vector. Returns rank 0's gradient at every step."""
    shapes = ((numel // COLUMNS, COLUMNS), (numel % COLUMNS + 1,))
    sizes = [shapes[0][0] * COLUMNS, shapes[1][0]]
    generator = np.random.default_rng(0)
    gradients = [generator.standard_normal(sum(sizes), dtype=np.float32) for _ in range(world_size)]
    with Wire(path) as wire:
        for low in range(world_size):
            for high in range(low + 1, world_size):
                wire.connect(high, low)
                wire.send(high, low, high.to_bytes(8, "little"))
        job = _Gloo(wire, world_size)
        job.gather(len(shapes).to_bytes(8, "little"))
        numbers = [number for rows, *rest in shapes for number in (rows, *rest, *rest, 1)]
        job.broadcast(np.array(numbers, "<i8").tobytes())
        job.broadcast(generator.standard_normal(sum(sizes), dtype=np.float32).tobytes())
        divided = [gradient / np.float32(world_size) for gradient in gradients]
        whole = list(_ring(divided))
        buckets = [list(_ring([own[part] for own in divided])) for part in (slice(sizes[0], None), slice(sizes[0]))]
        job.reduce(whole)
        if steps > 1:
            job.broadcast(np.array([1, 0, len(buckets)], "<i4").tobytes())
            job.broadcast(np.array([1, 1], "<i4").tobytes())
        for _ in range(1, steps):
            for bucket in buckets:
                job.reduce(bucket)
    return gradients[0]


def write_zeromq(path: Path, *, world_size: int, numel: int, steps: int) -> npt.NDArray[np.float32]:
    """The project's exchange through one server. Returns rank 0's gradient at every step."""
    generator = np.random.default_rng(0)
    gradients = [generator.standard_normal(numel, dtype=np.float32) for _ in range(world_size)]
    average: npt.NDArray[np.float32] = np.mean(gradients, axis=0, dtype=np.float32)
    averages = [average for _ in gradients]
    layout = Layout(world=world_size, parameters=((numel,),), buffers=())
    ranks = range(1, world_size + 1)  # the server is below all of them
    with Wire(path) as wire:
        for rank in ranks:
            wire.connect(rank, 0)
            wire.send(rank, 0, _GREETING, _ready("DEALER"))
            wire.send(0, rank, _GREETING, _ready("ROUTER"))
            wire.send(rank, 0, *_message(Says.HELLO, rank - 1, 0, layout.pack()))
        for rank in ranks:
            wire.send(0, rank, *_message(Says.WELCOME, SERVER_RANK, 0, b""))
        _send_chunks(wire, Says.WEIGHTS, 0, generator.standard_normal(numel, dtype=np.float32), world_size)
        for step in range(steps):
            for kind, values in ((Says.GRADIENT, gradients), (Says.AVERAGE, averages)):
                _send_chunks(wire, kind, step, values, world_size)
        for rank in ranks:
            wire.send(rank, 0, *_message(Says.BYE, rank - 1, steps, b""))
    return gradients[0]


class _Gloo:
    """Collectives, one after the other."""

    def __init__(self, wire: Wire, world_size: int) -> None:
        self._wire = wire
        self._world_size = world_size
        self._tag = 0

    def gather(self, content: bytes) -> None:
        """A ring in which each rank passes on what it got, in two halves."""
        for _ in range(self._world_size - 1):
            for rank in range(self._world_size):
                for half in (content[:4], content[4:]):
                    self._send(Kind.ALLGATHER, rank, (rank + 1) % self._world_size, half)
        self._tag += 1

    def broadcast(self, content: bytes) -> None:
        """From rank 0 to each of the others."""
        for rank in range(1, self._world_size):
            self._send(Kind.BROADCAST, 0, rank, content)
        self._tag += 1

    def reduce(self, messages: list[tuple[int, bytes]]) -> None:
        """An all-reduce, of which the senders and payloads are given."""
        for rank, payload in messages:
            self._send(Kind.ALLREDUCE, rank, (rank - 1) % self._world_size, payload)
        self._tag += 1

    def _send(self, kind: Kind, source: int, target: int, payload: bytes) -> None:
        slot = Slot(kind, self._tag, 0)
        self._wire.send(source, target, pack_head(Opcode.NOTIFY_SEND_READY, slot, len(payload)))
        self._wire.send(target, source, pack_head(Opcode.NOTIFY_RECV_READY, slot, len(payload)))
        self._wire.send(source, target, pack_head(Opcode.SEND_UNBOUND_BUFFER, slot, len(payload)), payload)


def _ring(vectors: list[npt.NDArray[np.float32]]) -> Iterator[tuple[int, bytes]]:
    """Sender and payload of each message of an all-reduce; those of one sender in their order."""
    world_size = len(vectors)
    ring = Ring(vectors[0].nbytes, world_size, 4)
    for sent in itertools.zip_longest(*(ring.sent_by(rank)[0] for rank in range(world_size))):
        for rank, part in enumerate(sent):
            if part is None:
                continue  # of a short vector some ranks send less
            start, stop = (at // 4 for at in ring.place(part.segment))
            value = vectors[ring.author(part.segment, 0)][start:stop]
            for hop in range(1, part.hop + 1):
                value = value + vectors[ring.author(part.segment, hop)][start:stop]
            yield rank, value.tobytes()


def _send_chunks(
    wire: Wire,
    kind: Says,
    step: int,
    values: npt.NDArray[np.float32] | list[npt.NDArray[np.float32]],
    world_size: int,
) -> None:
    """Of a vector of each rank, or of rank 0's weights: chunk by chunk, as all ranks are under way at once."""
    vectors = values if isinstance(values, list) else [values] * world_size
    size, total = CHUNK_BYTES // 4, len(vectors[0])
    for at in range(0, total, size):
        for rank, vector in enumerate(vectors):
            chunk = vector[at : at + size]
            place = {"at": at, "count": len(chunk), "total": total}
            to_server = kind is Says.GRADIENT or (kind is Says.WEIGHTS and rank == 0)
            sender = rank if to_server else SERVER_RANK
            ends = (rank + 1, 0) if to_server else (0, rank + 1)
            wire.send(*ends, *_message(kind, sender, step, chunk.tobytes(), **place))


def _message(kind: Says, rank: int, step: int, payload: bytes, **place: Any) -> tuple[bytes, bytes]:
    header = Header(kind=kind, run=bytes(range(8)), rank=rank, step=step, size=len(payload), **place)
    return _frame(header.pack(), more=True), _frame(payload)


def _frame(body: bytes, *, more: bool = False) -> bytes:
    return bytes([more | 2]) + len(body).to_bytes(8, "big") + body


def _ready(kind: str) -> bytes:
    body = b"\x05READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind.encode()
    return bytes([4, len(body)]) + body
