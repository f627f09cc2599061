"""Who listens where, as a rendezvous store says it: what one protocol tells about the connections of another.

A leaf. The reader of the store writes, the reader of the job's own traffic reads.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(kw_only=True, slots=True)
class Group:
    """The ranks of one process group."""

    name: str
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rank by listening address, as flows spell it."""
    world: int | None = None
    """How many ranks there are, where one said it and no other contradicted."""


class Directory:
    """Process groups by name, in the order in which they were first named."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        self.version = 0
        """Counts the changes."""

    def add(self, name: str, rank: int, address: str, world: int | None) -> None:
        """A rank of a group says where it listens, and perhaps how many ranks there are."""
        group = self._groups.setdefault(name, Group(name=name, world=world))
        if group.ranks.get(address, rank) != rank or rank in {r for a, r in group.ranks.items() if a != address}:
            group.ranks.clear()  # said twice, differently: a restart. What was said before no longer counts
        group.ranks[address] = rank
        if world is not None:
            group.world = world
        self.version += 1

    def groups(self) -> list[Group]:
        """The newest last."""
        return list(self._groups.values())
