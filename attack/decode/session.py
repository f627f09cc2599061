"""Messages of all connections of one run -> for each step, what is known of every rank's gradient and of the average.

An element is RAW only if it was on the wire, at a place that a second message confirms, and if nothing contradicts it;
whatever is inconsistent is named in the notes and left unknown. Holds the chunks of the few steps in flight. Knows the
conversation of `harness.wire`; nothing of captures, protocols below, optimizers or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from attack.capture.streams import Flow
from attack.decode.averages import Float32
from attack.decode.chunk import defense_of, implausible, origin_of, piece_of, place_of
from attack.decode.messages import Message
from attack.decode.notes import Notes
from attack.decode.proof import DecodedStep, StepChunks, prove
from attack.decode.vector import Origin, Place, Vector
from harness.wire import Header, Kind, Layout, WireError
from harness.wire.masked import read_words

MAX_STEPS_IN_FLIGHT = 3
"""Ranks are at most one step apart. A tap's two directions may be read with more between them, so this many are kept
whatever they weigh; beyond, `MAX_BYTES_IN_FLIGHT` decides."""
MAX_BYTES_IN_FLIGHT = 256 << 20
_ROLES = {
    Kind.HELLO: "rank",
    Kind.GRADIENT: "rank",
    Kind.BYE: "rank",
    Kind.WELCOME: "server",
    Kind.AVERAGE: "server",
}
"""Who says what; WEIGHTS and ERROR are said by both."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InitialState:
    """What rank 0 sent to all before the first step."""

    step: int
    """The step that begins with it."""
    weights: Float32 | None
    """All parameters, flat; None where one element is missing."""
    buffers: Float32 | None


