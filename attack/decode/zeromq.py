"""All ZMTP connections of a capture -> observations of one run of the project's ZeroMQ exchange.

Ties the pieces together: framing, messages, session and shadow. Knows which flow is decoded by what, and nothing of
bytes or numbers itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from attack.capture.streams import Bytes, Flow
from attack.decode.anchor import MessageAnchor
from attack.decode.defended import PublicSide
from attack.decode.frames import Command, Event, Greeting, Lost, Resumed, Sealed
from attack.decode.messages import Item, Message, MessageDecoder
from attack.decode.proof import DecodedStep
from attack.decode.protocol import ProtocolReader
from attack.decode.sealed import SealedTraffic
from attack.decode.session import InitialState, Session
from attack.decode.zmtp import ZmtpDecoder
from attack.errors import DecodeError
from attack.observation import EVERYONE, Observation, Shapes
from attack.shadow import Shadow

CURVE_OVERHEAD_BYTES = 33
"""RFC 26: `\\x07MESSAGE`, a nonce of 8, a tag of 16, the flags."""


class _Direction:
    """One direction of one connection."""

    def __init__(self, flow: Flow, *, from_start: bool, runs: set[bytes]) -> None:
        self.decoder: ZmtpDecoder | None = ZmtpDecoder(flow, from_start=from_start, anchor=MessageAnchor(runs))
        self.messages = MessageDecoder(runs)
        self.recognized = from_start
        self.sealed: SealedTraffic | None = None
        self.foreign = 0


class ZeromqReader(ProtocolReader):
    """Every ZMTP connection; observations are of the first run, or of the one that was asked for."""

    name = "zmtp"
    joins = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._runs: set[bytes] = set()
        self._others: dict[bytes, int] = {}
        self._directions: dict[Flow, _Direction] = {}
        self._session = Session(self.notes)
        self._shadow: Shadow | None = None
        self._initial: InitialState | None = None
        self._expected: int | None = None
        self._public = PublicSide()

    @staticmethod
    def sniff(head: bytes) -> bool | None:
        """The signature of a greeting, and a major version of at least 3: FF, 8 bytes, 7F, 03."""
        if head[:1] not in (b"", b"\xff") or head[9:10] not in (b"", b"\x7f"):
            return False
        return head[10] >= 3 if len(head) > 10 else None

    def open(self, flow: Flow, *, from_start: bool) -> None:
        """A stream begins."""
        self._directions[flow] = _Direction(flow, from_start=from_start, runs=self._runs)
        if not from_start:
            self._session.excuse(flow)

    def receive(self, flow: Flow, time: float, data: Bytes) -> None:
        """Decodes the next bytes of a stream."""
        direction = self._directions[flow]
        if direction.decoder is not None:
            self._handle(flow, direction, time, direction.decoder.receive(data))

    def gap(self, flow: Flow, time: float, length: int) -> None:
        """Decodes a hole of a stream."""
        direction = self._directions[flow]
        self._session.excuse(flow)
        if direction.decoder is not None:
            self._handle(flow, direction, time, direction.decoder.gap(length))

    def doubt(self, flow: Flow, start: int, stop: int) -> None:
        """Nothing is believed that is built from these bytes."""
        self._directions[flow].messages.doubt(start, stop)
        self._session.doubt(flow, start, stop)

    def close(self, flow: Flow, *, finished: bool) -> None:
        """Ends a stream."""
        direction = self._directions[flow]
        if direction.decoder is not None:
            self._handle(flow, direction, 0.0, direction.decoder.finish())
            self._take(flow, direction, direction.messages.finish())
        direction.decoder = None
        self._session.close(flow)

    def recognizes(self, flow: Flow) -> bool:
        """A stream seen from its start was sniffed; another must have shown a message of ours."""
        return self._directions[flow].recognized

    def observations(self, *, end: bool = False) -> Iterator[Observation]:
        """Steps of which nothing more is to come."""
        for step in self._session.steps(end=end):
            yield from self._observe(step)

    @property
    def world_size(self) -> int | None:
        """As the ranks' HELLO says it."""
        return self._session.world_size

    @property
    def shapes(self) -> Shapes | None:
        """As the ranks' HELLO says them."""
        return self._session.layout.parameters if self._session.layout is not None else None

    def sealed(self) -> list[dict[str, Any]]:
        """One entry for each direction of a CURVE connection."""
        return [
            {"source": flow.source, "destination": flow.destination, **direction.sealed.figures()}
            for flow, direction in self._directions.items()
            if direction.sealed is not None
        ]

    def _handle(self, flow: Flow, direction: _Direction, time: float, events: Iterator[Event]) -> None:
        try:
            for event in events:
                match event:
                    case Greeting():
                        self._greet(direction, event)
                        self._session.open(flow)
                    case Sealed() if direction.sealed is not None:
                        direction.sealed.add(event.size, time)
                    case Command(name="HELLO" | "WELCOME" as name) if direction.sealed is not None:
                        direction.sealed.is_server = name == "WELCOME"
                    case Command(name="HELLO", data=data) if direction.sealed is None and data:
                        self.notes.add(f"flow {flow}: PLAIN: a user name and a password cross the wire in clear")
                    case Command(name="ERROR", data=data):
                        self.notes.add(f"flow {flow}: handshake refused: {data[1:200].decode('utf-8', 'replace')}")
                    case Lost():
                        if direction.recognized:
                            self.notes.add(f"flow {flow}, byte {event.offset}: framing lost: {event.why}")
                        self._take(flow, direction, direction.messages.feed(event))
                    case Resumed():
                        direction.recognized = True
                        self._session.open(flow)
                        self.notes.add(f"flow {flow}, byte {event.offset}: framing resumed after {event.skipped} bytes")
                    case _:
                        self._take(flow, direction, direction.messages.feed(event))
        except DecodeError as error:
            self.notes.add(f"not read further: {error}")
            self._take(flow, direction, direction.messages.refuse("what follows it is not a frame"))
            direction.decoder = None
            self._session.close(flow)

    def _greet(self, direction: _Direction, greeting: Greeting) -> None:
        direction.recognized = True
        if greeting.mechanism not in ("NULL", "PLAIN"):
            direction.sealed = SealedTraffic(greeting.mechanism, overhead=CURVE_OVERHEAD_BYTES)

    def _take(self, flow: Flow, direction: _Direction, items: Iterator[Item]) -> None:
        for item in items:
            if isinstance(item, Message):
                self._dispatch(flow, item)
            elif item.foreign:
                direction.foreign += 1
                if direction.foreign == 1:
                    self.notes.add(f"flow {flow}, byte {item.offset}: not a message of this project: {item.why}")
            else:
                self.notes.add(f"flow {flow}, byte {item.offset}: a message is not read: {item.why}")

    def _dispatch(self, flow: Flow, message: Message) -> None:
        run = message.header.run
        if self.run is None:
            self.run = run
        if run == self.run:
            self._session.receive(flow, message)
        elif run not in self._others and len(self._others) < 100:
            self._others[run] = 0
            self.notes.add(f"another run in this capture: {run.hex()}; observations are of run {self.run.hex()}")

    def _observe(self, step: DecodedStep) -> Iterator[Observation]:
        session = self._session
        if self._expected is None:
            self._begin_shadow()
        elif step.step > self._expected:
            self.notes.add(f"nothing was seen of steps {self._expected} to {step.step - 1}")
        self._expected = step.step + 1
        initial = self._initial
        weights = self._shadow.weights(step.step) if self._shadow is not None else None
        buffers = None
        if initial is not None and initial.step == step.step and initial.buffers is not None:
            buffers = torch.from_numpy(initial.buffers)
        average = None if step.average is None else torch.from_numpy(step.average)
        if step.mean is not None:
            self.notes.add(
                "gradients are masked (secure aggregation): of no rank's alone anything is known, but the mean"
            )
        if step.mean is not None and not step.ranks:
            self.notes.add(
                f"step {step.step}: not known over which ranks the masked gradients' mean was taken: left out"
            )
        everyone = [] if step.mean is None or not step.ranks else [(EVERYONE, step.mean)]
        for rank, seen in [*everyone, *sorted(step.gradients.items())]:
            gradient = self._public.limit(rank, step.step, seen, self.shapes)
            yield Observation(
                rank=rank,
                step=step.step,
                world_size=session.world_size or max(session.ranks | {rank}) + 1,
                exchange="zeromq",
                gradient=torch.from_numpy(gradient.values),
                known=torch.from_numpy(gradient.known),
                bound=None if gradient.bound is None else torch.from_numpy(gradient.bound),
                average=average,
                weights=weights,
                buffers=buffers,
                shapes=self.shapes or ((gradient.values.size,),),
                ranks=step.ranks,
                defense=gradient.defense,
            )
        if self._shadow is not None:
            self._shadow.advance(step.step, average)

    def _begin_shadow(self) -> None:
        self._initial = initial = self._session.initial_state()
        if self.shapes is None:
            self.notes.add("no HELLO was seen: shapes are not known, and the number of ranks is at least those seen")
        if initial is None or initial.weights is None:
            self.notes.add("the initial weights were not seen whole: no step's weights are known")
            return
        weights = torch.from_numpy(initial.weights)
        known = self.shapes is not None
        self._shadow = Shadow(
            weights=weights,
            step=initial.step,
            shapes=self.shapes or ((weights.numel(),),),
            optimizer=self.optimizer if known else None,
        )
