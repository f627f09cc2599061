"""The desk's top object: a capture file in; what it holds, and the observations that it proves, out.

Finds out which protocol each stream speaks and hands it to that protocol's reader. Knows no protocol itself.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from attack.capture.reader import CaptureReader
from attack.capture.reassembly import read_streams
from attack.capture.streams import Bytes, Closed, Conflict, Data, Flow, Gap, Opened, StreamEvent
from attack.decode.directory import Directory
from attack.decode.gloo.reader import GlooReader
from attack.decode.notes import Notes
from attack.decode.protocol import ProtocolReader
from attack.decode.tcpstore import TcpStoreReader
from attack.decode.tls import TlsReader
from attack.decode.zeromq import ZeromqReader
from attack.errors import AttackError, CaptureError
from attack.observation import Observation
from attack.shadow import build_rule

READERS: tuple[type[ProtocolReader], ...] = (ZeromqReader, TlsReader, TcpStoreReader, GlooReader)
"""Asked in this order for each stream. One that is not seen from its start is read by all that can join it, until one
has proven that it is its own."""

SNIFF_BYTES = 64
"""No protocol needs more to be recognized."""
MAX_GAPS = 1000
"""Holes that are listed; all are counted."""


@dataclasses.dataclass(kw_only=True, slots=True)
class _Stream:
    """One direction of one connection."""

    flow: Flow
    first_time: float
    last_time: float
    from_start: bool
    bytes: int = 0
    gaps: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """Offset and length of holes, up to `MAX_GAPS` in a capture."""
    head: bytearray | None = dataclasses.field(default_factory=bytearray)
    """The first bytes, until it is clear what they are."""
    readers: list[ProtocolReader] = dataclasses.field(default_factory=list)
    """Who reads it; several, until one recognizes it."""
    doubts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """What the reader must be told once there is one."""

    @property
    def protocol(self) -> str:
        return next((reader.name for reader in self.readers if reader.recognizes(self.flow)), "unknown")


class Recording:
    """A capture file at the eavesdropper's desk. Each call of `inspect` or `observations` reads the file once more."""

    def __init__(self, path: str | os.PathLike[str], *, optimizer: str | None = None, run: str | None = None) -> None:
        """
        Args:
            path: pcapng or pcap.
            optimizer: the job's update rule, e.g. `sgd:lr=0.1`; without it only the first step's weights are known.
            run: the run to read, in hex, where the capture holds several; None: the first.

        Raises: CaptureError where the file is not a capture, AttackError where an option is wrong.
        """
        self.path = path
        self._optimizer = optimizer
        if optimizer is not None:
            build_rule(optimizer, [nn.Parameter(torch.zeros(1))])  # a typing error should not wait for the file
        try:
            self._run = None if run is None else bytes.fromhex(run)
        except ValueError:
            raise AttackError(f"run: wanted hexadecimal digits, got {run!r}") from None
        self._capture = CaptureReader(path)

    def observations(self) -> Iterator[Observation]:
        """What the wire proves of each rank at each step, in order of step and then rank.

        Streaming: what was yielded is not kept, and memory does not grow with the capture's length.
        Raises: CaptureError where the file is damaged, after everything before.
        """
        yield from self._desk().observations()

    def inspect(self) -> dict[str, Any]:
        """What the capture holds, as plain values: the JSON of `gradtap inspect`."""
        found = self._desk().inspect()
        statistics = dataclasses.asdict(self._capture.statistics)
        return {"capture": {"path": os.fspath(self.path), **statistics}, **found}

    def _desk(self) -> Desk:
        return Desk(read_streams(self._capture), optimizer=self._optimizer, run=self._run)