class Session:
    """One run. `receive` and `close` take in; `steps` gives out."""

    def __init__(self, notes: Notes) -> None:
        self.layout: Layout | None = None
        """As every HELLO so far says it; None where none was seen or two disagree."""
        self.total: int | None = None
        """Elements of a gradient."""
        self.ranks: set[int] = set()
        """Ranks that said something."""
        self._notes = notes
        self._layout_disputed = False
        self._senders: dict[Flow, tuple[str, int]] = {}
        self._seen: set[Flow] = set()
        self._closed: set[Flow] = set()
        self._silenced: set[Flow] = set()
        self._progress: dict[Flow, int] = {}
        self._steps: dict[int, StepChunks] = {}
        self._changed = False
        self._next = 0  # steps below this have been given out
        self._first: int | None = None  # the first step that was given out
        self._weights: dict[int, Vector] = {}
        self._weights_total: int | None = None
        self._hellos: list[Origin] = []

    @property
    def world_size(self) -> int | None:
        """Ranks of the run; None where no HELLO says it."""
        return self.layout.world if self.layout is not None else None

    def receive(self, flow: Flow, message: Message) -> None:
        """Takes in one message of this run."""
        header = message.header
        self._changed = True
        # Both directions must have come past a step before it is over.
        for direction in (flow, flow.reverse):
            if direction in self._seen and direction not in self._closed:
                self._progress.setdefault(direction, -1)
        why = self._unwanted(flow, header) or self._take(flow, message)
        if why is not None:
            chunk = f" for {place_of(header)}" if header.count else ""
            self._notes.add(f"flow {flow}: {header.kind} of rank {header.rank}, step {header.step}{chunk}: {why}")

    def open(self, flow: Flow) -> None:
        """Says that this direction can be read, whether it says something of this run or not."""
        self._seen.add(flow)

    def excuse(self, flow: Flow) -> None:
        """Says that this direction has holes: what is missing there may have been sent."""
        self._silenced.add(flow)

    def doubt(self, flow: Flow, start: int, stop: int) -> None:
        """Says that these bytes of a stream, taken in or still to come, are not to be trusted."""
        vectors = [*self._weights.values()]
        for step in self._steps.values():
            vectors += [step.averages, *step.gradients.values()]
        doubted = [vector.doubt(flow, start, stop) for vector in vectors]
        if any(one.flow == flow and start < one.end and stop > one.begin for one in self._hellos):
            self._dispute_layout()
        where = "left unknown" if any(doubted) else "no gradient in flight is built from them"
        self._notes.add(f"flow {flow}, byte {start}: {stop - start} bytes were captured twice, and differ: {where}")

    def close(self, flow: Flow) -> None:
        """Says that this direction will not go on."""
        self._progress.pop(flow, None)
        self._closed.add(flow)
        self._changed = True

    def steps(self, *, end: bool = False) -> Iterator[DecodedStep]:
        """The steps of which nothing more is to come, in order; at the end, all."""
        if not (self._changed or end):
            return
        self._changed = False
        while self._steps:
            step = min(self._steps)
            crowded = (
                len(self._steps) > MAX_STEPS_IN_FLIGHT
                and sum(other.bytes for other in self._steps.values()) > MAX_BYTES_IN_FLIGHT
            )
            over = self._progress and min(self._progress.values()) > step
            if not (over or crowded or end):
                return
            seen = self._steps.pop(step)
            self._next = step + 1
            believed = self._believed(seen)
            if believed and self.total is not None:
                self._first = step if self._first is None else self._first
                yield prove(seen, believed, world_size=self.world_size, total=self.total, notes=self._notes)

    def initial_state(self) -> InitialState | None:
        """The state that was broadcast; ask when the first step is given out, as nothing is added to it then."""
        if len(self._weights) != 1:
            if self._weights:
                self._notes.add(f"initial weights are said to be of steps {sorted(self._weights)}: not believed")
            return None
        [(step, vector)] = self._weights.items()
        total, count = self._weights_total, self.total
        if self.layout is not None:
            count = self.layout.parameter_count
            if total != count + self.layout.buffer_count:
                return None
        if total is None or count is None or count > total or (self._first is not None and self._first < step):
            return None
        values, known = np.zeros(total, np.float32), np.zeros(total, np.bool_)
        for piece in vector:
            where = piece.place.where
            values[where], known[where] = piece.values, True if piece.known is None else piece.known
        if not known.all():
            self._notes.add(f"initial weights: {int((~known).sum())} of {total} elements not seen")
        return InitialState(
            step=step,
            weights=values[:count] if known[:count].all() else None,
            buffers=values[count:] if count < total and known[count:].all() else None,
        )

    def _unwanted(self, flow: Flow, header: Header) -> str | None:
        """Why a message cannot be what it says, if so."""
        role = _ROLES.get(header.kind)
        sender = self._senders.get(flow)
        if role is not None and sender is None:
            self._senders[flow] = role, header.rank
        elif sender is not None and (sender[1] != header.rank or (role or sender[0]) != sender[0]):
            return f"this direction belongs to {sender[0]} {sender[1]}"
        if role == "rank" and header.rank < 0:
            return "not a rank"
        if self.world_size is not None and header.rank >= self.world_size:
            return f"there are {self.world_size} ranks"
        return None

    def _take(self, flow: Flow, message: Message) -> str | None:
        header = message.header
        if header.rank >= 0:
            self.ranks.add(header.rank)
        if header.kind in (Kind.GRADIENT, Kind.AVERAGE):
            self._progress[flow] = header.step
        match header.kind:
            case Kind.HELLO:
                self._hellos.append(origin_of(flow, message))
                return self._join(message)
            case Kind.WEIGHTS:
                return self._add_weights(flow, message)
            case Kind.GRADIENT | Kind.AVERAGE:
                return self._add_chunk(flow, message)
            case Kind.ERROR:
                return bytes(message.payload[:200]).decode("utf-8", "replace")
            case Kind.BYE:
                self.close(flow)
        return None

    def _join(self, message: Message) -> str | None:
        if message.holes:
            return "a hole in the layout"
        try:
            layout = Layout.unpack(memoryview(message.payload))
        except WireError as error:
            return str(error)
        if self._layout_disputed or (self.layout is not None and layout != self.layout):
            self._dispute_layout()
            return "ranks disagree on the model's layout: neither shapes nor the number of ranks are believed"
        if self.total not in (None, layout.parameter_count):
            self._dispute_layout()
            return f"a model of {layout.parameter_count} parameters, chunks so far of {self.total}: not believed"
        self.layout, self.total = layout, layout.parameter_count
        return None

    def _dispute_layout(self) -> None:
        self.layout, self._layout_disputed = None, True

    def _add_weights(self, flow: Flow, message: Message) -> str | None:
        header = message.header
        if self.layout is not None:
            self._weights_total = self.layout.parameter_count + self.layout.buffer_count
        if (why := implausible(header, self._weights_total)) is not None:
            return why
        self._weights_total = header.total
        return self._weights.setdefault(header.step, Vector()).add(piece_of(flow, message, tag=None))

    def _add_chunk(self, flow: Flow, message: Message) -> str | None:
        header = message.header
        if (why := implausible(header, self.total)) is not None:
            return why
        if header.step < self._next:
            return "too late: what is known of that step was given out"
        if header.codec == "masked":
            return self._add_masked(flow, message)
        try:
            piece = piece_of(flow, message, tag=header.rank if header.kind is Kind.AVERAGE else defense_of(header))
        except WireError as error:
            return str(error)
        self.total = header.total
        step = self._steps.setdefault(header.step, StepChunks(header.step))
        step.named.setdefault(place_of(header), set()).add(flow)
        if header.kind is Kind.AVERAGE:
            if isinstance(said := header.params.get("ranks"), str):
                step.taken.add(tuple(int(rank) for rank in said.split(",") if rank.isdecimal()))
            return step.averages.add(piece)
        return step.gradients.setdefault(header.rank, Vector()).add(piece)

    def _add_masked(self, flow: Flow, message: Message) -> str | None:
        """Nothing is known of it but that it was there."""
        header = message.header
        try:
            _, unit = read_words(header.count, header.params, message.payload)
        except WireError as error:
            return str(error)
        self.total = header.total
        step = self._steps.setdefault(header.step, StepChunks(header.step))
        if step.unit not in (None, unit):
            return f"masked words of unit {unit:g}, the others' is {step.unit:g}"
        step.unit, step.defense = unit, defense_of(header)
        step.named.setdefault(place_of(header), set()).add(flow)
        return None

    def _believed(self, seen: StepChunks) -> set[Place]:
        """The places at which a step's chunks are believed to belong."""
        believed = {place for place, flows in seen.named.items() if self._confirmed(flows)}
        for place in sorted(seen.named.keys() - believed):
            self._notes.add(
                f"step {seen.step}: {place} named by one message alone, and no other confirms it: not believed"
            )
        return believed

    def _confirmed(self, flows: set[Flow]) -> bool:
        """Whether a second direction named a place, or may have, in a hole.

        A header has no checksum of its own. What a rank sends is answered, and all ranks send and get the same places:
        so a place, or a step, that only one message names is one that its header got wrong.
        """
        return len(flows) > 1 or any(flow.reverse in self._silenced or flow.reverse not in self._seen for flow in flows)
