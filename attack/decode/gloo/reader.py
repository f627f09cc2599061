"""All Gloo connections of a capture -> observations of each process group.

Ties the pieces together: framing, and for each group its network and job. Knows nothing of bytes or numbers itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attack.capture.streams import Bytes, Flow
from attack.decode.directory import DEFAULT
from attack.decode.gloo.framing import Announcement, Event, GlooDecoder, Hello, Lost, Message, Resumed
from attack.decode.gloo.group import Group
from attack.decode.gloo.head import HEAD_BYTES, HELLO_BYTES, MAX_WORLD, parse_head
from attack.decode.gloo.network import Network
from attack.decode.protocol import ProtocolReader
from attack.errors import DecodeError
from attack.observation import Observation, Shapes


class GlooReader(ProtocolReader):
    """Every connection between Gloo pairs.

    A group listens on ports of its own (torch gives each a device of its own), so a connection belongs to the group of
    which the store says that it listens there. Whatever belongs to no other group belongs to that of all ranks.
    """

    name = "gloo"
    joins = True
    marks_start = False  # every message has a head, and what precedes one may look like a greeting

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._decoders: dict[Flow, GlooDecoder | None] = {}
        self._recognized: set[Flow] = set()
        self._joined: set[Flow] = set()
        self._groups: dict[str, Group] = {}
        self._everyone = self._group(DEFAULT)
        self._of_flow: dict[Flow, Group] = {}
        self._listeners: dict[str, str] = {}  # label of the group, by address; of all but the group of all ranks
        self._version = -1

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
        self._network(flow).open(flow, proven=from_start)
        if from_start:
            self._recognized.add(flow)
        else:
            self._network(flow).lose(flow)

    def hint(self, flow: Flow, head: bytes) -> None:
        """A pair that is idle has greeted, and says no more."""
        rank = int.from_bytes(head, "little") if len(head) == HELLO_BYTES else MAX_WORLD
        self._network(flow).hint(flow, rank if rank < MAX_WORLD else None)

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
        self._network(flow).doubt(flow, start, stop)

    def close(self, flow: Flow, *, finished: bool) -> None:
        """Ends a stream."""
        if (decoder := self._decoders[flow]) is not None:
            self._handle(flow, decoder.finish())
        self._decoders[flow] = None
        self._network(flow).end(flow, finished=finished)

    def recognizes(self, flow: Flow) -> bool:
        """A stream seen from its start was sniffed; another must have shown two messages, one behind the other."""
        return flow in self._recognized

    def observations(self, *, end: bool = False) -> Iterator[Observation]:
        """Steps of which nothing more is to come."""
        self._route()
        for group in list(self._groups.values()):
            yield from group.observations(end=end)
        if end and self._recognized:
            self._say_what_is_missing()

    def _say_what_is_missing(self) -> None:
        if self._joined:
            self.notes.add(f"Gloo: {len(self._joined)} streams were joined in the middle")
        if self._everyone.network.world is None:
            self.notes.add("Gloo: neither a rendezvous store nor the connections' greetings say which rank is which")
        elif all(group.label != DEFAULT for group in self.directory.groups()):
            self.notes.add("Gloo: no rendezvous store names all ranks: those who greet each other are taken for them")
        if self._everyone.network.world is not None and not any(group.job.plan for group in self._groups.values()):
            self.notes.add("Gloo: not seen how the job began, so its shapes are unknown: no gradient can be placed")

    @property
    def world_size(self) -> int | None:
        """As the rendezvous store or the ranks' greetings say it."""
        return self._everyone.network.world if self._recognized else None

    @property
    def shapes(self) -> Shapes | None:
        """As DDP says them when it is built; of the project's own all-reduce, one flat vector's. Of the first group
        that exchanges gradients."""
        return next((group.job.plan.shapes for group in self._groups.values() if group.job.plan is not None), None)

    def groups(self) -> list[dict[str, Any]]:
        """Process groups that exchanged anything."""
        return [group.describe() for group in self._groups.values() if group.network.tally.counts]

    def _group(self, label: str) -> Group:
        if label not in self._groups:
            self._groups[label] = Group(label, directory=self.directory, notes=self.notes, optimizer=self.optimizer)
        return self._groups[label]

    def _network(self, flow: Flow) -> Network:
        """Of the group that a connection belongs to."""
        self._route()
        if flow not in self._of_flow:
            self._of_flow[flow] = self._owner(flow)
        return self._of_flow[flow].network

    def _route(self) -> None:
        """Hands connections over to the groups of which the store has said since that they are theirs."""
        if self._version == self.directory.version:
            return
        self._version = self.directory.version
        self._listeners = {
            address: group.label
            for group in self.directory.groups()
            if group.label != DEFAULT
            for address in group.ranks
        }
        for group in self.directory.groups():
            if group.label == DEFAULT:
                for address in group.ranks:  # a port that was used again, by another group: whose is not certain
                    self._listeners.pop(address, None)
        for flow, group_now in self._of_flow.items():
            if (owner := self._owner(flow)) is not group_now:
                group_now.network.hand_over(flow, owner.network)
                self._of_flow[flow] = owner

    def _owner(self, flow: Flow) -> Group:
        labels = {self._listeners[end] for end in (flow.source, flow.destination) if end in self._listeners}
        return self._group(labels.pop()) if len(labels) == 1 else self._everyone

    def _handle(self, flow: Flow, events: Iterator[Event]) -> None:
        network = self._network(flow)
        try:
            for event in events:
                match event:
                    case Message():
                        if not network.add(flow, event):
                            self.notes.add(
                                f"flow {flow}: a payload of collective {event.slot.tag} came too late to count"
                            )
                    case Announcement(slot=slot, length=length, from_sender=from_sender):
                        network.announce(flow, slot, length, from_sender=from_sender)
                    case Hello(rank=rank):
                        network.greet(flow, rank)
                    case Lost(offset=offset):
                        network.lose(flow)
                        if flow in self._recognized:
                            self.notes.add(f"flow {flow}, byte {offset}: a hole in a head: framing lost")
                    case Resumed(offset=offset, skipped=skipped, before=before):
                        network.resume(flow, skipped if flow in self._recognized else float("inf"), offset, before)
                        if flow not in self._recognized:
                            self._joined.add(flow)
                        self._recognized.add(flow)
                        self.notes.add(f"flow {flow}, byte {offset}: framing resumed after {skipped} bytes")
        except DecodeError as error:
            self.notes.add(f"not read further: {error}")
            self._decoders[flow] = None
            network.lose(flow)
            network.end(flow, finished=False)
