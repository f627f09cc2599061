"""Who listens where, as a rendezvous store says it: what one protocol tells about the connections of another.

A leaf. The reader of the store writes, the reader of the job's own traffic reads.
"""

from __future__ import annotations

import dataclasses

DEFAULT = "0"
"""The label of the group of all ranks, as torch names its groups."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Group:
    """The ranks of one process group, as they count within it."""

    name: str
    """In the store: `/default_pg/0//cpu//0` of all ranks, `/default_pg/0//LABEL//cpu//0` of another group."""
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rank by listening address, as flows spell it."""
    world: int | None = None
    """How many ranks there are, where one said it and no other contradicted."""
    owners: dict[int, str] = dataclasses.field(default_factory=dict)
    """By rank, the connection to the store over which it said so: every process has one of its own."""

    @property
    def label(self) -> str:
        """As torch calls it (`ProcessGroup.group_name`); with a number behind it where it has more than one device."""
        name, _, device = self.name.partition("//cpu//")
        outer, _, label = name.rpartition("//")
        if not outer or "default_pg/" in label:
            label = DEFAULT
        return label + (f"//cpu//{device}" if device not in ("", "0") else "")


class Directory:
    """Process groups by name, in the order in which they were first named."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        self.nameless: dict[str, int | None] = {}
        """Where some rank of some group listens, and how many ranks there are, if that was said."""
        self.version = 0
        """Counts the changes."""

    def add(self, name: str, rank: int, address: str, world: int | None, owner: str | None = None) -> None:
        """A rank of a group says where it listens, and perhaps how many ranks there are."""
        group = self._groups.setdefault(name, Group(name=name))
        if (
            group.ranks.get(address) == rank
            and world in (None, group.world)
            and owner in (None, group.owners.get(rank))
        ):
            return
        if group.ranks.get(address, rank) != rank or rank in {r for a, r in group.ranks.items() if a != address}:
            group.ranks.clear()  # said twice, differently: a restart. What was said before no longer counts
            group.owners.clear()
        group.ranks[address] = rank
        if owner is not None:
            group.owners[rank] = owner
        if world is not None:
            group.world = world
        self.version += 1

    def mention(self, address: str, world: int | None) -> None:
        """A rank listens there: nobody says which, or of which group."""
        if address not in self.nameless or world not in (None, self.nameless[address]):
            self.nameless[address] = world
            self.version += 1

    def groups(self) -> list[Group]:
        """The newest last."""
        return list(self._groups.values())

    def global_ranks(self, group: Group) -> tuple[int, ...] | None:
        """The ranks of a group as they count in the job, in the group's order; None where they are not certain.

        A process is known again by its connection to the store; and by its host's address, where no two have the same.
        """
        everyone = next((one for one in self._groups.values() if one.label == DEFAULT), None)
        if everyone is None or group.world is None:
            return None
        places: dict[str, set[int]] = {}
        hosts = _hosts(everyone) if len(everyone.ranks) == everyone.world else {}
        for one in (everyone.owners, hosts):
            for rank, place in one.items():
                places.setdefault(place, set()).add(rank)
        known: dict[int, set[int]] = {}
        for one in (group.owners, _hosts(group)):
            for rank, place in one.items():
                if len(found := places.get(place, set())) == 1:
                    known.setdefault(rank, set()).update(found)
        answer = [known.get(rank, set()) for rank in range(group.world)]
        if any(len(found) != 1 for found in answer):
            return None
        ranks = tuple(found.pop() for found in answer)
        return ranks if len(set(ranks)) == len(ranks) else None


def _hosts(group: Group) -> dict[int, str]:
    """By rank, the host of its listening address."""
    return {rank: address.rpartition(":")[0] for address, rank in group.ranks.items()}
