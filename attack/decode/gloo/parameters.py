"""What DistributedDataParallel says about a model when it is built: shapes, and the state of rank 0.

Takes payloads of collectives, gives shapes and vectors; None where bytes fit no model, or more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attack.decode.gloo.framing import Message
from attack.observation import Shapes

_MAX_DIMENSIONS = 8


def joined(copies: Sequence[Sequence[Message]]) -> tuple[bytearray, bool] | None:
    """What all of these links say alike, from what each has of it, and whether that is whole. None: they contradict."""
    best = bytearray()
    known = np.zeros(0, np.bool_)
    for copy in copies:
        payload = bytearray().join(message.payload for message in copy)
        seen = np.ones(len(payload), np.bool_)
        at = 0
        for message in copy:
            for start, stop in message.holes:
                seen[at + start : at + stop] = False
            at += len(message.payload)
        if not best:
            best, known = payload, seen
            continue
        if len(payload) != len(best):
            return None
        ours, theirs = np.frombuffer(best, np.uint8), np.frombuffer(payload, np.uint8)
        if (known & seen & (ours != theirs)).any():
            return None
        fill = seen & ~known
        if fill.any():
            best = bytearray(np.where(fill, theirs, ours).tobytes())
            known |= seen
    return best, bool(known.all())


def parse_shapes(payload: bytes | bytearray, count: int) -> Shapes | None:
    """int64: of each parameter its sizes, then its strides; nothing says where one ends.

    A contiguous tensor's strides follow from its sizes, which in practice leaves one way to read them. Shapes that lie
    otherwise in memory (channels last) are refused: their gradients would be in another order.
    """
    if len(payload) % 8:
        return None
    numbers = np.frombuffer(payload, "<i8").tolist()
    # ways[k]: of the first parameters that were read, (where they end -> their shapes), at most two for each end
    ends: dict[int, list[Shapes]] = {0: [()]}
    for _ in range(count):
        following: dict[int, list[Shapes]] = {}
        for at, found in ends.items():
            for dimensions in range(_MAX_DIMENSIONS + 1):
                shape = tuple(numbers[at : at + dimensions])
                strides = numbers[at + dimensions : at + 2 * dimensions]
                if len(strides) == dimensions and min(shape, default=1) > 0 and strides == _strides(shape):
                    into = following.setdefault(at + 2 * dimensions, [])
                    into += [(*shapes, shape) for shapes in found]
                    del into[2:]
        ends = following
    ways = ends.get(len(numbers), [])
    return ways[0] if len(ways) == 1 else None


def parse_layout(
    indices: bytes | bytearray, sizes: bytes | bytearray, count: int
) -> tuple[tuple[int, ...], ...] | None:
    """int32: the parameters in the order of the buckets, then how many buckets; and the parameters of each bucket."""
    if len(indices) != 4 * (count + 1) or len(sizes) % 4:
        return None
    order, lengths = np.frombuffer(indices, "<i4").tolist(), np.frombuffer(sizes, "<i4").tolist()
    if sorted(order[:-1]) != list(range(count)) or order[-1] != len(lengths) or sum(lengths) != count:
        return None
    buckets, at = [], 0
    for length in lengths:
        buckets.append(tuple(order[at : at + length]))
        at += length
    return tuple(buckets)


def begins_layout(indices: bytes | bytearray, count: int) -> bool:
    """Whether these bytes can be the first part of a layout: each parameter once."""
    return len(indices) == 4 * (count + 1) and sorted(np.frombuffer(indices, "<i4")[:-1].tolist()) == list(range(count))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
