"""Which rank is at which end of each connection of a group: what all that was seen leaves no choice about.

Evidence are the greetings of those who connected, what a store says of listening addresses, and the direction in which
an all-reduce goes: from each rank to the one before it. No two connections join the same two ranks. Ranks that do not
fit are crossed out until nothing changes; contradictions seat nobody. Knows no bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Final, NamedTuple, TypeVar

from attack.capture.streams import Flow

_MAX_PAIRS: Final = 1 << 12
"""Of ranks that are tried for one connection."""

_Chair = TypeVar("_Chair", bound=Hashable)


class Connection(NamedTuple):
    """What was seen of one, beside its two addresses."""

    greeting: int | None
    """Rank of the side that connected, as it said."""
    forward: bool
    """Whether that side sends for all-reduces."""
    backward: bool
    """Whether the other does."""


def seat(
    connections: Mapping[Flow, Connection], listeners: Mapping[str, int | None], world: int
) -> tuple[dict[Flow, int], dict[str, int]]:
    """
    Args:
        connections: of one group, by the flow away from the side that connected; each leads to a listener.
        listeners: addresses at which its ranks listen, and which rank that is, where a store says so.
        world: ranks of the group.

    Returns: rank of the side that connected, and rank by listening address, for those of which there is no doubt.
    """
    everyone = frozenset(range(world))
    there = {address: everyone if rank is None else everyone & {rank} for address, rank in listeners.items()}
    here = {flow: everyone if one.greeting is None else everyone & {one.greeting} for flow, one in connections.items()}
    before = None
    while before != (before := ({**here}, {**there})):
        for flow, one in connections.items():
            _compare(flow, one, here, there, world)
        _all_different(there, everyone if len(there) == world else None)
        for address in there:
            at = [flow for flow in here if flow.destination == address]
            guests = {flow: here[flow] for flow in at}
            if len(rank := there[address]) == 1:
                # Whoever connected to a rank is not one that this rank connected to.
                met = {there[flow.destination] for flow in here if here[flow] == rank}
                taken = frozenset[int]().union(*(one for one in met if len(one) == 1))
                guests = {flow: ranks - taken for flow, ranks in guests.items()}
            _all_different(guests, None)
            here.update(guests)
        if not (all(here.values()) and all(there.values())):
            return {}, {}
    return _certain(here), _certain(there)


def _compare(
    flow: Flow, one: Connection, here: dict[Flow, frozenset[int]], there: dict[str, frozenset[int]], world: int
) -> None:
    """Leaves of both ends the ranks for which there is one at the other end."""
    ours, theirs = here[flow], there[flow.destination]
    if len(ours) * len(theirs) > _MAX_PAIRS:
        return
    pairs = [
        (mine, other)
        for mine in ours
        for other in theirs
        if mine != other
        and (not one.forward or other == (mine - 1) % world)
        and (not one.backward or mine == (other - 1) % world)
    ]
    here[flow], there[flow.destination] = frozenset(a for a, _ in pairs), frozenset(b for _, b in pairs)


def _all_different(chairs: dict[_Chair, frozenset[int]], everyone: frozenset[int] | None) -> None:
    """No rank twice; where `everyone` is given, each of them once."""
    for chair, ranks in list(chairs.items()):
        if len(ranks) == 1:
            for other in chairs:
                if other != chair:
                    chairs[other] -= ranks
    for rank in everyone or ():
        where = [chair for chair, ranks in chairs.items() if rank in ranks]
        if len(where) == 1:
            chairs[where[0]] = frozenset((rank,))


def _certain(chairs: Mapping[_Chair, frozenset[int]]) -> dict[_Chair, int]:
    return {chair: next(iter(ranks)) for chair, ranks in chairs.items() if len(ranks) == 1}
