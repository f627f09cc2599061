"""A training job on paper: the traffic that the ZeroMQ exchange would make, without sockets, and the truth beside it.

Written from the public format alone (`harness.wire`, RFC 37); shares no code with the exchange or with the decoder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from attack.capture.streams import Closed, Data, Flow, Gap, Opened, StreamEvent
from harness.models import load_optimizer
from harness.wire import SERVER_RANK, Header, Kind, Layout
from harness.wire.coded import Coded
from harness.wire.dense import Dense

RUN = bytes(range(8))
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)


def frame(body: bytes, *, more: bool = False, command: bool = False) -> bytes:
    """One ZMTP frame."""
    flags = more | 4 * command
    if len(body) > 255:
        return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body
    return bytes([flags, len(body)]) + body


def ready(kind: str) -> bytes:
    """The NULL handshake's only command."""
    return frame(b"\x05READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind.encode(), command=True)


def _unaltered(header: Header) -> Header:
    return header


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
    """What one side sent at once."""

    flow: Flow
    data: bytes


@dataclasses.dataclass(kw_only=True)
class Job:
    """What to train: random gradients over a few shapes. `writes` is the traffic, the rest the truth."""

    world: int = 2
    steps: int = 3
    shapes: tuple[tuple[int, ...], ...] = ((12, 3, 5, 5), (12,), (10, 61), (10,))
    buffers: tuple[tuple[int, ...], ...] = ()
    servers: int = 1
    ranks_serve: bool = False
    chunk: int = 256
    """Elements."""
    first_step: int = 0
    optimizer: str = "sgd:lr=0.1"
    seed: int = 0
    run: bytes = RUN
    alter: Callable[[Header], Header] = _unaltered
    """Changes a GRADIENT's header on its way, as no honest sender does."""
    code: Callable[[int, int, np.ndarray], Coded] = lambda rank, step, gradient: Dense(gradient)
    """What a rank sends in place of its gradient, in the order of steps."""

    def __post_init__(self) -> None:
        self.writes: list[Write] = []
        self.gradients: dict[tuple[int, int], np.ndarray] = {}
        """By step and rank."""
        self.weights: dict[int, np.ndarray] = {}
        self.averages: dict[int, np.ndarray] = {}
        if self.ranks_serve:
            self.servers = self.world
        generator = np.random.default_rng(self.seed)
        self.layout = Layout(world=self.world, parameters=self.shapes, buffers=self.buffers)
        self._greet()
        parameters = self._broadcast(generator)
        optimizer = load_optimizer(self.optimizer, parameters)
        for step in range(self.first_step, self.first_step + self.steps):
            self.weights[step] = torch.cat([p.detach().reshape(-1) for p in parameters]).numpy()
            for rank in range(self.world):
                gradient = generator.standard_normal(self.layout.parameter_count) * 10.0 ** generator.integers(-6, 2)
                self.gradients[step, rank] = gradient.astype(np.float32)
            average = self._exchange(step)
            at = 0
            for parameter in parameters:
                view = torch.from_numpy(average)[at : at + parameter.numel()].view_as(parameter)
                parameter.grad, at = view, at + parameter.numel()
            optimizer.step()
        for rank, server in self._links():
            self._say(self.up(rank, server), Kind.BYE, rank, self.first_step + self.steps)

    def up(self, rank: int, server: int) -> Flow:
        """The direction from a rank to a server."""
        return Flow(source=f"10.0.0.{rank + 1}:{40000 + server}", destination=f"10.0.1.{server + 1}:5555")

    def _links(self) -> list[tuple[int, int]]:
        ranks, servers = range(self.world), range(self.servers)
        return [(rank, server) for rank in ranks for server in servers if not (self.ranks_serve and rank == server)]

    def _owner(self, server: int) -> int:
        return server if self.ranks_serve else SERVER_RANK

    def _chunks(self, total: int) -> Iterator[tuple[int, int, int]]:
        for server in range(self.servers):
            end = (server + 1) * total // self.servers
            for at in range(server * total // self.servers, end, self.chunk):
                yield server, at, min(self.chunk, end - at)

    def _say(self, flow: Flow, kind: Kind, rank: int, step: int, values: bytes = b"", **place: Any) -> None:
        header = Header(kind=kind, run=self.run, rank=rank, step=step, size=len(values), **place)
        if kind is Kind.GRADIENT:
            header = self.alter(header)
        self.writes.append(Write(flow=flow, data=frame(header.pack(), more=True) + frame(values)))

    def _greet(self) -> None:
        for rank, server in self._links():
            up = self.up(rank, server)
            self.writes.append(Write(flow=up, data=GREETING + ready("DEALER")))
            self.writes.append(Write(flow=up.reverse, data=GREETING + ready("ROUTER")))
        for rank, server in self._links():
            self._say(self.up(rank, server), Kind.HELLO, rank, self.first_step, self.layout.pack())
        for rank, server in self._links():
            self._say(self.up(rank, server).reverse, Kind.WELCOME, self._owner(server), self.first_step)

    def _broadcast(self, generator: np.random.Generator) -> list[torch.nn.Parameter]:
        total = self.layout.parameter_count + self.layout.buffer_count
        state = generator.standard_normal(total).astype(np.float32)
        self.buffer_values = state[self.layout.parameter_count :]
        for server, at, count in self._chunks(total):
            values, place = state[at : at + count].tobytes(), {"at": at, "count": count, "total": total}
            if (0, server) in self._links():
                self._say(self.up(0, server), Kind.WEIGHTS, 0, self.first_step, values, **place)
            for rank, other in self._links():
                if other == server and rank != 0:
                    flow = self.up(rank, server).reverse
                    self._say(flow, Kind.WEIGHTS, self._owner(server), self.first_step, values, **place)
        parts = torch.from_numpy(state[: self.layout.parameter_count].copy()).split([math.prod(s) for s in self.shapes])
        return [torch.nn.Parameter(part.view(shape)) for part, shape in zip(parts, self.shapes, strict=True)]

    def _exchange(self, step: int) -> np.ndarray:
        total = self.layout.parameter_count
        coded = [self.code(rank, step, self.gradients[step, rank]) for rank in range(self.world)]
        average = coded[0].values().copy()
        for one in coded[1:]:
            average += one.values()
        average /= np.float32(self.world)
        self.averages[step] = average
        for server, at, count in self._chunks(total):
            place = {"at": at, "count": count, "total": total}
            ranks = [rank for rank, other in self._links() if other == server]
            for rank in ranks:
                codec, params, values = coded[rank].part(at, count)
                flow = self.up(rank, server)
                self._say(flow, Kind.GRADIENT, rank, step, bytes(values), codec=codec, params=params, **place)
            for rank in ranks:
                values = average[at : at + count].tobytes()
                self._say(self.up(rank, server).reverse, Kind.AVERAGE, self._owner(server), step, values, **place)
        return average


def cut(data: bytes, size: int) -> Iterator[bytes]:
    """As TCP does it: segments of at most `size` bytes."""
    return (data[at : at + size] for at in range(0, len(data), size))


def events(
    writes: list[Write], *, segment: int = 1448, lost: Callable[[int], bool] = lambda index: False, skip: int = 0
) -> Iterator[StreamEvent]:
    """What reassembly makes of the traffic. `lost` says which segments the tap missed; it came `skip` segments late."""
    offsets: dict[Flow, int] = {}
    index = 0
    for write in writes:
        for data in cut(write.data, segment):
            flow, time = write.flow, index * 1e-4
            index += 1
            if index <= skip:
                offsets.setdefault(flow, -1)
                continue
            if offsets.get(flow, -1) < 0:
                yield Opened(flow=flow, time=time, from_start=flow not in offsets)
                offsets[flow] = 0
            if lost(index - 1):
                yield Gap(flow=flow, time=time, offset=offsets[flow], length=len(data))
            else:
                yield Data(flow=flow, time=time, offset=offsets[flow], payload=data)
            offsets[flow] += len(data)
    for flow, offset in offsets.items():
        if offset >= 0:
            yield Closed(flow=flow, time=index * 1e-4, how="fin")
