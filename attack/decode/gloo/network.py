"""Which rank is at which end of which connection, and what each link has carried so far.

In come greetings, payloads and losses by flow; out go the payloads of one collective of one group, by sender. The ranks
are as a rendezvous store says, else as the greetings prove; where neither does, a group has no ranks. Knows no values.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from attack.capture.streams import Flow
from attack.decode.directory import DEFAULT, Directory
from attack.decode.gloo.framing import Fragments, Message
from attack.decode.gloo.head import HEAD_BYTES, Kind, Slot
from attack.decode.gloo.seats import Connection, seat
from attack.decode.gloo.tally import Tally

ALL_TAGS = (1 << 32) - 1
"""No tag is higher."""


class Seen(NamedTuple):
    """A message, and how many losses its link had had before."""

    message: Message
    epoch: int


class Tail(NamedTuple):
    """What was seen of the bytes before a head, behind which nothing is missed."""

    end: int
    """Offset of that head in the stream."""
    fragments: Fragments

    @property
    def size(self) -> int:
        """Bytes that are kept of it."""
        return sum(len(data) for _, data in self.fragments)


class Rest(NamedTuple):
    """What is known to be missing of a collective at its end."""

    epoch: int
    """The one behind the loss in which all of it is missing."""
    size: int
    """Bytes, with heads."""
    slack: int
    """Bytes of announcements that may be missing there too, at most."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Link:
    """One direction between two ranks."""

    flow: Flow
    proven: bool = False
    """Whether it has shown that it speaks Gloo."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Bytes of each stretch in which messages may have been missed."""
    lost: bool = False
    """In such a stretch now."""
    ended: bool = False
    finished: bool = False
    """Nothing more was sent than what was seen."""
    spans: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """By tag: how many losses there had been before its first payload, and before its last."""
    floor: int = 0
    """How many losses there had been before the last payload that was taken out."""
    newest: int = -1
    """Highest tag of a payload."""
    slots: dict[tuple[Kind, int], list[Seen]] = dataclasses.field(default_factory=dict)
    doubts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    announced: dict[tuple[Kind, int], set[int]] = dataclasses.field(default_factory=dict)
    """Bytes of the payloads that its sender was going to send, by collective."""
    passed: dict[int, int] = dataclasses.field(default_factory=dict)
    """Bytes of the payloads that came, and of their heads, by tag."""
    tails: dict[int, Tail] = dataclasses.field(default_factory=dict)
    """By how many losses there had been."""
    rest: Rest | None = None
    carries: set[Kind] = dataclasses.field(default_factory=set)
    """Kinds of collectives for which its sender sends."""


