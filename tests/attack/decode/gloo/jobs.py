"""A stock DDP job on paper: its traffic over a simulated ring, with the truth beside it, as events of streams."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from attack.capture.streams import Closed, Data, Flow, Gap, Opened, StreamEvent
from attack.decode.gloo.head import Kind, Opcode, Slot, pack_head
from harness.models import load_optimizer
from tests.attack.decode.gloo.rings import ring

SHAPES = ((11, 7), (11,), (3, 11), (3,))


@dataclasses.dataclass(kw_only=True)
class PaperJob:
    """Random gradients over a few shapes; `writes` is the traffic."""

    world: int = 2
    steps: int = 3
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    buckets: tuple[tuple[int, ...], ...] = ((2, 3), (0, 1))
    """Parameters of each bucket after the first step."""
    between: int = 0
    """Elements of a sum that is made after each step, and is no gradient: a script's metrics."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._greet()
        self._train()

    def _greet(self) -> None:
        """The store, and the connections of all pairs."""
        self.generator = np.random.default_rng(self.seed)
        self.writes: list[tuple[Flow, bytes]] = []
        self.truth: dict[str, np.ndarray] = {}
        self._tag = 0
        self.store = Flow(source="10.0.0.1:50000", destination="10.0.0.1:29500")
        self.writes.append((self.store, b"\0" + (0x3C85F7CE).to_bytes(4, "little")))
        for first in range(self.world):
            for second in range(first + 1, self.world):
                self.writes.append((self._flow(second, first), second.to_bytes(8, "little")))
        for rank in range(self.world):
            self.writes.append((self.store, stored(rank, self.world)))

    def _build(self) -> np.ndarray:
        """What DDP says when it is built. Returns the weights."""
        self._gather([len(self.shapes).to_bytes(8, "little")] * self.world)
        numbers = [n for shape in self.shapes for n in (*shape, *strides(shape))]
        self._broadcast(np.array(numbers, "<i8").tobytes())
        weights = self.generator.standard_normal(sum(map(math.prod, self.shapes))).astype(np.float32)
        self._broadcast(weights.tobytes())
        return weights

    def _train(self) -> None:
        count, sizes, generator = len(self.shapes), [math.prod(shape) for shape in self.shapes], self.generator
        weights, ends = self._build(), np.cumsum(sizes)
        for step in range(self.steps):
            gradients = [
                (generator.standard_normal(sum(sizes)) * 10.0 ** generator.integers(-12, 3, sum(sizes))).astype("<f4")
                for _ in range(self.world)
            ]
            for gradient in gradients:
                gradient[generator.random(len(gradient)) < 0.1] = 0
            for rank, gradient in enumerate(gradients):
                self.truth[f"step{step}.rank{rank}.gradient"] = gradient
                self.truth[f"step{step}.rank{rank}.weights"] = weights
            if step == 1:
                self._broadcast_layout()
            layout = self.buckets if step else (tuple(range(count)),)
            divided = [gradient * np.float32(1 / self.world) for gradient in gradients]
            sums = self._reduce(
                [
                    [np.concatenate([own[ends[i] - sizes[i] : ends[i]] for i in bucket]) for own in divided]
                    for bucket in layout
                ]
            )
            if self.between:
                self._reduce([[generator.standard_normal(self.between).astype("<f4") for _ in range(self.world)]])
            average, at = np.zeros_like(weights), 0
            for index in (index for bucket in layout for index in bucket):
                average[ends[index] - sizes[index] : ends[index]] = np.concatenate(sums)[at : at + sizes[index]]
                at += sizes[index]
            weights = descended(weights, average)

    def _broadcast_layout(self) -> None:
        order = [index for bucket in self.buckets for index in bucket]
        self._broadcast(np.array([*order, len(self.buckets)], "<i4").tobytes())
        self._broadcast(np.array([len(bucket) for bucket in self.buckets], "<i4").tobytes())

    def _flow(self, source: int, target: int) -> Flow:
        """Of two ranks the higher one connects."""
        pairs = ((source, target), (target, source))
        ends = [f"10.0.0.{rank + 1}:{40000 + other if rank > other else 29000}" for rank, other in pairs]
        return Flow(source=ends[0], destination=ends[1])

    def _send(self, source: int, target: int, kind: Kind, tag: int, payload: bytes) -> None:
        slot, flow = Slot(kind, tag, 0), self._flow(source, target)
        self.writes.append((flow, pack_head(Opcode.NOTIFY_SEND_READY, slot, len(payload))))
        self.writes.append((flow.reverse, pack_head(Opcode.NOTIFY_RECV_READY, slot, len(payload))))
        self.writes.append((flow, pack_head(Opcode.SEND_UNBOUND_BUFFER, slot, len(payload)) + payload))

    def _gather(self, blocks: list[bytes]) -> None:
        """Each rank's block goes round, in two halves."""
        for hop in range(self.world - 1):
            for rank in range(self.world):
                block = blocks[(rank - hop) % self.world]
                for half in (block[: len(block) // 2], block[len(block) // 2 :]):
                    self._send(rank, (rank + 1) % self.world, Kind.ALLGATHER, self._tag, half)
        self._tag += 1

    def _broadcast(self, payload: bytes) -> None:
        for rank in range(1, self.world):
            self._send(0, rank, Kind.BROADCAST, self._tag, payload)
        self._tag += 1

    def _reduce(self, buckets: list[list[np.ndarray]]) -> list[np.ndarray]:
        """All buckets are under way at once: their messages mix, those of one keep their order. Returns the sums."""
        rings = [ring(vectors) for vectors in buckets]
        waiting = [
            (rank, self._tag + index, list(payloads))
            for index, (sent, _) in enumerate(rings)
            for rank, payloads in enumerate(sent)
        ]
        while waiting := [entry for entry in waiting if entry[2]]:
            rank, tag, payloads = waiting[self.generator.integers(len(waiting))]
            self._send(rank, (rank - 1) % self.world, Kind.ALLREDUCE, tag, payloads.pop(0))
        self._tag += len(buckets)
        return [total for _, total in rings]


def descended(weights: np.ndarray, average: np.ndarray) -> np.ndarray:
    """One step of the ranks' optimizer."""
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    parameter.grad = torch.from_numpy(average)
    load_optimizer("sgd:lr=0.1", [parameter]).step()
    return parameter.detach().numpy()


def stored(rank: int, world: int) -> bytes:
    """SET, by which a rank says where it listens."""
    key, port = f"0//cpu//0/{rank}".encode(), (29000).to_bytes(2, "big")
    sockaddr = ((2).to_bytes(2, "little") + port + bytes([10, 0, 0, rank + 1])).ljust(128, b"\0")
    value = (
        (4).to_bytes(8, "little") + b"host" + (136).to_bytes(8, "little") + sockaddr + b"\xff" * 8 + bytes(8 * world)
    )
    return b"\x01" + b"".join(len(field).to_bytes(8, "little") + field for field in (key, value))


def strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def events(
    writes: list[tuple[Flow, bytes]], *, segment: int = 1448, lost: Callable[[int, Flow], bool] = lambda at, flow: False
) -> Iterator[StreamEvent]:
    """What reassembly makes of the traffic, if the tap missed the segments that `lost` names."""
    offsets: dict[Flow, int] = {}
    index = 0
    for flow, data in writes:
        for at in range(0, len(data), segment):
            piece = data[at : at + segment]
            for one in (flow, flow.reverse):
                if one not in offsets:
                    yield Opened(flow=one, time=0.0, from_start=True)
                    offsets[one] = 0
            if lost(index, flow):
                yield Gap(flow=flow, time=index * 1e-4, offset=offsets[flow], length=len(piece))
            else:
                yield Data(flow=flow, time=index * 1e-4, offset=offsets[flow], payload=piece)
            offsets[flow] += len(piece)
            index += 1
    for flow in offsets:
        yield Closed(flow=flow, time=index * 1e-4, how="fin")