class Desk:
    """One pass over the streams of a capture."""

    def __init__(
        self, events: Iterable[StreamEvent], *, optimizer: str | None = None, run: bytes | None = None
    ) -> None:
        self.notes = Notes()
        self._events = events
        directory = Directory()
        self._readers = [
            reader(notes=self.notes, directory=directory, optimizer=optimizer, run=run) for reader in READERS
        ]
        self._streams: dict[Flow, _Stream] = {}
        self._gaps = self._gap_bytes = 0

    def observations(self) -> Iterator[Observation]:
        """What the streams prove. Ask once. Raises: CaptureError, after everything before the damage."""
        try:
            for event in self._events:
                self._handle(event)
                for reader in self._streams[event.flow].readers:
                    yield from reader.observations()
        except CaptureError:
            yield from self._rest()
            raise
        yield from self._rest()

    def inspect(self) -> dict[str, Any]:
        """What was found, after a pass. Ask once, and not for `observations` as well."""
        steps: dict[int, list[dict[str, Any]]] = {}
        try:
            for seen in self.observations():
                rank: dict[str, Any] = {
                    "rank": seen.rank,
                    "complete": seen.complete,
                    "known_fraction": seen.known_fraction,
                    "exact_fraction": seen.exact_fraction,
                    "weights_known": seen.weights is not None,
                }
                if seen.ranks:
                    rank["ranks"] = list(seen.ranks)
                if seen.group is not None:
                    rank["group"] = seen.group
                if seen.factors:
                    rank["factors"] = [
                        {
                            "parameter": factor.parameter,
                            "name": factor.name,
                            "shape": list(factor.values.shape),
                            "complete": bool(factor.known.all()),
                        }
                        for factor in seen.factors
                    ]
                steps.setdefault(seen.step, []).append(rank)
        except CaptureError as error:
            self.notes.add(f"the capture is damaged, and was read up to there: {error}")
        shapes = next((reader.shapes for reader in self._readers if reader.shapes is not None), None)
        world_size = next((reader.world_size for reader in self._readers if reader.world_size is not None), None)
        sealed = [entry for reader in self._readers for entry in reader.sealed()]
        if self._gaps:
            self.notes.add(f"{self._gaps} holes, {self._gap_bytes} bytes in all")
        return {
            "flows": [self._figures(stream) for stream in self._streams.values()],
            "protocols": sorted({stream.protocol for stream in self._streams.values()}),
            "encrypted": bool(sealed),
            "sealed": sealed,
            "world_size": world_size,
            "steps": [{"step": step, "ranks": ranks} for step, ranks in sorted(steps.items())],
            "parameters": {
                "count": None if shapes is None else sum(map(math.prod, shapes)),
                "shapes": None if shapes is None else [list(shape) for shape in shapes],
            },
            "groups": [entry for reader in self._readers for entry in reader.groups()],
            "gaps": [
                {"flow": str(stream.flow), "offset": offset, "length": length}
                for stream in self._streams.values()
                for offset, length in stream.gaps
            ],
            "notes": self.notes.lines(),
        }

    def _rest(self) -> Iterator[Observation]:
        for reader in self._readers:
            yield from reader.observations(end=True)

    def _handle(self, event: StreamEvent) -> None:
        match event:
            case Opened(flow=flow, time=time, from_start=from_start):
                self._streams[flow] = _Stream(flow=flow, first_time=time, last_time=time, from_start=from_start)
            case Data(flow=flow, time=time, payload=payload):
                self._receive(self._streams[flow], time, payload)
            case Gap(flow=flow, time=time, offset=offset, length=length):
                self._gap(self._streams[flow], time, offset, length)
            case Conflict(flow=flow, offset=offset, length=length):
                self._doubt(self._streams[flow], offset, offset + length)
            case Closed(flow=flow, time=time, how=how):
                self._close(self._streams[flow], time, finished=how in ("fin", "reset"))

    def _figures(self, stream: _Stream) -> dict[str, Any]:
        return {
            "source": stream.flow.source,
            "destination": stream.flow.destination,
            "connection": stream.flow.incarnation,
            "protocol": stream.protocol,
            "bytes": stream.bytes,
            "from_start": stream.from_start,
            "first_time": stream.first_time,
            "last_time": stream.last_time,
            "gaps": [{"offset": offset, "length": length} for offset, length in stream.gaps],
        }

    def _receive(self, stream: _Stream, time: float, payload: Bytes) -> None:
        stream.last_time = time
        stream.bytes += len(payload)
        if stream.head is not None:
            stream.head += payload
            payload = stream.head
            if not self._recognize(stream):
                return
        self._feed(stream, time, payload)

    def _feed(self, stream: _Stream, time: float, payload: Bytes) -> None:
        for reader in stream.readers:
            reader.receive(stream.flow, time, payload)
        if len(stream.readers) > 1 and any(reader.recognizes(stream.flow) for reader in stream.readers):
            others = [reader for reader in stream.readers if not reader.recognizes(stream.flow)]
            stream.readers = [reader for reader in stream.readers if reader not in others]
            for reader in others:
                reader.close(stream.flow, finished=False)

    def _gap(self, stream: _Stream, time: float, offset: int, length: int) -> None:
        stream.last_time = time
        if self._gaps < MAX_GAPS:
            stream.gaps.append((offset, length))
        self._gaps += 1
        self._gap_bytes += length
        if stream.head is not None:
            head = stream.head
            self._join(stream)
            if head:
                self._feed(stream, time, head)
        for reader in stream.readers:
            reader.gap(stream.flow, time, length)

    def _doubt(self, stream: _Stream, start: int, stop: int) -> None:
        if stream.head is not None:
            stream.doubts.append((start, stop))
            for reader in self._readers:
                reader.hint(stream.flow, b"")
        for reader in stream.readers:
            reader.doubt(stream.flow, start, stop)

    def _close(self, stream: _Stream, time: float, *, finished: bool) -> None:
        stream.last_time = time
        for reader in stream.readers:
            reader.close(stream.flow, finished=finished)

    def _recognize(self, stream: _Stream) -> bool:
        """Asks who speaks like this. False where more bytes must tell."""
        assert stream.head is not None
        head = bytes(stream.head[:SNIFF_BYTES])
        asked = [reader for reader in READERS if stream.from_start or reader.marks_start]
        answers = {reader: reader.sniff(head) for reader in asked}
        for reader, answer in answers.items():
            if answer:
                self._settle(stream, (reader,), from_start=True)
                return True
        if None in answers.values():
            if stream.from_start and not stream.doubts:
                for one in self._readers:
                    one.hint(stream.flow, head)
            return False
        if stream.from_start:
            stream.head = None
        else:
            self._join(stream)
        return True

    def _join(self, stream: _Stream) -> None:
        self._settle(stream, [reader for reader in READERS if reader.joins], from_start=False)

    def _settle(self, stream: _Stream, readers: Sequence[type[ProtocolReader]], *, from_start: bool) -> None:
        stream.head = None
        stream.readers = [reader for reader in self._readers if type(reader) in readers]
        for reader in stream.readers:
            reader.open(stream.flow, from_start=from_start)
            for start, stop in stream.doubts:
                reader.doubt(stream.flow, start, stop)
