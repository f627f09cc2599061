"""How a flat vector is cut: a shard for each server, each shard into chunks; and which chunks are still awaited.

Both ends of an exchange compute the same cut from the length alone, so that a chunk anywhere else is refused. Knows
elements and indices; nothing of sockets, steps or what the numbers mean.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

WINDOW = 4
"""Chunks that a rank may have unanswered at one server: enough to overlap sending, adding and answering on loopback,
and with the chunk's size it bounds what a server must hold for each rank (8 MiB)."""

SMALL_CHUNK = 1 << 16
"""Elements (256 KiB) of a chunk of a short vector, so that it still has enough of them to overlap."""
LARGE_CHUNK = 1 << 19
"""Elements (2 MiB) of a chunk of a long vector. Against 1 MiB, 10 M floats took 7 % less time at 2 ranks and as long
at 4; 4 MiB gained nothing more."""
LONG_VECTOR = 1 << 22
"""Elements from which a vector is long."""


class Chunk(NamedTuple):
    """Elements `at` to `at + size` of a flat vector."""

    at: int
    size: int

    def __str__(self) -> str:
        return f"elements {self.at} to {self.at + self.size}"


def shard_chunks(total: int, *, index: int, servers: int) -> list[Chunk]:
    """The chunks of server `index` of `servers`, in order; none where a short vector leaves it no element."""
    size = SMALL_CHUNK if total < LONG_VECTOR else LARGE_CHUNK
    begin, end = index * total // servers, (index + 1) * total // servers
    return [Chunk(at, min(size, end - at)) for at in range(begin, end, size)]


class Landing:
    """A vector that comes back in chunks, from several servers: where they go, and which are still missing."""

    def __init__(self, vector: np.ndarray, *, servers: int) -> None:
        """Whatever `vector` holds is overwritten, chunk by chunk."""
        self.vector = vector
        cut = [shard_chunks(len(vector), index=index, servers=servers) for index in range(servers)]
        self._awaited = [dict.fromkeys(chunks) for chunks in cut]
        self._unsent = [deque(chunks) for chunks in cut]

    def next_to_send(self, server: int) -> Chunk | None:
        """The next chunk of this server's shard, each once."""
        return self._unsent[server].popleft() if self._unsent[server] else None

    def land(self, server: int, chunk: Chunk, values: np.ndarray) -> bool:
        """Copies a chunk into its place. False where it is not one that this server still has to answer."""
        if chunk not in self._awaited[server]:
            return False
        del self._awaited[server][chunk]
        self.vector[chunk.at : chunk.at + chunk.size] = values
        return True

    def awaits(self, server: int) -> bool:
        """Whether this server still owes something."""
        return bool(self._awaited[server])

    def missing(self) -> tuple[int, Chunk] | None:
        """The first server that still owes something, and its first missing chunk; None when all has landed."""
        for server, chunks in enumerate(self._awaited):
            for chunk in chunks:
                return server, chunk
        return None
