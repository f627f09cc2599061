"""What a server does in secure aggregation, without a socket: hands on keys, waits for vectors, asks for seeds, sums.

    every rank -> server   KEY       its public key; then server -> every rank: all of them, in rank order
    each step:
    rank -> server         GRADIENT  masked, in chunks, as many at once as it likes
    server -> rank         RELEASE   the ranks present, u32 each: those whose vectors are whole when no more are awaited
    rank -> server         RELEASE   the seeds that these may give away
    server -> rank         AVERAGE   the mean over the ranks present, which the header names

A rank that is lost, or late by the deadline, is missing from that step on, and the others go on without it. If one is
lost between the two RELEASEs, its mask stays on the sum: the step's average is then zero, over no rank. The server
holds one masked vector of each rank. Knows masked words; nothing of sockets or of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from harness.errors import PeerError
from harness.exchange.chunks import Chunk
from harness.exchange.masks import add_masks
from harness.exchange.message import Message
from harness.exchange.secure import KEY_BYTES, LEAST_PRESENT, unmasking
from harness.wire import WireError
from harness.wire.coded import Float32
from harness.wire.masked import Words, average_of, read_words


class Answer(NamedTuple):
    """The end of a step."""

    average: Float32
    ranks: tuple[int, ...]
    """Over which it was taken; none where it could not be."""


class SecureShard:
    """The whole vector of a run, step after step."""

    def __init__(self, *, world_size: int, chunks: list[Chunk]) -> None:
        self.missing: set[int] = set()
        """Ranks that are out of the run."""
        self._world_size, self._chunks, self._total = world_size, chunks, sum(chunk.size for chunk in chunks)
        self._members: tuple[int, ...] = tuple(range(world_size))
        """Whom the ranks themselves believe to be there: those who were present at the last step."""
        self._keys: dict[int, bytes] = {}
        self._begin()

    def _begin(self) -> None:
        self._vectors: dict[int, Words] = {}
        self._awaited: dict[int, dict[Chunk, None]] = {rank: dict.fromkeys(self._chunks) for rank in self._members}
        self._unit: float | None = None
        self._present: tuple[int, ...] = ()
        """Once they were named."""
        self._released: dict[int, bytes] = {}

    @property
    def agreed(self) -> bool:
        """Whether all ranks know all keys: from then on, one that is lost is not missed."""
        return len(self._keys) == self._world_size

    def add_key(self, rank: int, key: bytes) -> bytes | None:
        """All keys, once they are there. Raises: WireError."""
        if len(key) != KEY_BYTES or rank in self._keys:
            raise WireError(f"wanted one key of {KEY_BYTES} bytes, got {len(key)}")
        self._keys[rank] = key
        return b"".join(self._keys[one] for one in sorted(self._keys)) if self.agreed else None

    def add(self, rank: int, message: Message) -> None:
        """Takes a chunk of a rank's vector. Raises: WireError where it is not one that is awaited."""
        header = message.header
        chunk = Chunk(header.at, header.count)
        words, unit = read_words(header.count, header.params, message.payload)
        if self._present or chunk not in self._awaited.get(rank, {}) or self._unit not in (None, unit):
            raise WireError(f"{chunk} of unit {unit:g} is not awaited")
        self._unit = unit
        del self._awaited[rank][chunk]
        vector = self._vectors.setdefault(rank, np.empty(self._total, np.uint32))
        vector[chunk.at : chunk.at + chunk.size] = words

    def call(self) -> tuple[int, ...]:
        """Whom to tell that they are present, themselves, once nothing more is awaited; before that, nobody.

        Raises: PeerError, where too few are left.
        """
        if self._present or not self._vectors or self.late():
            return ()
        present = tuple(rank for rank in self._members if rank not in self.missing)
        if len(present) < LEAST_PRESENT:
            raise PeerError(f"secure aggregation: wanted {LEAST_PRESENT} ranks or more, got {list(present)}")
        self._present = present
        return present

    @property
    def waiting(self) -> bool:
        """Whether anybody has sent something of this step, and waits."""
        return bool(self._vectors)

    def late(self) -> list[int]:
        """Ranks that are awaited: with vectors, or later with their seeds."""
        if self._present:
            return [rank for rank in self._present if rank not in self._released and rank not in self.missing]
        return [rank for rank, chunks in self._awaited.items() if chunks and rank not in self.missing]

    def release(self, rank: int, seeds: bytes) -> None:
        """Takes a rank's seeds. Raises: WireError."""
        if rank not in self._present or rank in self._released:
            raise WireError("seeds were not awaited")
        self._released[rank] = seeds

    def finish(self) -> Answer | None:
        """The average, once nobody's seeds are awaited, and the next step begins. Raises: PeerError."""
        if not self._present or self.late():
            return None
        present, missing = self._present, [rank for rank in self._members if rank not in self._present]
        answer = Answer(np.zeros(self._total, np.float32), ())
        if set(self._released) == set(present):
            assert self._unit is not None
            total = self._vectors[present[0]]
            for rank in present[1:]:
                total += self._vectors[rank]
            add_masks(total, unmasking(present, missing, self._released))
            answer = Answer(average_of(total, self._unit, len(present)), present)
        self._members = present
        self._begin()
        return answer

    def drop(self, ranks: Iterable[int]) -> None:
        """These are out of the run."""
        self.missing.update(ranks)
        if not self._present:
            for rank in self.missing:
                self._vectors.pop(rank, None)