class Network:
    """All Gloo connections of a capture, and the one group of ranks among them that is read."""

    def __init__(self, directory: Directory) -> None:
        self.links: dict[Flow, Link] = {}
        self.changed = True
        self._directory = directory
        self._greetings: dict[Flow, int] = {}  # by the flow away from the side that connected
        self._hints: dict[Flow, int] = {}  # what may be greetings, of connections that never said more, or lost it
        self._ranks: dict[Flow, tuple[int, int]] | None = None
        self._members: dict[tuple[int, int], Link] = {}
        self._ring: dict[int, Link] = {}
        self._world: int | None = None
        self._version = -1
        self.by_root = False
        """Whether nothing says which of two ranks is 0, but that it broadcasts: as DDP does, and others need not."""
        self.taken = -1
        """Collectives up to this tag have been taken out."""
        self.passed_over: set[int] = set()
        """Those of them that nobody looked at."""
        self.held_bytes = 0
        """Of payloads that wait."""
        self.tally = Tally()

    def open(self, flow: Flow, *, proven: bool) -> None:
        """A direction begins."""
        self.links[flow] = Link(flow=flow, proven=proven)
        self._ranks = None

    def hand_over(self, flow: Flow, other: Network) -> None:
        """This direction belongs to another group: so does all that it has said so far."""
        if (link := self.links.pop(flow, None)) is not None:
            size = sum(len(seen.message.payload) for slot in link.slots.values() for seen in slot)
            size += sum(tail.size for tail in link.tails.values())
            self.held_bytes -= size
            other.held_bytes += size
            other.links[flow] = link
        for mine, theirs in ((self._greetings, other._greetings), (self._hints, other._hints)):
            if flow in mine:
                theirs[flow] = mine.pop(flow)
        self._ranks = other._ranks = None
        self.changed = other.changed = True

    def hint(self, flow: Flow, rank: int | None) -> None:
        """All that the sender of this flow has said so far could be a greeting; None: it is none."""
        if self._hints.get(flow) != rank:
            self._ranks = None
        if rank is None:
            self._hints.pop(flow, None)
        else:
            self._hints[flow] = rank

    def greet(self, flow: Flow, rank: int) -> None:
        """The sender of this flow has connected, and says that this is its rank."""
        self._greetings[flow] = rank
        self._ranks = None

    def add(self, flow: Flow, message: Message) -> bool:
        """Takes a payload. False where it comes too late to count."""
        link, tag = self.links[flow], message.slot.tag
        self.tally.add(message.slot, len(message.payload))
        if message.slot.kind is Kind.POINT_TO_POINT:
            return True  # its tag counts nothing
        for start, stop in link.doubts:
            message = doubted(message, start, stop)
        epoch = self._pass(link, tag)
        self._carry(link, message.slot.kind)
        link.newest = max(link.newest, tag)
        link.passed[tag] = link.passed.get(tag, 0) + HEAD_BYTES + len(message.payload)
        self.changed = True
        if tag <= self.taken:
            return tag in self.passed_over or self.taken > ALL_TAGS
        self.held_bytes += len(message.payload)
        link.slots.setdefault((message.slot.kind, tag), []).append(Seen(message, epoch))
        return True

    def announce(self, flow: Flow, slot: Slot, length: int, *, from_sender: bool) -> None:
        """The sender of this flow, or else that of the other direction, is going to send a payload."""
        if slot.kind is Kind.POINT_TO_POINT:
            return
        self._pass(self.links[flow], slot.tag)
        link = self.links.get(flow if from_sender else flow.reverse)
        if link is not None:
            self._carry(link, slot.kind)
            if slot.tag > self.taken:
                link.announced.setdefault((slot.kind, slot.tag), set()).add(length)

    def lose(self, flow: Flow) -> None:
        """From here on, messages of this flow may be missed."""
        link = self.links[flow]
        link.lost = True
        link.losses.append(float("inf"))

    def resume(self, flow: Flow, skipped: float, offset: int, before: Fragments) -> None:
        """No message is missed any more, from `offset` on; those that were, have so many bytes."""
        link = self.links[flow]
        if not link.proven:
            self._ranks = None
        link.proven, link.lost = True, False
        link.losses[-1] = skipped
        if before:
            link.tails[len(link.losses)] = Tail(offset, before)
            self.held_bytes += link.tails[len(link.losses)].size

    def doubt(self, flow: Flow, start: int, stop: int) -> None:
        """These bytes of a stream, received or still to come, are not to be trusted: those of payloads are as missing.

        A head among them is not one that can be relied on, so neither is its payload.
        """
        link = self.links[flow]
        link.doubts.append((start, stop))
        for slot in link.slots.values():
            slot[:] = [Seen(doubted(seen.message, start, stop), seen.epoch) for seen in slot]

    def end(self, flow: Flow, *, finished: bool) -> None:
        """Nothing more will come; `finished`: nothing more was sent."""
        self.links[flow].ended, self.links[flow].finished = True, finished
        self.changed = True

    @property
    def world(self) -> int | None:
        """Ranks of the group, where they are proven."""
        self._place()
        return self._world

    def ring(self) -> dict[int, Link]:
        """By sender, the links over which an all-reduce goes. A link that was never seen is missing."""
        self._place()
        return self._ring

    def next_ranks(self) -> dict[int, Link]:
        """By sender, the links over which an all-gather goes: to the next higher rank, or from the last one to 0."""
        world = self.world or 0
        return {ranks[0]: link for ranks, link in self.members().items() if ranks[1] == (ranks[0] + 1) % world}

    def passed_on(self, tag: int) -> bool:
        """Whether each rank was seen to have come past a tag on its way of an all-gather, or to its end there."""
        links = self.next_ranks()
        return len(links) == self._world and all(link.newest > tag or link.ended for link in links.values())

    @property
    def reduces(self) -> bool:
        """Whether any all-reduce was seen."""
        return any(Kind.ALLREDUCE in link.carries for link in self.links.values())

    def members(self) -> dict[tuple[int, int], Link]:
        """All links whose two ranks are known."""
        self._place()
        return self._members

    def closed(self, tag: int) -> bool:
        """Whether every link of the ring that was seen has come past a tag, or to its end."""
        links = self.ring().values()
        return bool(links) and all(link.newest > tag or link.ended for link in links)

    def is_certain(self, horizon: int) -> bool:
        """Whether all that went round the ring since the last collective that was taken out, up to what cannot be under
        way beside the next one, was seen: what was not seen of it was not sent."""
        links = self.ring().values()
        return len(links) == self._world and all(
            link.floor == len(link.losses) and (link.newest > horizon or link.finished) for link in links
        )

    def is_empty(self, tag: int, horizon: int) -> bool:
        """Whether it is certain that nothing went round the ring under a tag: so it was no all-reduce.

        For that, all ranks must have gone on to what cannot be under way beside it: past the horizon.
        """
        links = self.ring().values()
        return len(links) == self._world and all(
            link.newest > horizon and link.floor == len(link.losses) and (Kind.ALLREDUCE, tag) not in link.slots
            for link in links
        )

    def kinds(self, tag: int) -> set[Kind]:
        """What the payloads of a tag, and their announcements, say that it is; empty where none was seen."""
        links = self.members().values()
        return {kind for link in links for kind, other in (*link.slots, *link.announced) if other == tag}

    def sizes(self, kind: Kind, tag: int) -> set[int]:
        """Bytes that the messages of a collective have, as they or their announcements say it."""
        links = self.members().values()
        sizes = {size for link in links for size in link.announced.get((kind, tag), ())}
        return sizes | {len(one.message.payload) for link in links for one in link.slots.get((kind, tag), ())}

    def copies(self, kind: Kind, tag: int) -> list[list[Message]]:
        """The payloads of a tag, by link."""
        slots = (link.slots.get((kind, tag), []) for link in self.members().values())
        return [[seen.message for seen in slot] for slot in slots if slot]

    def release(self, tag: int) -> None:
        """Forgets the payloads of the collectives up to a tag: they are decoded, or nobody wants them."""
        self.taken = max(self.taken, tag)
        for link in self.links.values():
            for slot in [slot for slot in link.slots if slot[1] <= tag]:
                self.held_bytes -= sum(len(seen.message.payload) for seen in link.slots.pop(slot))
            for slot in [slot for slot in link.announced if slot[1] <= tag]:
                del link.announced[slot]

    def settle(self, tag: int) -> None:
        """Says that no rank begins a later collective before it has ended those up to this tag."""
        for link in self.links.values():
            for other in [other for other in link.spans if other <= tag]:
                link.floor = max(link.floor, link.spans.pop(other)[1])
                link.passed.pop(other, None)
            for epoch in [epoch for epoch in link.tails if epoch <= link.floor]:
                self.held_bytes -= link.tails.pop(epoch).size

    @property
    def oldest(self) -> int:
        """The highest tag that all links of the ring have come to; of those that ended, the rest."""
        return min((link.newest for link in self.ring().values() if not link.ended), default=ALL_TAGS)

    @property
    def newest(self) -> int:
        """Highest tag of a payload in the group."""
        return max((link.newest for link in self.members().values()), default=-1)

    def _pass(self, link: Link, tag: int) -> int:
        """A link is at a collective. Returns how many losses it had before."""
        epoch = len(link.losses)
        first, _ = link.spans.get(tag, (epoch, epoch))
        link.spans[tag] = (first, epoch)
        return epoch

    def _carry(self, link: Link, kind: Kind) -> None:
        if kind not in link.carries:
            link.carries.add(kind)
            self._ranks = None

    def _place(self) -> None:
        if self._ranks is not None and self._version == self._directory.version:
            return
        self._version = self._directory.version
        self._ranks, self._world, self.by_root = {}, None, False
        self._seat(self._ranks)
        world = self._world or 0
        self._members = {ranks: self.links[flow] for flow, ranks in self._ranks.items()}
        self._ring = {
            ranks[0]: link for ranks, link in self._members.items() if world and ranks[1] == (ranks[0] - 1) % world
        }

    def _seat(self, seats: dict[Flow, tuple[int, int]]) -> None:
        """Finds the ranks at both ends of each flow, and the world."""
        # A hole may have followed a greeting: then the flow proves itself later.
        proven = {flow: rank for flow, rank in self._hints.items() if flow in self.links and self.links[flow].proven}
        greetings = {**proven, **self._greetings}
        listeners, world = self._by_directory(greetings)
        if world is None and any(group.label != DEFAULT for group in self._directory.groups()):
            return  # who greet each other may be another of the job's groups, which the store was not heard to name
        if world is None:
            named, world = self._by_greetings(greetings)
            listeners = {**named}
        if world is None:
            self._world = self._by_two(greetings, seats)
            return
        self._world = world
        connections = {
            flow: Connection(
                greetings.get(flow, self._hints.get(flow)), self._reduces(flow), self._reduces(flow.reverse)
            )
            for flow in {*self._hints, *(flow for flow, link in self.links.items() if link.proven or flow in greetings)}
            if flow.destination in listeners
        }
        ranks, others = seat(connections, listeners, world)
        for flow, rank in ranks.items():
            if (other := others.get(flow.destination)) is not None:
                pairs = ((flow, (rank, other)), (flow.reverse, (other, rank)))
                seats.update((way, pair) for way, pair in pairs if way in self.links)

    def _reduces(self, flow: Flow) -> bool:
        return flow in self.links and Kind.ALLREDUCE in self.links[flow].carries

    def _by_directory(self, greetings: dict[Flow, int]) -> tuple[dict[str, int | None], int | None]:
        """The listeners of the first group that a store names and of which a connection was seen."""
        targets = {flow.destination for flow in greetings}
        targets |= {end for flow, link in self.links.items() if link.proven for end in (flow.source, flow.destination)}
        groups, nameless = self._directory.groups(), self._directory.nameless
        for group in groups:
            # Where there is one group only, addresses without a name are of its ranks.
            others = nameless if len(groups) == 1 else {}
            listeners = {**dict.fromkeys(others), **group.ranks}
            world = group.world or max((size or 0 for size in others.values()), default=0)
            if world and targets & listeners.keys():
                return (listeners if len(listeners) <= world else {**group.ranks}), world
        worlds = set(nameless.values())
        if not groups and len(worlds) == 1 and (size := worlds.pop()) and targets & nameless.keys():
            return (dict.fromkeys(nameless), size) if len(nameless) <= size else ({}, None)
        return {}, None

    def _by_two(self, greetings: dict[Flow, int], seats: dict[Flow, tuple[int, int]]) -> int | None:
        """Where all-reduces go both ways, there are two ranks: one way, what DDP broadcasts from rank 0.

        Returns: 2, once that is proven.
        """
        pairs = [flow for flow in self.links if self._reduces(flow) and self._reduces(flow.reverse)]
        if len(pairs) != 2 or any(link.proven and flow not in pairs for flow, link in self.links.items()):
            return None
        broadcasting = [flow for flow in pairs if Kind.BROADCAST in self.links[flow].carries]
        greeted = [flow if greetings[flow] else flow.reverse for flow in pairs if greetings.get(flow) in (0, 1)]
        zeros = {*broadcasting, *(flow.reverse for flow in greeted)}
        if len(zeros) != 1:
            return None
        zero = zeros.pop()
        self.by_root = not greeted
        seats |= {zero: (0, 1), zero.reverse: (1, 0)}
        return 2

    def _by_greetings(self, greetings: dict[Flow, int]) -> tuple[dict[str, int], int | None]:
        """Of two ranks the one with the higher address connects. So where all pairs of P ranks did, the addresses that
        were connected to heard P-1, P-2, ..., 1 greetings, each from all ranks but its own and those before it.

        Pairs that exchange nothing have greeted all the same. A connection without a greeting spoils the proof: there
        may be others that were missed altogether. So does another group beside this one: it may be that of all ranks.
        """
        for flow, link in self.links.items():
            if link.proven and not {flow, flow.reverse} & greetings.keys():
                return {}, None
        listeners = {flow.destination for flow in greetings}
        idle = {flow: rank for flow, rank in self._hints.items() if flow not in greetings}
        at_listeners = {flow: rank for flow, rank in idle.items() if flow.destination in listeners}
        for others in (idle, at_listeners):
            ranks, world = _order({**others, **greetings}) if greetings else ({}, None)
            if world is not None:
                apart = {flow: rank for flow, rank in idle.items() if flow not in others}
                return (ranks, world) if _order(apart)[1] is None else ({}, None)
        return {}, None


def _order(greetings: dict[Flow, int]) -> tuple[dict[str, int], int | None]:
    """Rank by listening address, and the number of ranks, if these are the greetings of all pairs."""
    heard: dict[str, set[int]] = {}
    for flow, rank in greetings.items():
        heard.setdefault(flow.destination, set()).add(rank)
    order = sorted(heard.items(), key=lambda item: -len(item[1]))
    world = len(order) + 1
    left = set(range(world))
    ranks: dict[str, int] = {}
    for address, ours in order:
        own = left - ours
        if len(own) != 1 or not ours < left or len(ours) != len(left) - 1:
            return {}, None
        ranks[address] = own.pop()
        left.discard(ranks[address])
    return ranks, world if order else None


def doubted(message: Message, start: int, stop: int) -> Message:
    """A message without the bytes of a stream that are not to be trusted."""
    begin, end = message.offset, message.offset + len(message.payload)
    if stop <= begin - HEAD_BYTES or start >= end:
        return message
    hole = (0, end - begin) if start < begin else (start - begin, min(stop, end) - begin)
    return message._replace(holes=(*message.holes, hole))
