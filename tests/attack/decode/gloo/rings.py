"""Gloo's ring all-reduce, slow and obvious: what each rank sends to its neighbor, in order, and in float32.

Written from gloo/allreduce.cc, step by step for all ranks at once; shares no code with the decoder.
"""

from __future__ import annotations

import numpy as np

MAX_SEGMENT = 1 << 20


def ring(vectors: list[np.ndarray], *, max_segment: int = MAX_SEGMENT) -> tuple[list[list[bytes]], np.ndarray]:
    """The payloads that each rank sends to the rank before it, and the sum that all have in the end."""
    world, size = len(vectors), vectors[0].itemsize
    total = vectors[0].nbytes
    least = -(-total // (max_segment // size * size))
    segments = max(least, 2 * world)
    segments += -segments % world
    per, length = segments // world, -(-total // segments)
    length += -length % size
    out = [vector.copy() for vector in vectors]

    def part(rank: int, segment: int) -> np.ndarray:
        start = segment % segments * length // size
        return out[rank][start : start + length // size]

    sent: list[list[bytes]] = [[] for _ in range(world)]
    for step in range(segments - per):
        moving = [part(rank, (rank + 1) * per + step).copy() for rank in range(world)]
        for rank in range(world):
            if moving[rank].size:
                sent[rank].append(moving[rank].tobytes())
        for rank in range(world):
            received = moving[(rank + 1) % world]
            if received.size:
                mine = part(rank, (rank + 2) * per + step)
                mine[:] = mine + received
    for step in range(segments - per):
        moving = [part(rank, rank * per + step).copy() for rank in range(world)]
        for rank in range(world):
            if moving[rank].size:
                sent[rank].append(moving[rank].tobytes())
        for rank in range(world):
            received = moving[(rank + 1) % world]
            if received.size:
                part(rank, (rank + 1) * per + step)[:] = received
    assert all(vector.tobytes() == out[0].tobytes() for vector in out)
    return sent, out[0]
