"""All Gloo connections of a capture -> observations of one job.

Ties the pieces together: framing, network, job and shadow. Knows nothing of bytes or numbers itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from attack.capture.streams import Bytes, Flow
from attack.decode.gloo.framing import Event, GlooDecoder, Hello, Lost, Message, Resumed
from attack.decode.gloo.head import HEAD_BYTES, HELLO_BYTES, MAX_WORLD, parse_head
from attack.decode.gloo.inversion import FLOAT32
from attack.decode.gloo.job import Job, Step
from attack.decode.gloo.network import ALL_TAGS, Network
from attack.decode.protocol import ProtocolReader
from attack.errors import DecodeError
from attack.observation import Known, Observation, Shapes
from attack.shadow import Shadow

MAX_WAITING_BYTES = 256 << 20
"""Payloads that are kept for as long as no rank is known: ranks say who they are before they send any."""


class GlooReader(ProtocolReader):
    """Every connection between Gloo pairs; observations are of the first group of ranks."""

    name = "gloo"
    joins = True
    marks_start = False  # every message has a head, and what precedes one may look like a greeting

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._decoders: dict[Flow, GlooDecoder | None] = {}
        self._recognized: set[Flow] = set()
        self._joined: set[Flow] = set()
        self._network = Network(self.directory)
        self._job = Job(self._network, self.notes)
        self._shadow: Shadow | None = None
        self._began = False

    @staticmethod
    def sniff(head: bytes) -> bool | None:
        """A head, or a rank and then a head."""
        if len(head) < HEAD_BYTES:
            return None
        if parse_head(head) is not None:
            return True
        if int.from_bytes(head[:HELLO_BYTES], "little") >= MAX_WORLD:
            return False
        return parse_head(head, HELLO_BYTES) is not None if len(head) >= HELLO_BYTES + HEAD_BYTES else None

    def open(self, flow: Flow, *, from_start: bool) -> None:
        """A stream begins."""
        self._decoders[flow] = GlooDecoder(flow, from_start=from_start)
        self._network.open(flow, proven=from_start)
        if from_start:
            self._recognized.add(flow)
        else:
            self._network.lose(flow)

    def hint(self, flow: Flow, head: bytes) -> None:
        """A pair that is idle has greeted, and says no more."""
        rank = int.from_bytes(head, "little") if len(head) == HELLO_BYTES else MAX_WORLD
        self._network.hint(flow, rank if rank < MAX_WORLD else None)

    def receive(self, flow: Flow, time: float, data: Bytes) -> None:
        """Decodes the next bytes of a stream."""
        if (decoder := self._decoders[flow]) is not None:
            self._handle(flow, decoder.receive(data))

    def gap(self, flow: Flow, time: float, length: int) -> None:
        """Decodes a hole of a stream."""
        if (decoder := self._decoders[flow]) is not None:
            self._handle(flow, decoder.gap(length))

    def doubt(self, flow: Flow, start: int, stop: int) -> None:
        """Nothing is believed that is built from these bytes."""
        super().doubt(flow, start, stop)
        self._network.doubt(flow, start, stop)

    def close(self, flow: Flow) -> None:
        """Ends a stream."""
        if (decoder := self._decoders[flow]) is not None:
            self._handle(flow, decoder.finish())
        self._decoders[flow] = None
        self._network.end(flow)

    def recognizes(self, flow: Flow) -> bool:
        """A stream seen from its start was sniffed; another must have shown two messages, one behind the other."""
        return flow in self._recognized

    def observations(self, *, end: bool = False) -> Iterator[Observation]:
        """Steps of which nothing more is to come."""
        for step in self._job.steps(end=end):
            yield from self._observe(step)
        if self._network.world is None and self._network.held_bytes > MAX_WAITING_BYTES:
            self._network.release(ALL_TAGS + 1)
            self.notes.add(
                f"Gloo: ranks still unknown after {MAX_WAITING_BYTES} bytes of payload: not waited for longer"
            )
        if end and self._recognized:
            self._say_what_is_missing()

    def _say_what_is_missing(self) -> None:
        if self._joined:
            self.notes.add(f"Gloo: {len(self._joined)} streams were joined in the middle")
        if self._network.world is None:
            self.notes.add("Gloo: neither a rendezvous store nor the connections' greetings say which rank is which")
        elif self._job.plan is None:
            self.notes.add("Gloo: not seen how the job began, so its shapes are unknown: no gradient can be placed")

    @property
    def world_size(self) -> int | None:
        """As the rendezvous store or the ranks' greetings say it."""
        return self._network.world if self._recognized else None

    @property
    def shapes(self) -> Shapes | None:
        """As DDP says them when it is built; of the project's own all-reduce, one flat vector's."""
        return self._job.plan.shapes if self._job.plan is not None else None

    def _handle(self, flow: Flow, events: Iterator[Event]) -> None:
        try:
            for event in events:
                match event:
                    case Message():
                        if not self._network.add(flow, event):
                            self.notes.add(
                                f"flow {flow}: a payload of collective {event.slot.tag} came too late to count"
                            )
                    case Hello(rank=rank):
                        self._network.greet(flow, rank)
                    case Lost(offset=offset):
                        self._network.lose(flow)
                        if flow in self._recognized:
                            self.notes.add(f"flow {flow}, byte {offset}: a hole in a head: framing lost")
                    case Resumed(offset=offset, skipped=skipped):
                        self._network.resume(flow, skipped if flow in self._recognized else float("inf"))
                        if flow not in self._recognized:
                            self._joined.add(flow)
                        self._recognized.add(flow)
                        self.notes.add(f"flow {flow}, byte {offset}: framing resumed after {skipped} bytes")
        except DecodeError as error:
            self.notes.add(f"not read further: {error}")
            self._decoders[flow] = None
            self._network.lose(flow)
            self._network.end(flow)

    def _observe(self, step: Step) -> Iterator[Observation]:
        plan = self._job.plan
        assert plan is not None and plan.shapes is not None
        if not self._began:
            self._began = True
            if self._job.format is not FLOAT32:
                self.notes.add(f"gradients of two bytes, read as {self._job.format.name}: so they are spread")
            if plan.weights is not None:
                initial = torch.from_numpy(plan.weights)
                self._shadow = Shadow(weights=initial, step=step.step, shapes=plan.shapes, optimizer=self.optimizer)
            else:
                self.notes.add("the initial weights were not seen whole: no step's weights are known")
        weights = self._shadow.weights(step.step) if self._shadow is not None else None
        average = torch.from_numpy(step.seen.total) if step.seen.total_known.all() else None
        if plan.flat and average is not None:
            average.div_(len(step.seen.ranks))  # as the exchange does it, after the sum
        for rank, vector in enumerate(step.seen.ranks):
            yield Observation(
                rank=rank,
                step=step.step,
                world_size=len(step.seen.ranks),
                exchange=self.name,
                gradient=torch.from_numpy(vector.values),
                known=torch.from_numpy(vector.known),
                bound=torch.from_numpy(vector.bound) if (vector.known == Known.DIFFERENCED).any() else None,
                average=average,
                weights=weights,
                buffers=None if step.buffers is None else torch.from_numpy(step.buffers),
                shapes=plan.shapes,
                defense=None if self._job.format is FLOAT32 else f"{self._job.format.name} on the wire",
            )
        if self._shadow is not None:
            self._shadow.advance(step.step, average)
